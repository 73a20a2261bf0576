"""How long the samples of an experiment are, and the largest batches they can make."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from coordexp.config.schema import ExperimentConfig
from coordexp.data.answers import ask
from coordexp.data.packing import plan_packs
from coordexp.data.records import Record, read_records
from coordexp.data.template import ChatTemplate
from coordexp.grammar import ROLE_CODES
from coordexp.modeling.dry import Sample
from coordexp.modeling.load import load_image_processor, load_tokenizer
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.extend import add_coord_tokens

# Made to see how long answers are, where the scenes of the run are not there yet.
SCENES: Final = 200
# Of a larger file so many records are measured, and so many of those that look longest.
MOST_RECORDS: Final = 20_000
LONGEST: Final = 64


@dataclass(frozen=True)
class Length:
    """A record (``source``: its file and line) as the model sees it: tokens beside the picture, how many of them are supervised, size of
    the picture in pixels."""

    source: str
    text: int
    supervised: int
    width: int
    height: int


@dataclass(frozen=True)
class Lengths:
    """Of the training and the validation records; ``samples`` is the size of the training split, ``notes`` say what was estimated."""

    train: tuple[Length, ...]
    val: tuple[Length, ...]
    samples: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """``rows`` of samples (packs hold several), and how many of their positions are supervised."""

    rows: tuple[tuple[Sample, ...], ...]
    supervised: int

    @property
    def positions(self) -> int:
        """Padding included."""
        return len(self.rows) * self.longest

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(sum(sample.tokens for sample in row) for row in self.rows)


@dataclass(frozen=True)
class Workload:
    """The largest batch of training and of evaluation; ``units`` are the rows of an epoch, ``tokens`` the mean length of one."""

    train: Batch
    evaluation: Batch
    units: int
    tokens: float


@dataclass(frozen=True)
class Reader:
    """Tokenizer and image processor of the model that will be trained, coordinate tokens included."""

    tokenizer: Any
    vocab: CoordVocab

    @staticmethod
    def of(config: ExperimentConfig, folder: Path | None) -> Reader:
        """Of the folder, or of the tiny model of the configuration."""
        from coordexp.modeling.tiny import train_tokenizer

        tokenizer = train_tokenizer(config.model.tiny.bpe_size) if folder is None else load_tokenizer(folder)
        vocab = add_coord_tokens(tokenizer) if config.vocab.extend else CoordVocab.from_tokenizer(tokenizer)
        return Reader(tokenizer, vocab)


def image_processor(config: ExperimentConfig, folder: Path | None) -> Any:
    """The image processor with the configuration's size budget."""
    from coordexp.modeling.tiny import write_processor_files

    budget = {"min_pixels": config.model.min_pixels, "max_pixels": config.model.max_pixels}
    if folder is not None:
        return load_image_processor(folder, **budget)
    with tempfile.TemporaryDirectory(prefix="coordexp-plan-") as name:
        write_processor_files(Path(name), config.model.tiny)
        return load_image_processor(Path(name), **budget)


