"""What every importer shares: drafts, the report, links, and the one loop that writes a data folder.

An importer is one function ``read(job) -> list[Split]``. A split has items and a ``convert`` that makes a
:class:`Draft` of one of them or raises :class:`DataError`, which drops it. Pixels of drafts are edges, as in records.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from coordexp.boxes import bounding_box
from coordexp.data.images import image_size
from coordexp.data.records import write_records
from coordexp.data.rows import IMPORT_FILE, geometry_problem, size_problem
from coordexp.data.staging import atomic_text, read_json, staged_folder
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import Geometry

Coords = Literal["absolute", "norm1000"]
COORDS: Final[tuple[Coords, ...]] = ("absolute", "norm1000")
# An edge this far outside is a rounding of the source and is moved onto the border, as a reported repair.
TOLERANCE_PX: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """``splits``: the names to import (all, if empty); for a single source file, the one name to write it under.

    ``images``: the folder of the images, where it is not the format's own. ``coords``: what the numbers of a format
    that has two conventions are. ``polygons``: take outlines instead of boxes where the source has one.
    ``copy``: copy images instead of linking them. ``on_invalid``: ``error`` stops at what cannot be imported.
    """

    splits: tuple[str, ...] = ()
    images: Path | None = None
    coords: Coords | None = None
    polygons: bool = False
    copy: bool = False
    on_invalid: Literal["error", "skip"] = "skip"

    def __post_init__(self) -> None:
        if self.on_invalid not in ("error", "skip"):
            raise ConfigError(f"on_invalid: expected 'error' or 'skip', got {self.on_invalid!r}")
        if self.coords is not None and self.coords not in COORDS:
            raise ConfigError(f"coords: expected one of {', '.join(COORDS)}, got {self.coords!r}")


@dataclass(frozen=True)
class ImportReport:
    """What was written (images by split, objects by class) and a line, naming file and place, for all that was not as it should be."""

    splits: dict[str, int]
    objects: int
    crowd: int
    classes: dict[str, int]
    warnings: tuple[str, ...]
    repaired: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A record to be: ``image`` is the file to link as ``images/<name>``, ``where`` its place in the source."""

    where: str
    image: Path
    name: str
    width: int
    height: int
    objects: list[dict[str, Any]]
    image_id: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """``count`` items, of which ``convert`` makes drafts."""

    name: str
    count: int
    items: Iterable[Any]
    convert: Callable[[Any], Draft]


