"""Prediction and its evaluation outside a run: from a model folder and records to files and numbers.

Beside ``experiment``, which calls it for a run's own stages; heavy imports are inside the functions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coordexp.decode.options import DecodeOptions
from coordexp.errors import ConfigError
from coordexp.evaluate.options import EvaluateOptions
from coordexp.grammar import Geometry
from coordexp.terminal import Terminal


def probe(
    model: Any,
    template: Any,
    records: list[Any],
    options: DecodeOptions,
    geometries: Sequence[Geometry] = ("bbox_2d",),
    *,
    share: tuple[int, int] = (0, 1),
    gather: Callable[[list[str]], list[str]] = list,
) -> dict[str, float]:
    """Generate on ``records`` and score: ``probe/{parse_rate,f1_50,objects_per_image,duplicate_rate}``; what is undefined is NaN.

    Without the grammar's constraint, under which every answer parses. ``share`` ``(rank, ranks)``: this process generates every
    ``ranks``-th record, and ``gather`` returns the rows of all processes.

    F1 at IoU .5 is class-agnostic, with the boxes of ``options.readout``. A model that points has ``probe/point_acc`` in its place:
    the share of points that fall on the referred object.
    """
    from coordexp.decode.predict import predict
    from coordexp.evaluate.options import EvaluateOptions
    from coordexp.evaluate.result import evaluate_files
    from coordexp.vocab.coord_vocab import CoordVocab

    with tempfile.TemporaryDirectory(prefix="coordexp-probe-") as scratch:
        truth, found, part = (Path(scratch) / f"{name}.jsonl" for name in ("records", "predictions", "share"))
        lines = []
        for record in records:
            file, _, number = record.source.rpartition(":")
            lines.append(Path(file).read_text(encoding="utf-8").splitlines()[int(number) - 1])
        truth.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        vocab, free = CoordVocab.from_tokenizer(template.tokenizer), replace(options, constrained=False)
        mine = records[share[0] :: share[1]]
        if mine:
            predict(model, template, mine, part, vocab=vocab, options=free, geometries=geometries)
        rows = gather(part.read_text(encoding="utf-8").splitlines() if mine else [])
        found.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        results = evaluate_files(found, truth, EvaluateOptions(bootstrap=0), out=None)
    keys = {
        "probe/parse_rate": "health.parse_rate",
        "probe/f1_50": "detection.file.agnostic.f1.50",
        "probe/objects_per_image": "health.boxes_per_image",
        "probe/duplicate_rate": "health.duplicate_rate",
    }
    if tuple(geometries) == ("point_2d",):
        del keys["probe/f1_50"]
        keys["probe/point_acc"] = "pointing.acc"
        # Without a single point the file reads as grounding: nothing was met.
        results.setdefault("pointing.acc", 0.0)
    return {name: float("nan") if results[key] is None else float(results[key]) for name, key in keys.items()}


@contextmanager
def progress_bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback ``(done, total)``; nothing is drawn on a pipe."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        TextColumn(f"  {label}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _boxes_bar(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """A progress callback ``(done, total, objects)`` that shows objects/s; nothing is drawn on a pipe."""
    if not console.is_terminal:
        yield lambda done, total, found: None
        return
    columns = (TextColumn("  generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[rate]}"))
    begin = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("generating", total=None, rate="")

        def show(done: int, total: int, found: int) -> None:
            progress.update(task, completed=done, total=total, rate=f"{found / (time.perf_counter() - begin):.1f} objects/s")

        yield show


def predict_records(model: Any, template: Any, records: list[Any], out: Path, options: DecodeOptions, console: Console, **more: Any) -> Any:
    """Predict ``records`` to ``out`` with a loaded model and a progress bar; ``more`` goes to ``decode.predict.predict``."""
    from coordexp.decode.predict import predict
    from coordexp.vocab.coord_vocab import CoordVocab

    vocab = CoordVocab.from_tokenizer(template.tokenizer, template.codec.num_bins)
    with _boxes_bar(console) as progress:
        return predict(model, template, records, out, vocab=vocab, options=options, progress=progress, **more)


def predict_file(
    model: Path, data: Path, out: Path, options: DecodeOptions, *, prompt: str | None = None,
    geometry: Geometry | None = None, limit: int | None = None, calibrate: tuple[Path, Path | None] | None = None,
    device: str = "auto", overwrite: bool = False, console: Console | None = None,
) -> Any:  # fmt: skip
    """Predict the records of one file with a model folder; returns what this process did (``decode.predict.Predicted``).

    Prompt, geometries, convention and image size are those of the folder's ``coordexp.json``, where it has one.
    ``calibrate``: a saved calibration, or a prediction file and its records; what was fitted is saved as
    ``OUT.calibration.json``. Under torchrun each process takes its share of the records, on its own GPU if there is one.

    Raises:
        ConfigError: a ``prompt`` or ``geometry`` other than the checkpoint was trained with.
    """
    from coordexp.codec import CoordCodec
    from coordexp.data.options import DEFAULT_PROMPT
    from coordexp.data.records import read_records
    from coordexp.data.template import ChatTemplate
    from coordexp.decode.output import Output, Workers
    from coordexp.decode.scores import open_calibration
    from coordexp.modeling.load import choose_device, load_image_processor, load_model, load_tokenizer
    from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, check_contract
    from coordexp.runs.manifest import file_sha256
    from coordexp.vocab.coord_vocab import CoordVocab

    where = choose_device(device)
    tokenizer = load_tokenizer(model)
    contract = check_contract(model, prompt=prompt, keys={"prompt": "--prompt"})
    if contract is not None and geometry not in (None, *contract.geometries):
        raise ConfigError(
            f"--geometry: the checkpoint was trained to write {', '.join(contract.geometries)} ({model / CHECKPOINT_MANIFEST}), "
            f"got {geometry}: leave the option out"
        )
    geometries = (geometry,) if geometry is not None else ("bbox_2d",) if contract is None else contract.geometries
    codec = CoordCodec() if contract is None else CoordCodec(contract.num_bins, contract.convention)
    CoordVocab.from_tokenizer(tokenizer, codec.num_bins)
    # A damaged image is a row with its error, not the end: images are looked at one by one, in their batch.
    records = list(read_records(data, limit=limit, check_images=False).records)
    calibration = None if calibrate is None else open_calibration(*calibrate, options.score)
    text = contract.prompt if contract is not None else prompt or DEFAULT_PROMPT
    template = ChatTemplate(tokenizer, load_image_processor(model), codec, prompt=text)
    # Weights, tokenizer, image size, chat template: everything of the folder that an answer depends on.
    files = sorted(
        {*model.glob("*.safetensors"), *model.glob("*config.json"), *model.glob("tokenizer.json"), *model.glob("chat_template*")}
    )
    settings = {"model_sha256": {path.name: file_sha256(path) for path in files}, "prompt": template.prompt}
    loaded = load_model(model).to(where)
    workers = Workers.from_environment()
    try:
        done = predict_records(
            loaded, template, records, out, options, console or Terminal(stderr=True, quiet=workers.rank > 0), settings=settings,
            geometries=geometries, calibration=calibration, overwrite=overwrite, workers=workers,
        )  # fmt: skip
        if calibration is not None and workers.rank == 0:
            calibration.save(Output(out, workers).calibration_path)
    finally:
        workers.close()
    return done


def evaluate_predictions(
    predictions: Path, data: Path, options: EvaluateOptions, *, out: Path, convention: str = "norm999", force: bool = False
) -> dict[str, Any]:
    """See :func:`coordexp.evaluate.result.evaluate_files`; loads the text model that the options name, if any."""
    from coordexp.evaluate.result import evaluate_files

    embed = None
    if options.match_model is not None:
        from coordexp.modeling.embed import text_embedder

        embed = text_embedder(Path(options.match_model))
    return evaluate_files(predictions, data, options, out=out, convention=convention, embed=embed, force=force)
