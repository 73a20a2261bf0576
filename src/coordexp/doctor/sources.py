"""A data file or folder of any format, read by the readers of the imports: its boxes as numbers, and what an import would say of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.data.importers.base import ImportOptions, Job
from coordexp.data.importers.encoding import BoxFile
from coordexp.data.importers.files import head_of
from coordexp.data.importers.formats import FORMATS, detect, read_source
from coordexp.data.importers.probing import box_file, verdict
from coordexp.errors import DataError


@dataclass(frozen=True)
class Source:
    """``problem``: why an import would stop, or None; ``notes``: what its reader warns of."""

    boxes: BoxFile
    problem: str | None
    notes: tuple[str, ...]


def read_source_of(path: Path) -> Source:
    """Any source that an import reads, or records.

    Raises:
        DataError: a source that is missing or of no known format.
    """
    if not path.exists():
        raise DataError(f"{path}: expected a data file, got nothing there: name the file or folder of annotations")
    head = head_of(path)
    # Any rows can be looked at: what they lack is said.
    name = detect(head) or ("qwen" if head.row else None)
    if name is None:
        raise DataError(f"{path}: expected a file or folder of a format that `coordexp data import` reads, or records, got none of them")
    job = Job(path, ImportOptions())
    splits = read_source(name, job)
    boxes = box_file(splits, job.options, name)
    # Records are strict: `data validate` refuses each fault of them.
    problem = None if name == "records" else verdict(splits, job, coords="coords" in FORMATS[name].flags)
    return Source(boxes, problem, tuple(job.notes))
