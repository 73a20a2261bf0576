"""``coordexp vocab export``: from a run or a checkpoint to a folder that any install of transformers loads.

Composes what lies below it, as ``experiment`` does: run directory, records, template and model meet here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.options import DEFAULT_PROMPT
from coordexp.data.staging import staged_folder
from coordexp.errors import ConfigError, VocabError
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest, read_checkpoint_manifest
from coordexp.runs.manifest import MANIFEST, file_sha256, read_manifest, versions

if TYPE_CHECKING:
    from coordexp.modeling.streamed import Streamed

TOLERANCE: Final = 1e-5
SAMPLES: Final = 2


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """``base``, for an adapter: the model it was trained on. ``data``: records that verify runs on, instead of the run's own.

    ``prompt`` and ``convention`` are for a checkpoint without ``coordexp.json``; with one they must agree with it.
    ``dtype``: that of the written weights, by default the trained ones'.
    """

    verify: bool = False
    untie: bool = False
    dtype: Literal["source", "float32", "bfloat16"] = "source"
    base: Path | None = None
    data: Path | None = None
    prompt: str | None = None
    convention: str | None = None


@dataclass(frozen=True)
class ExportSummary:
    """What :func:`export_checkpoint` wrote."""

    out: Path
    checkpoint: Path
    dtype: str
    tied: bool
    merged: bool
    difference: float | None

    def __str__(self) -> str:
        what = f"{self.checkpoint}{' (adapter merged)' if self.merged else ''}"
        checked = "not verified" if self.difference is None else f"verified: logits differ by {self.difference:.1e}"
        return f"{what} -> {self.out}: {self.dtype}, {'tied head' if self.tied else 'separate head'}, {checked}"


@dataclass(frozen=True)
class _Source:
    """A checkpoint folder, the base of an adapter, and the run they belong to."""

    checkpoint: Path
    base: Path | None
    run: Path | None


def export_checkpoint(
    source: Path, out: Path, options: ExportOptions, progress: Callable[[int, int], None] = lambda done, total: None
) -> ExportSummary:
    """Write ``source``, a run directory or a checkpoint folder, to ``out``, which must not exist or be empty.

    Weights are read, merged and written one tensor at a time, and keep their file and, with ``dtype`` ``source``, their type.
    With ``verify`` the logits of the written folder on records of the run's validation split are compared with those of the
    trained model, adapter unmerged, both in float32, through the modules of the model's class, which read their weights as they run.
    ``progress`` is told how many of the files and comparisons are done.

    Raises:
        ConfigError: no such run or model, a run that is not complete, ``out`` in use, flags against the manifest.
        VocabError: no coordinate tokens, or verify found a difference; nothing is written then.
    """
    import torch

    from coordexp.modeling.export import source_files
    from coordexp.modeling.streamed import open_model, save_streamed

    found = _find(source, options)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another output folder")
    tokenizer, processor_from, manifest = _contract(found, options)
    records = _sample_records(found, options) if options.verify else []
    with staged_folder(out) as staging:
        model = open_model(found.base or found.checkpoint, None if found.base is None else found.checkpoint)
        _check_rows(model.rows, manifest, found.checkpoint)
        dtype = model.dtype if options.dtype == "source" else options.dtype
        shards, tied = model.merged(dtype=None if options.dtype == "source" else getattr(torch, dtype), untie=options.untie)
        steps = count(1)

        def step() -> None:
            progress(next(steps), len(shards.files) + 2 * len(records))

        save_streamed(
            model, shards, staging, tied=tied, tokenizer=tokenizer, processor_from=processor_from,
            dtype=None if options.dtype == "source" else dtype, step=step,
        )  # fmt: skip
        worst = None
        if options.verify:
            worst = _compare(model, staging, processor_from, tokenizer, manifest, records, dtype=dtype, step=step)
        how = {
            "checkpoint": found.checkpoint.name,
            "merged_adapter": found.base is not None,
            "tied": tied,
            "dtype": dtype,
            "verified": None
            if worst is None
            else {"samples": len(records), "max_relative_difference": worst, "tolerance": TOLERANCE, "computed_in": "float32"},
        }
        hashes = {name: file_sha256(path) for name, path in source_files(found.checkpoint, found.base).items()}
        complete = manifest.exported(versions=versions(), sources=hashes, export=how)
        (staging / CHECKPOINT_MANIFEST).write_text(complete.text(), encoding="utf-8")
    return ExportSummary(out, found.checkpoint, dtype, tied, found.base is not None, worst)


def _find(source: Path, options: ExportOptions) -> _Source:
    from coordexp.modeling.export import adapter_base, check_checkpoint
    from coordexp.vocab.adapters import is_adapter

    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder: expected a run directory or a checkpoint folder")
    if (source / MANIFEST).is_file():
        run: Path | None = source
        status = read_manifest(source).get("status")
        checkpoint = source / "checkpoints" / "final"
        if status != "complete" or not checkpoint.is_dir():
            why = f"its status is {status!r}" if status != "complete" else "it has no checkpoints/final"
            raise ConfigError(f"{source}: expected a complete run, but {why}: finish it, or name one of its checkpoint folders")
    else:
        checkpoint, above = source, source.resolve().parent.parent
        run = above if (above / MANIFEST).is_file() and source.resolve().parent.name == "checkpoints" else None
    check_checkpoint(checkpoint)
    if not is_adapter(checkpoint):
        if options.base is not None:
            raise ConfigError(f"--base: only for an adapter, {checkpoint} holds a whole model")
        return _Source(checkpoint, None, run)
    # A run that was moved still has its own starting model, whatever path the adapter names.
    own = run / "model" if run is not None and (run / "model").is_dir() else None
    return _Source(checkpoint, adapter_base(checkpoint, options.base or own), run)


def _contract(found: _Source, options: ExportOptions) -> tuple[Any, Path, CheckpointManifest]:
    """Tokenizer, the folder with the processor's files, and the manifest: read, or put together from flags."""
    from coordexp.modeling.export import first_with
    from coordexp.modeling.load import BUDGET_FILES, load_image_processor, load_tokenizer, pixel_budget
    from coordexp.modeling.manifest import check_contract
    from coordexp.vocab.coord_vocab import CoordVocab

    tokenizer = load_tokenizer(first_with(("tokenizer_config.json",), found.checkpoint, found.base))
    processor_from = first_with(BUDGET_FILES, found.checkpoint, found.base)
    budget = pixel_budget(load_image_processor(processor_from))
    where = first_with((CHECKPOINT_MANIFEST,), found.checkpoint, found.base)
    manifest = read_checkpoint_manifest(where)
    if manifest is None:
        if options.prompt is None or options.convention is None:
            raise ConfigError(
                f"{where}: no {CHECKPOINT_MANIFEST}: pass the --prompt it was trained with (coordexp's own is {DEFAULT_PROMPT!r}) "
                f"and its --convention ({', '.join(CONVENTIONS)})"
            )
        if options.convention not in CONVENTIONS:
            raise ConfigError(f"--convention: expected one of {', '.join(CONVENTIONS)}, got {options.convention}")
        bins = CONVENTIONS[options.convention].bins
        start = CoordVocab.from_tokenizer(tokenizer, bins).start
        return tokenizer, processor_from, CheckpointManifest(
            convention=options.convention, num_bins=bins, coord_start=start, order="sorted", prompt=options.prompt,
            min_pixels=budget[0], max_pixels=budget[1],
        )  # fmt: skip
    check_contract(
        where, prompt=options.prompt, convention=options.convention, min_pixels=budget[0], max_pixels=budget[1], keys={"prompt": "--prompt"}
    )
    vocab = CoordVocab.from_tokenizer(tokenizer, manifest.num_bins)
    if vocab.start != manifest.coord_start:
        raise VocabError(
            f"{where / CHECKPOINT_MANIFEST}: codec.coord_start: {manifest.coord_start}, but the tokenizer has <|coord_0|> at "
            f"{vocab.start}: tokenizer and weights are of different models"
        )
    return tokenizer, processor_from, manifest


