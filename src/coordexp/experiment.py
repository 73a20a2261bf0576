"""The composition root: the one module where configuration meets components.

A run is a chain of stages that meet in files: data -> model -> train -> predict -> evaluate -> report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coordexp.config.load import dump_config
from coordexp.config.schema import ExperimentConfig
from coordexp.decode.options import DecodeOptions
from coordexp.errors import ConfigError, DataError
from coordexp.evaluate.options import EvaluateOptions
from coordexp.runs.manifest import RunDirectory, Status

STAGES = ("data", "model", "train", "predict", "evaluate", "report")


@contextmanager
def _bar(console: Console, label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress callback ``(done, total)``; nothing is drawn on a pipe."""
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        TextColumn(f"  {label}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def run(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    command: list[str],
    overwrite: bool = False,
    until: str | None = None,
    console: Console | None = None,
) -> tuple[str, ...]:
    """Run an experiment from its data to its report; returns the expectations of the file that were missed.

    ``until`` names the last stage. The manifest says at every moment how far the run is; an
    interrupted or failed run is marked as such.

    Raises:
        CoordexpError: whatever the user can mend; nothing is left half-written under a final name.
    """
    console = console or Console()
    if until is not None and until not in STAGES:
        raise ConfigError(f"unknown stage {until!r}: expected one of {', '.join(STAGES)}")
    _preflight(config)
    directory = RunDirectory.create(run_dir, name=config.name, config_yaml=dump_config(config), command=command, overwrite=overwrite)
    chain = _Chain(config, directory, console)
    wanted = STAGES if until is None else STAGES[: STAGES.index(until) + 1]
    status: Status = "failed"
    try:
        for number, stage in enumerate(wanted, start=1):
            console.print(f"[bold]\\[{number}/{len(wanted)}] {stage}[/bold]")
            with directory.stage(stage):
                getattr(chain, stage)()
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        console.print(f"{run_dir} is incomplete (its manifest.json says how far it got): run again with --overwrite", soft_wrap=True)
        raise
    finally:
        directory.finish(status)
    if "report" in wanted:
        # The report embeds the manifest, so it is written once more when the run is complete.
        chain.report()
        return chain.headline()
    return ()


def _preflight(config: ExperimentConfig) -> None:
    """Refuse what cannot work before anything is written."""
    if config.model.path is not None:
        from coordexp.modeling.load import check_model_folder

        check_model_folder(Path(config.model.path))
    if config.data.source is not None and not Path(config.data.source).is_dir():
        raise ConfigError(f"data.source: expected a folder, {config.data.source} is none: pass --set data.source=FOLDER")