@dataclass
class Job:
    """State of one import: takes notes, and stops at the first drop or warning if asked to."""

    source: Path
    options: ImportOptions
    warnings: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    roots: set[Path] = field(default_factory=set)
    _bases: dict[Path, Path] = field(default_factory=dict)

    def drop(self, line: str) -> None:
        """Note something that is left out."""
        self._stop(line)
        self.dropped.append(line)

    def warn(self, line: str) -> None:
        """Note something that is imported all the same."""
        self._stop(line)
        self.warnings.append(line)

    def _stop(self, line: str) -> None:
        if self.options.on_invalid == "error":
            raise _Stop(f"{line}: fix it, or leave it out with --on-invalid skip")

    def base(self, root: Path) -> Path:
        """``root`` resolved, once an import: it is asked for with every image."""
        if root not in self._bases:
            self._bases[root] = root.resolve()
        return self._bases[root]

    def image(self, root: Path, name: str, where: str) -> Path:
        """The image ``root/name``, which may not leave ``root``, not through a link either.

        Raises:
            DataError: a path that leaves it, or nothing there.
        """
        base = self.base(root)
        try:
            path = (base / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{where}: expected a usable image path, got {name[:80]!r}: {error}") from error
        if path == base or not path.is_relative_to(base):
            raise DataError(f"{where}: expected an image inside {root}, got {name[:200]!r}: name the folder that holds it with --images")
        self.roots.add(base)
        return path

    def size(self, path: Path, where: str, stated: tuple[Any, Any] = (None, None)) -> tuple[int, int]:
        """Upright size from the image's header; ``stated`` must agree where it says something.

        Raises:
            DataError: no usable image, or another size.
        """
        try:
            size = image_size(path)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        for key, value, actual in zip(("width", "height"), stated, size, strict=True):
            if value is not None and value != actual:
                hint = size_problem(size, *stated) if all(isinstance(v, int) for v in stated) else None
                swapped = ": count size and boxes in the upright picture" if hint and "swapped" in hint else ""
                raise DataError(f"{where}: {key}: expected the image's {actual} pixels, got {value}{swapped}")
        return size

    def to_pixels(self, values: Sequence[Any], size: tuple[int, int], coords: str, where: str) -> list[float]:
        """Pixels of numbers that are ``absolute``, or relative to the side: ``norm1000`` (0..1000) or ``norm1`` (0..1)."""
        for value in values:
            # The comparison is false for NaN and exact for integers beyond the range of a float.
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                raise DataError(f"{where}: expected finite numbers, got {str(list(values))[:120]}")
        scale = {"absolute": None, "norm1000": 1000, "norm1": 1}[coords]
        if scale is None:
            return [float(value) for value in values]
        return [value / scale * size[i % 2] for i, value in enumerate(values)]

    def geometry(self, geometry: Geometry, values: list[float], size: tuple[int, int], where: str) -> list[float]:
        """Checked pixels; what lies at most one pixel outside is moved onto the border and noted as repaired.

        Raises:
            DataError: an unusable geometry.
        """
        if geometry == "bbox_2d" and len(values) == 4 and (values[2] <= values[0] or values[3] <= values[1]):
            raise DataError(f"{where}: expected a box that extends in x and in y, got {_short(values)}")
        inside = [min(max(v, 0.0), float(size[i % 2])) for i, v in enumerate(values)]
        far = max((abs(a - b) for a, b in zip(values, inside, strict=True)), default=0.0)
        if 0 < far <= TOLERANCE_PX and geometry_problem(geometry, inside, *size) is None:
            self.repaired.append(f"{where}: {geometry}: moved onto the border of the {size[0]}x{size[1]} image, was {_short(values)}")
            values = inside
        problem = geometry_problem(geometry, values, *size)
        if problem:
            raise DataError(f"{where}: {problem}")
        return [int(v) if v.is_integer() else v for v in values]

    def collect(self, makers: Iterable[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
        """Objects of those makers that succeed; the others are dropped."""
        objects = []
        for make in makers:
            try:
                objects.append(make())
            except _Stop:
                raise
            except DataError as error:
                self.drop(str(error))
        return objects

    def label(self, text: Any, where: str) -> str:
        """A description: a string that is not empty.

        Raises:
            DataError: anything else.
        """
        if not isinstance(text, str) or not text.strip() or any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(f"{where}: expected a name, got {str(text)[:80]!r}")
        return text.strip()


class _Stop(DataError):
    """Ends an import whose ``on_invalid`` is ``error``."""


def write_import(
    job: Job, splits: Sequence[Split], out: Path, *, overwrite: bool, progress: Callable[[int, int], None] | None, format_name: str
) -> ImportReport:
    """Write ``out/<split>.jsonl``, ``out/images/`` and ``out/import.json``; ``out`` appears only when all is written.

    Raises:
        ConfigError: ``out`` is not empty (see ``overwrite``).
        DataError: a split without a usable image, or with ``on_invalid="error"`` the first problem.
    """
    splits = _wanted(job, splits)
    writer = _Writer(job, sum(split.count for split in splits), progress)
    counts: dict[str, int] = {}
    with staged_folder(Path(out), kind="data set", overwrite=overwrite, known=_imported) as folder:
        (folder / "images").mkdir()
        for split in splits:
            write_records(folder / f"{split.name}.jsonl", writer.rows(split, folder / "images"))
            counts[split.name] = writer.written
            if not writer.written:
                first = f": {job.dropped[0]}" if job.dropped else ""
                raise DataError(f"{job.source}: expected at least one usable image in split {split.name!r}, got none{first}")
        classes = dict(sorted(writer.classes.items()))
        notes = (tuple(job.warnings), tuple(job.repaired), tuple(job.dropped))
        report = ImportReport(counts, writer.classes.total(), writer.crowd, classes, *notes)
        roots = [] if job.options.copy else sorted(str(root) for root in job.roots)
        with atomic_text(folder / IMPORT_FILE) as file:
            summary = {"format": format_name, "source": str(job.source.resolve()), "image_roots": roots, **vars(report)}
            json.dump(summary, file, indent=1, ensure_ascii=False)
    return report


def _imported(folder: Path) -> bool:
    """Whether an import of before there were marks wrote this, and nothing was added."""
    summary = read_json(folder / IMPORT_FILE)
    names = [entry.name for entry in folder.iterdir()]
    ours = isinstance(summary, dict) and {"format", "source", "image_roots", "splits"} <= summary.keys()
    return ours and all(name in ("images", IMPORT_FILE) or name.removesuffix(".jsonl") in summary["splits"] for name in names)


def _wanted(job: Job, splits: Sequence[Split]) -> list[Split]:
    names = job.options.splits
    missing = [name for name in names if name not in {split.name for split in splits}]
    if missing:
        have = ", ".join(split.name for split in splits) or "none"
        raise ConfigError(f"--split: expected one of {have}, got {missing[0]!r}: {job.source} has no other")
    return [split for split in splits if not names or split.name in names]


class _Writer:
    """Turns drafts into rows, with their images linked."""

    def __init__(self, job: Job, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.job = job
        self.total, self.progress, self.done = total, progress, 0
        self.written = self.crowd = 0
        self.classes: Counter[str] = Counter()
        self._linked: dict[str, tuple[Path, str, str]] = {}

    def rows(self, split: Split, images: Path) -> Iterator[dict[str, Any]]:
        self.written = 0
        ids: dict[str, str] = {}
        for item in split.items:
            try:
                row = self._row(split.convert(item), split.name, images, ids)
            except _Stop:
                raise
            except DataError as error:
                self.job.drop(str(error))
            else:
                self.written += 1
                self.classes.update(o["desc"] for o in row["objects"])
                self.crowd += sum("iscrowd" in o for o in row["objects"])
                yield row
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _row(self, draft: Draft, split: str, images: Path, ids: dict[str, str]) -> dict[str, Any]:
        if draft.image_id in ids:
            raise DataError(f"{draft.where}: expected an image once, got {draft.image_id!r} again (first at {ids[draft.image_id]})")
        known = self._linked.get(draft.name)
        if known is not None and known[0] != draft.image:
            raise DataError(f"{draft.where}: expected one image named {draft.name}, got {draft.image} and {known[0]}")
        if known is None:
            _place(draft.image, images / draft.name, copy=self.job.options.copy)
            self._linked[draft.name] = (draft.image, split, draft.where)
        elif known[1] != split:
            # Evaluating on training images makes every number worthless; it must not pass unnoticed.
            self.job.warn(f"{draft.where}: expected an image in one split, {draft.name} is also in {known[1]} ({known[2]})")
        ids[draft.image_id] = draft.where
        size = {"width": draft.width, "height": draft.height}
        return {
            "images": [f"images/{draft.name}"], **size, "objects": draft.objects, "image_id": draft.image_id, "metadata": draft.metadata
        }  # fmt: skip


def _place(image: Path, target: Path, *, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if copy:
            shutil.copyfile(image, target)
        else:
            os.symlink(image, target)
    except OSError as error:
        advice = "check the file" if copy else "import with --copy where links are not possible"
        raise DataError(f"{image}: cannot be {'copied' if copy else 'linked'} to {target.name} ({error.strerror}): {advice}") from error


def _short(values: Sequence[float]) -> str:
    box = values if len(values) <= 4 else [*bounding_box(values)]
    shown = ", ".join(f"{v:g}" if math.isfinite(v) else str(v) for v in box)
    return f"[{shown}]" if len(values) <= 4 else f"{len(values) // 2} points within [{shown}]"
