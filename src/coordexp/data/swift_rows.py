"""Records to ms-swift's grounding JSONL, with the answer in coordinate tokens. PIL, numpy and the standard library only.

A row is ``{"messages": [user, assistant], "images": [path], "objects": {"ref": [...], "bbox": [...], "bbox_type": "real"}}``.
The assistant's text is :func:`coordexp.grammar.render`'s; ``objects`` holds the same objects in the same order in unrounded
pixels of the image file, from which ``coordexp.integrations.swift`` takes the continuous centres. A polygon is written as its
vertices, one ``bbox`` of two numbers each: ms-swift knows no outlines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from PIL import Image

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.answers import PHRASE, answer_objects, answer_values, ask, record_instances
from coordexp.data.images import load_image, orientation
from coordexp.data.options import DEFAULT_PROMPT, PHRASE_FIELD, AnswerGeometry
from coordexp.data.records import Record, read_records, write_records
from coordexp.data.staging import staged_folder
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import render

# What ms-swift 4.6 replaces wherever it stands in a message.
PLACEHOLDERS: Final = ("<image>", "<video>", "<audio>", "<bbox>", "<ref-object>", "<cot-process>", "<start-image>")
# Modes that every reader turns into the same RGB.
_PLAIN_MODES: Final = ("1", "L", "P", "RGB", "CMYK", "YCbCr")


def _placeholders(text: str) -> list[str]:
    return [token for token in PLACEHOLDERS if token in text]


@dataclass(frozen=True, kw_only=True)
class SwiftExportOptions:
    """``prompt``, ``geometry`` (see ``DataOptions``), ``convention`` and ``order`` must be those that the model is asked with later."""

    prompt: str = DEFAULT_PROMPT
    geometry: AnswerGeometry = "recorded"
    convention: str = "norm999"
    order: Literal["sorted", "random"] = "sorted"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"--convention: expected one of {', '.join(CONVENTIONS)}, got {self.convention}")
        if self.geometry not in get_args(AnswerGeometry):
            raise ConfigError(f"--geometry: expected one of {', '.join(get_args(AnswerGeometry))}, got {self.geometry}")
        if self.order not in ("sorted", "random"):
            raise ConfigError(f"--order: expected sorted or random, got {self.order}")
        held = _placeholders(self.prompt)
        if held or not self.prompt.strip():
            raise ConfigError(f"--prompt: expected plain text, got {self.prompt!r}: the image's place is added, and ms-swift reads {held}")


@dataclass(frozen=True)
class SwiftExport:
    """``splits``: rows by file; ``crowd``: crowd regions and difficult objects, left out; ``adjusted``: boxes kept open by a bin;
    ``copied``: images that had to be written anew; ``unasked``: records with a phrase that the prompt does not ask for."""

    splits: dict[str, int]
    objects: int
    crowd: int
    adjusted: int
    copied: int
    unasked: int


def swift_row(record: Record, codec: CoordCodec, options: SwiftExportOptions, image: Path) -> tuple[dict[str, Any], int]:
    """The row of a record, and how many boxes had to be kept open.

    Raises:
        DataError: a description or phrase with something in it that ms-swift would replace.
    """
    instances, adjusted = record_instances(record, codec, geometry=options.geometry, order=options.order, seed=options.seed)
    question = ask(options.prompt, record)
    if _placeholders(question):
        raise DataError(f"{record.source}: metadata.phrase: expected plain text, got {question!r}: ms-swift would replace a part of it")
    refs: list[str] = []
    boxes: list[list[float]] = []
    for item in answer_objects(record, geometry=options.geometry, order=options.order, seed=options.seed):
        held = _placeholders(item.desc)
        if held:
            raise DataError(f"{record.source}: desc: expected plain text, got {item.desc!r}: ms-swift would replace {held[0]}")
        values = [int(v) if v.is_integer() else v for v in answer_values(item)]
        parts = [values] if item.geometry == "bbox_2d" else [values[i : i + 2] for i in range(0, len(values), 2)]
        refs += [item.desc] * len(parts)
        boxes += parts
    messages = [
        {"role": "user", "content": f"<image>{question}"},
        {"role": "assistant", "content": render(instances).text},
    ]
    return {"messages": messages, "images": [str(image)], "objects": {"ref": refs, "bbox": boxes, "bbox_type": "real"}}, adjusted


def export_swift(
    files: Sequence[Path],
    out: Path,
    options: SwiftExportOptions,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SwiftExport:
    """Write ``out/<name>.jsonl`` for every record file; ``out`` appears only when all is written.

    Image paths are absolute: ms-swift takes relative ones from its working directory. An image that ms-swift would read
    otherwise than this package (an EXIF rotation, transparency, 16 bits) is written anew under ``out/images``.

    Raises:
        ConfigError: two files of one name, or an ``out`` in use.
        DataError: a record or image that cannot be used.
    """
    names = [path.stem for path in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"expected record files of different names, got {twice[0]}.jsonl twice: export them into two folders")
    codec = CoordCodec(CONVENTIONS[options.convention].bins, options.convention)
    read = {path.stem: read_records(path).records for path in files}
    writer = _Writer(codec, options, out.resolve(), sum(len(records) for records in read.values()), progress)
    with staged_folder(out, kind="set of ms-swift rows", overwrite=overwrite) as folder:
        for name, records in read.items():
            write_records(folder / f"{name}.jsonl", writer.rows(records, folder / "images"))
    kept = [item for records in read.values() for record in records for item in record.objects]
    crowd = sum(not item.taught for item in kept)
    phrases = 0 if PHRASE_FIELD in options.prompt else sum(PHRASE in r.metadata for records in read.values() for r in records)
    rows = {name: len(records) for name, records in read.items()}
    return SwiftExport(rows, len(kept) - crowd, crowd, writer.adjusted, writer.copied, phrases)


class _Writer:
    """Makes rows, and copies of the images that need one."""

    def __init__(
        self, codec: CoordCodec, options: SwiftExportOptions, out: Path, total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.codec, self.options, self.out = codec, options, out
        self.total, self.progress, self.done = total, progress, 0
        self.adjusted = self.copied = 0

    def rows(self, records: Sequence[Record], images: Path) -> Iterator[dict[str, Any]]:
        for record in records:
            image = record.image
            if not _reads_alike(image):
                images.mkdir(exist_ok=True)
                self.copied += 1
                name = f"{self.copied:06d}.png"
                load_image(image).save(images / name)
                image = self.out / "images" / name
            row, adjusted = swift_row(record, self.codec, self.options, image)
            self.adjusted += adjusted
            yield row
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)


def _reads_alike(path: Path) -> bool:
    """Whether ``Image.open(path).convert("RGB")``, which is what ms-swift does, gives the pixels of :func:`load_image`."""
    if orientation(path) != 1:
        return False
    with Image.open(path) as image:
        return image.mode in _PLAIN_MODES and "transparency" not in image.info
