"""The formats by name, and the one call that imports any of them. A format is its module and its line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from coordexp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from coordexp.data.importers.base import ImportOptions, Job, RawSplit
    from coordexp.data.importers.files import Head
    from coordexp.data.importers.writing import ImportReport, Progress


@dataclass(frozen=True)
class Format:
    """``about``: what the source is. ``flags``: those options of an import that not every format takes; ``unitless``: its numbers
    never say what they are, so ``coords`` must."""

    about: str
    flags: tuple[str, ...] = ()
    importable: bool = True
    unitless: bool = False


# The order is that in which a file is asked whether it is of a format: the most particular first.
FORMATS: Final[dict[str, Format]] = {
    "coco": Format("COCO or LVIS JSON, also as exported by Roboflow, FiftyOne, CVAT and Label Studio", ("polygons",)),
    "voc": Format("Pascal VOC XML, in any of its folder layouts", ("origin",)),
    "yolo": Format("YOLO labels with a data set yaml, Darknet's obj.data, or classes.txt"),
    "records": Format("records of this package", importable=False),
    "swift": Format("ms-swift JSONL", ("coords",)),
    "hf": Format("Hugging Face data sets: parquet, or an image folder with metadata.jsonl", ("layout", "coords")),
    "refcoco": Format("RefCOCO-like rows with a phrase and a box", ("layout",)),
    "labelstudio": Format("Label Studio JSON, full or JSON-MIN"),
    "createml": Format("CreateML JSON"),
    "datumaro": Format("Datumaro JSON"),
    "via": Format("VGG Image Annotator JSON"),
    "labelme": Format("labelme JSON, one file an image"),
    "paligemma": Format("PaliGemma JSONL with <loc0000> tokens"),
    "florence2": Format("Florence-2 JSONL with <loc_0> tokens"),
    "csv": Format("CSV with a box a row, and OpenImages", ("layout", "coords")),
    "qwen": Format("conversations of Qwen-VL, LLaMA-Factory, InternVL and MiniCPM, or rows with bbox_2d", ("coords",), unitless=True),
}


def module_of(name: str) -> Any:
    """The module of a format."""
    return import_module(f"coordexp.data.importers.{name}")


def read_source(name: str, job: Job) -> list[RawSplit]:
    """The raw splits of a source, nothing judged.

    Raises:
        ConfigError, DataError: a source that cannot be read as this format.
    """
    found: list[RawSplit] = module_of(name).read(job)
    return found


def detect(head: Head) -> str | None:
    """The format that a file or folder looks like, or None; a folder of rows is of its first file's."""
    from coordexp.data.importers.chat import split_files
    from coordexp.data.importers.files import head_of

    found = next((name for name in FORMATS if module_of(name).looks(head)), None)
    inside = [] if found or not head.path.is_dir() else list(split_files(head.path, (".jsonl", ".json")).values())
    return detect(head_of(inside[0])) if inside else found


def import_data(
    format_name: str,
    source: Path | Sequence[Path],
    out: Path,
    options: ImportOptions | None = None,
    *,
    overwrite: bool = False,
    add: bool = False,
    progress: Progress | None = None,
) -> ImportReport:
    """Import ``source`` as ``out/<split>.jsonl``, ``out/images/`` and ``out/import.json`` (the report, and where links may lead).

    Several sources are put together, those of one split in one file. Images are symbolic links to the source's files, or copies with
    ``options.copy``. ``out`` appears, or with ``add`` gains further splits, only when all is written. ``progress(done, total)`` counts
    images.

    Raises:
        ConfigError: an unknown format, options that do not fit, or an ``out`` in use (see ``overwrite`` and ``add``).
        DataError: a source that is not of the format, nothing usable in a split, or a large part of one left out without
            ``options.allow_loss``; with ``on_invalid="error"`` the first object or image that cannot be imported.
    """
    from coordexp.data.importers.base import ImportOptions, Job
    from coordexp.data.importers.judging import require_coords
    from coordexp.data.importers.writing import write_import

    names = [name for name, one in FORMATS.items() if one.importable]
    if format_name not in names:
        raise ConfigError(f"unknown data format {format_name!r}: expected one of {', '.join(names)}")
    options = options or ImportOptions()
    if FORMATS[format_name].unitless:
        require_coords(options, f"the format {format_name}")
    splits = []
    for path in [source] if isinstance(source, Path) else source:
        job = Job(Path(path), options)
        splits += [(job, split) for split in _explained(format_name, job)]
    if not splits:
        raise DataError(f"{job.source}: expected at least one image, got none")
    taken = "coords" in FORMATS[format_name].flags
    return write_import(job, splits, Path(out), overwrite=overwrite, add=add, progress=progress, format_name=format_name, coords=taken)


def _explained(name: str, job: Job) -> list[RawSplit]:
    """The splits; a source of another format is named."""
    from coordexp.data.importers.files import head_of

    try:
        return read_source(name, job)
    except DataError as error:
        other = detect(head_of(job.source)) if job.source.exists() else None
        if other is None or other == name:
            raise
        raise DataError(f"{error} (it looks like {other}: {FORMATS[other].about})") from error
