"""The formats by name, and the one call that imports any of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from coordexp.data.importers.base import ImportOptions, ImportReport, Job, Split, write_import
from coordexp.data.importers.coco import read_coco
from coordexp.data.importers.qwen import read_qwen
from coordexp.data.importers.swift import read_swift
from coordexp.data.importers.voc import read_voc
from coordexp.data.importers.yolo import read_yolo
from coordexp.errors import ConfigError, DataError

FORMATS: Final[dict[str, Callable[[Job], list[Split]]]] = {
    "coco": read_coco,
    "voc": read_voc,
    "yolo": read_yolo,
    "swift": read_swift,
    "qwen": read_qwen,
}


def import_data(
    format_name: str,
    source: Path,
    out: Path,
    options: ImportOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Import ``source`` as ``out/<split>.jsonl``, ``out/images/`` and ``out/import.json`` (the report, and where links may lead).

    Images are symbolic links to the source's files, or copies with ``options.copy``. ``out`` appears only when all
    is written. ``progress(done, total)`` counts images.

    Raises:
        ConfigError: an unknown format, options that do not fit, or an ``out`` in use (see ``overwrite``).
        DataError: a source that is not of the format, or nothing usable in a split; with ``on_invalid="error"`` the
            first object or image that cannot be imported.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"unknown data format {format_name!r}: expected one of {', '.join(FORMATS)}")
    job = Job(Path(source), options or ImportOptions())
    root = job.options.images
    if root is not None and not root.is_dir():
        raise DataError(f"--images: expected a folder, got nothing at {root}")
    splits = FORMATS[format_name](job)
    return write_import(job, splits, Path(out), overwrite=overwrite, progress=progress, format_name=format_name)