def measure(
    config: ExperimentConfig, reader: Reader, records: tuple[Sequence[Record], Sequence[Record]] | None = None, most: int = MOST_RECORDS
) -> Lengths:
    """Lengths of the training and validation ``records``, by default those of the configuration's data; of more than ``most`` a part.

    Raises:
        CoordexpError: data that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="coordexp-plan-") as scratch:
        notes: list[str] = []
        samples = None
        if records is None:
            folder, told, samples = _data(config, Path(scratch))
            notes += told
            records = (_read(config, folder, "train"), _read(config, folder, "val"))
        train, val = records
        if len(train) > most:
            notes.append(f"lengths of about {most:,} of {len(train):,} training records, those with the most text among them")
        looked_at, held_out = (_lengths(config, reader, _chosen(split, most)) for split in (train, val))
        return Lengths(looked_at, held_out, samples or len(train), tuple(notes))


def _chosen(records: Sequence[Record], most: int) -> Sequence[Record]:
    """All, or ``most`` evenly spaced ones and those that look longest: by characters and values of their objects, by their picture."""
    if len(records) <= most:
        return records
    even = range(0, len(records), -(-len(records) // most))
    text = sorted(range(len(records)), key=lambda i: -sum(len(o.desc) + 8 * len(o.values) for o in records[i].objects))
    area = sorted(range(len(records)), key=lambda i: -records[i].width * records[i].height)
    return [records[i] for i in sorted({*even, *text[:LONGEST], *area[:LONGEST]})]


def _data(config: ExperimentConfig, scratch: Path) -> tuple[Path, list[str], int | None]:
    """Folder with record files, what is to be said about them, and the size of the training split where it is not theirs."""
    data = config.data
    if data.kind == "synth":
        from coordexp.data.synthetic import write_scenes

        made = min(data.synth.train, SCENES)
        write_scenes(scratch / "data", replace(data.synth, train=made, val=min(data.synth.val, SCENES), test=1))
        note = f"the scenes do not exist yet: lengths are those of the first {made} of {data.synth.train:,}"
        return scratch / "data", [note] if made < data.synth.train else [], min(data.synth.train, data.max_train or data.synth.train)
    assert data.source is not None
    if data.kind == "voc":
        from coordexp.data.importers.base import ImportOptions
        from coordexp.data.importers.formats import import_data

        import_data("voc", Path(data.source), scratch / "data", ImportOptions(on_invalid=data.on_invalid))
        return scratch / "data", [], None
    return Path(data.source), [], None


def _read(config: ExperimentConfig, folder: Path, split: str) -> Sequence[Record]:
    limit = config.data.max_train if split == "train" else config.data.max_val
    return read_records(folder / f"{split}.jsonl", on_invalid=config.data.on_invalid, limit=limit, check_images=False).records


def _lengths(config: ExperimentConfig, reader: Reader, records: Sequence[Record]) -> tuple[Length, ...]:
    data = config.data
    template = ChatTemplate(
        reader.tokenizer, _OnePlaceholder(), prompt=data.prompt, order=data.order, seed=config.seed, geometry=data.geometry
    )
    found = []
    for record in records:
        encoded = template.encode_answer(ask(data.prompt, record), template.instances(record)[0], torch.tensor([[1, 1, 1]]))
        supervised = sum(role != ROLE_CODES["none"] for role in encoded["roles"])
        found.append(Length(record.source, len(encoded["input_ids"]) - 1, supervised, record.width, record.height))
    return tuple(found)


class _OnePlaceholder:
    """Stands where a template has its image processor: every picture is one token, which the caller takes off."""

    merge_size = 1


def workload(config: ExperimentConfig, lengths: Lengths, processor: Any) -> Workload:
    """The largest batches: rows with the most tokens, those with the most patches first among equals."""
    train, evaluation = _rows(config, lengths.train, processor), _rows(config, lengths.val, processor)
    return Workload(
        train=_largest(train, config.train.per_device_train_batch_size),
        evaluation=_largest(evaluation, config.train.per_device_eval_batch_size),
        units=round(len(train) * lengths.samples / len(lengths.train)),
        tokens=sum(sample.tokens for row in train for sample, _ in row) / len(train),
    )


def _rows(config: ExperimentConfig, lengths: Sequence[Length], processor: Any) -> list[list[tuple[Sample, int]]]:
    """Rows of (sample, supervised positions): a sample each, or packs."""
    area = int(processor.merge_size) ** 2
    patches = [processor.get_number_of_image_patches(one.height, one.width) for one in lengths]
    samples = [
        (Sample(one.text + count // area, count // area, count), one.supervised) for one, count in zip(lengths, patches, strict=True)
    ]
    packing = config.data.packing
    if not packing.enabled:
        return [[one] for one in samples]
    names = [one.source for one in lengths]
    counts = [sample.tokens for sample, _ in samples]
    plan = plan_packs(counts, length=packing.length, seed=config.seed, on_overlong=packing.on_overlong, names=names, inputs={})
    return [[samples[i] for i in pack] for pack in plan.packs]


def _largest(rows: list[list[tuple[Sample, int]]], size: int) -> Batch:
    chosen = sorted(rows, key=lambda row: (sum(s.tokens for s, _ in row), sum(s.patches for s, _ in row)), reverse=True)[:size]
    return Batch(tuple(tuple(sample for sample, _ in row) for row in chosen), sum(count for row in chosen for _, count in row))