def _check_rows(rows: int, manifest: CheckpointManifest, checkpoint: Path) -> None:
    end = manifest.coord_start + manifest.num_bins
    if end > rows:
        raise VocabError(f"{checkpoint}: the coordinate ids end at {end - 1}, the model has {rows} rows: run `coordexp vocab extend` on it")


def _sample_records(found: _Source, options: ExportOptions) -> list[Any]:
    from coordexp.data.records import read_records

    file = options.data or (None if found.run is None else found.run / "data" / "val.jsonl")
    if file is None:
        raise ConfigError(f"--verify: {found.checkpoint} belongs to no run: pass --data FILE.jsonl to compare logits on")
    records = list(read_records(file, limit=SAMPLES).records)
    if not records:
        raise ConfigError(f"--verify: {file} has no record to compare logits on")
    return records


def _samples(tokenizer: Any, processor_from: Path, manifest: CheckpointManifest, records: list[Any]) -> list[dict[str, Any]]:
    """Model inputs of prompt and answer, one sample each, no padding."""
    import torch

    from coordexp.data.template import IMAGE_TOKEN, ChatTemplate
    from coordexp.modeling.load import load_image_processor

    codec = CoordCodec(manifest.num_bins, manifest.convention)
    template = ChatTemplate(tokenizer, load_image_processor(processor_from), codec, manifest.prompt, manifest.order)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    samples = []
    for record in records:
        example = template.encode(record)
        ids = torch.tensor([example.input_ids])
        samples.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == image_id).long(),
                "pixel_values": example.pixel_values,
                "image_grid_thw": example.image_grid_thw,
            }
        )
    return samples


def _compare(
    trained: Streamed, folder: Path, processor_from: Path, tokenizer: Any, manifest: CheckpointManifest, records: list[Any], *, dtype: str,
    step: Callable[[], None],
) -> float:  # fmt: skip
    """Read the written folder anew, tokenizer and processor too, and return the largest difference of its logits.

    Raises:
        VocabError: other tokens, other pixels, or a difference over the tolerance.
    """
    import torch

    from coordexp.modeling.export import difference, logits
    from coordexp.modeling.load import load_tokenizer
    from coordexp.modeling.streamed import open_model

    samples = _samples(tokenizer, processor_from, manifest, records)
    again = _samples(load_tokenizer(folder), folder, manifest, records)
    for one, other in zip(samples, again, strict=True):
        for name in one:
            if not torch.equal(one[name], other[name]):
                raise VocabError(
                    f"verify: {name} of a sample differ when read with the exported tokenizer and processor: nothing is written"
                )
    written = open_model(folder)
    trained.start()
    written.start()
    worst = 0.0
    for inputs in again:
        before = logits(trained.model, inputs)
        step()
        worst = max(worst, difference(before, logits(written.model, inputs)))
        step()
    if worst > TOLERANCE:
        hint = f": {dtype} rounds the merged weights, pass --dtype float32" if dtype != "float32" else ""
        raise VocabError(f"verify: logits differ by {worst:.1e} of the largest, allowed is {TOLERANCE:.0e}{hint}; nothing is written")
    return worst