@dataclass
class _Chain:
    """The stages; each reads what the one before wrote."""

    config: ExperimentConfig
    directory: RunDirectory
    console: Console

    def _say(self, text: str) -> None:
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    @property
    def _root(self) -> Path:
        return self.directory.path

    def _split(self, name: str) -> Path:
        return self._root / "data" / f"{name}.jsonl"

    def data(self) -> None:
        """Make or import the data, read every record and check its image once."""
        from coordexp.data.records import verify_images

        data = self.config.data
        with _bar(self.console, "images") as progress:
            if data.kind == "synth":
                from coordexp.data.synthetic import write_scenes

                write_scenes(self._root / "data", data.synth, progress)
            elif data.kind == "voc":
                from coordexp.data.importers.base import ImportOptions
                from coordexp.data.importers.formats import import_data

                assert data.source is not None
                options = ImportOptions(on_invalid=data.on_invalid)
                report = import_data("voc", Path(data.source), self._root / "data", options, progress=progress)
                for kind, lines in (("warning", report.warnings), ("left out", report.dropped)):
                    for line in lines:
                        self._say(f"{kind}: {line}")
                        self.directory.note(f"{kind}: {line}")
            else:
                assert data.source is not None
                (self._root / "data").symlink_to(Path(data.source).resolve(), target_is_directory=True)
        counts = []
        for name in ("train", "val", "test"):
            records = self._records(name, quiet=False)
            # Made scenes were written a moment ago; other people's images are decoded once, up front.
            if data.kind != "synth":
                verify_images(records)
            counts.append(f"{len(records)} {name}")
        self._say(", ".join(counts) + " images")

    def _records(self, split: str, *, quiet: bool = True) -> list[Any]:
        from coordexp.data.records import read_records

        data = self.config.data
        limit = {"train": data.max_train, "val": data.max_val, "test": data.max_test}[split]
        file = read_records(self._split(split), on_invalid=data.on_invalid, limit=limit)
        for reason in () if quiet else file.skipped:
            self._say(f"left out: {reason}")
            self.directory.note(f"left out: {reason}")
        if not file.records:
            raise DataError(f"{self._split(split)}: no usable record: nothing to {'train on' if split == 'train' else 'evaluate'}")
        return list(file.records)

    def model(self) -> None:
        """Make or take the model, give it coordinate tokens, write it to ``model/``."""
        from coordexp.modeling.extend import extend_model
        from coordexp.modeling.load import load_tokenizer
        from coordexp.modeling.tiny import write_tiny_model
        from coordexp.vocab.coord_vocab import CoordVocab

        source = self.config.model.path
        base = write_tiny_model(self._root / "tiny", self.config.model.tiny) if source is None else Path(source)
        if self.config.vocab.extend:
            self._say(str(extend_model(base, self._root / "model", self.config.vocab)))
        else:
            CoordVocab.from_tokenizer(load_tokenizer(base))
            (self._root / "model").symlink_to(base.resolve(), target_is_directory=True)

    def _template(self, folder: Path) -> Any:
        from coordexp.data.template import ChatTemplate
        from coordexp.modeling.load import load_image_processor, load_tokenizer

        options = self.config.model
        return ChatTemplate(
            tokenizer=load_tokenizer(folder),
            image_processor=load_image_processor(folder, min_pixels=options.min_pixels, max_pixels=options.max_pixels),
            prompt=self.config.data.prompt,
            order=self.config.data.order,
            seed=self.config.seed,
        )

    def train(self) -> None:
        """Train, log, save checkpoints and the final model under ``checkpoints/``."""
        from transformers import set_seed

        from coordexp.modeling.load import load_model
        from coordexp.train.launch import train

        folder = self._root / "model"
        set_seed(self.config.seed)
        train(
            self.config.train,
            objective=self.config.objective,
            model=load_model(folder, self.config.model),
            template=self._template(folder),
            train_records=self._records("train"),
            eval_records=self._records("val"),
            run_dir=self._root,
            processor_from=folder,
            header={key: self.directory.manifest[key] for key in ("config_sha256", "git", "versions")},
            seed=self.config.seed,
            console=self.console,
            packing=self.config.data.packing,
        )

    def predict(self) -> None:
        """Generate on the test split with the final model."""
        from coordexp.modeling.load import load_model

        folder = self._root / "checkpoints" / "final"
        model = load_model(folder, self.config.model)
        records = self._records("test")
        boxes = _predict(model, self._template(folder), records, self._root / "predictions.jsonl", self.config.decode, self.console)
        self._say(f"{boxes} boxes on {len(records)} images")

    def evaluate(self) -> None:
        """Compare predictions with the test split."""
        evaluate_predictions(self._root / "predictions.jsonl", self._test_file(), self.config.evaluate, out=self._root)

    def _test_file(self) -> Path:
        """The records that predictions were made for: the split, or the lines of it that were used."""
        lines = self._split("test").read_text(encoding="utf-8").splitlines(keepends=True)
        used = [int(record.source.rpartition(":")[2]) for record in self._records("test")]
        if len(used) == sum(bool(line.strip()) for line in lines):
            return self._split("test")
        subset = self._root / "test-used.jsonl"
        subset.write_text("".join(lines[number - 1] for number in used), encoding="utf-8")
        return subset

    def report(self) -> None:
        """Write ``audit.json`` and ``report.html``, which shows its findings."""
        from coordexp.runs.audit import audit_run
        from coordexp.runs.report import write_report

        audit_run(self._root)
        write_report(self._root, self.config.report)

    def headline(self) -> tuple[str, ...]:
        """Print the headline numbers, what the file expected of them, and where the report is; return what was missed."""
        from coordexp.evaluate.result import best_readout, headline

        results = json.loads((self._root / "results.json").read_text(encoding="utf-8"))
        self.console.print()
        for label, value in headline(results):
            self._say(f"{label:<44} {value}")
        missed = []
        for key, least in self.config.evaluate.expect.items():
            value = results.get(key.replace(".best.", f".{best_readout(results)}."))
            reached = value is not None and value >= least
            verdict = "reached" if reached else "MISSED"
            self._say(f"{verdict}: {key} = {'undefined' if value is None else f'{value:.3f}'}, expected at least {least:g}")
            missed += [] if reached else [key]
        self._say(f"report: {os.path.relpath(self._root / 'report.html')}")
        return tuple(missed)


def _predict(model: Any, template: Any, records: list[Any], out: Path, options: DecodeOptions, console: Console) -> int:
    from coordexp.decode.predict import predict
    from coordexp.vocab.coord_vocab import CoordVocab

    vocab = CoordVocab.from_tokenizer(template.tokenizer)
    with _bar(console, "generating") as progress:
        return predict(model, template, records, out, vocab=vocab, options=options, progress=progress)


def predict_file(
    model: Path, data: Path, out: Path, options: DecodeOptions, *, prompt: str | None = None, limit: int | None = None,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Predict the records of one file with a model folder; returns the number of boxes written."""
    from coordexp.data.options import DEFAULT_PROMPT
    from coordexp.data.records import read_records, verify_images
    from coordexp.data.template import ChatTemplate
    from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer
    from coordexp.vocab.coord_vocab import CoordVocab

    tokenizer = load_tokenizer(model)
    CoordVocab.from_tokenizer(tokenizer)
    records = list(read_records(data, limit=limit).records)
    verify_images(records)
    template = ChatTemplate(tokenizer, load_image_processor(model), prompt=prompt or DEFAULT_PROMPT)
    return _predict(load_model(model), template, records, out, options, console or Console())


def evaluate_predictions(
    predictions: Path, data: Path, options: EvaluateOptions, *, out: Path, convention: str = "norm999"
) -> dict[str, Any]:
    """See :func:`coordexp.evaluate.result.evaluate_files`; loads the text model that the options name, if any."""
    from coordexp.evaluate.result import evaluate_files

    embed = None
    if options.match_model is not None:
        from coordexp.modeling.embed import text_embedder

        embed = text_embedder(Path(options.match_model))
    return evaluate_files(predictions, data, options, out=out, convention=convention, embed=embed)
