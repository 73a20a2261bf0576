"""The one loop that turns raw splits into a data folder: images found, sized and linked, objects judged, losses counted."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coordexp.data.images import image_size, orientation
from coordexp.data.importers.base import ImportOptions, Job, RawImage, RawSplit, Unusable, brief, one_line
from coordexp.data.importers.finding import Found, ImageFinder
from coordexp.data.importers.judging import side
from coordexp.data.importers.probing import likely_cause
from coordexp.data.importers.tally import Stop, Tally
from coordexp.data.records import write_records
from coordexp.data.rows import IMPORT_FILE, size_problem
from coordexp.data.staging import atomic_text, link_or_copy, read_json, staged_folder
from coordexp.errors import ConfigError, DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportReport:
    """What was written (images by split, objects by class), what was left out (by split: objects and images of the source, those lost, by
    reason), and a line, naming file and place, for all that was not as it should be."""

    splits: dict[str, int]
    objects: int
    crowd: int
    difficult: int
    classes: dict[str, int]
    left_out: dict[str, dict[str, Any]]
    warnings: tuple[str, ...]
    repaired: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass
class _Notes:
    """Lines of one import; stops at the first loss or warning if asked to."""

    strict: bool
    warnings: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def repair(self, line: str) -> None:
        self.repaired.append(one_line(line))

    def drop(self, line: str) -> None:
        self._stop(line)
        self.dropped.append(line)

    def warn(self, line: str) -> None:
        self._stop(line)
        self.warnings.append(line)

    def _stop(self, line: str) -> None:
        if self.strict:
            raise Stop(f"{line}: fix it, or leave it out with --on-invalid skip")


def write_import(
    job: Job, splits: Sequence[tuple[Job, RawSplit]], out: Path, *, overwrite: bool, add: bool, progress: Progress | None, format_name: str,
    coords: bool,
) -> ImportReport:
    """Write ``out/<split>.jsonl``, ``out/images/`` and ``out/import.json``; ``out`` appears, or changes, only when all is written.
    ``coords``: whether the format takes ``--coords``, for advice.

    Raises:
        ConfigError: ``out`` is not empty (see ``overwrite`` and ``add``), or has a split of the name already.
        DataError: a split without a usable image or one that lost too much, or with ``on_invalid="error"`` the first problem.
    """
    splits = _with_images(job, splits)
    writer = _Writer(job.options, sum(split.count for _, split in splits), progress)
    names = list(dict.fromkeys(split.name for _, split in splits))
    counts: dict[str, int] = {}
    with staged_folder(Path(out), kind="data set", overwrite=overwrite, add=add, known=_imported) as folder:
        (folder / "images").mkdir(exist_ok=True)
        old = _old_imports(folder)
        writer.know(folder / "images")
        for name in names:
            if (folder / f"{name}.jsonl").exists():
                raise ConfigError(f"{out}: {name}.jsonl is there already: choose another --split, or import into another folder")
            parts = [(part, split) for part, split in splits if split.name == name]
            write_records(folder / f"{name}.jsonl", writer.rows(name, parts, folder / "images"))
            counts[name] = writer.written
            _judge_split(job, name, parts, writer, coords=coords)
        notes = writer.notes
        seen = [line for part in dict.fromkeys(id(part) for part, _ in splits) for p, _ in splits if id(p) == part for line in p.notes]
        report = ImportReport(
            counts, writer.classes.total(), writer.crowd, writer.difficult, dict(sorted(writer.classes.items())), writer.left_out,
            tuple(dict.fromkeys([*seen, *notes.warnings])), tuple(notes.repaired), tuple(notes.dropped),
        )  # fmt: skip
        roots = [] if job.options.copy else sorted(str(root) for root in writer.roots)
        options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(job.options).items()}
        sources = [str(path.resolve()) for path in dict.fromkeys(part.source for part, _ in splits)]
        entry = {"format": format_name, "sources": sources, "options": options, **vars(report)}
        with atomic_text(folder / IMPORT_FILE) as file:
            summary = {"image_roots": sorted({*old["image_roots"], *roots}), "imports": [*old["imports"], entry]}
            json.dump(summary, file, indent=1, ensure_ascii=False)
    return report


def _with_images(job: Job, splits: Sequence[tuple[Job, RawSplit]]) -> list[tuple[Job, RawSplit]]:
    """The splits that have an image, where not asked for by name: exports write empty ones."""
    kept = [(part, split) for part, split in splits if split.count or job.options.splits]
    if not kept:
        return list(splits)
    for part, split in splits:
        if not split.count and not job.options.splits:
            part.note(f"split {split.name!r} has no image: left out")
    return kept


def _imported(folder: Path) -> bool:
    """Whether an import of before there were marks wrote this, and nothing was added."""
    summary = read_json(folder / IMPORT_FILE)
    if not isinstance(summary, dict) or "image_roots" not in summary:
        return False
    # One import a folder at first, a list of them since.
    entries = summary.get("imports", [summary])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and {"format", "splits"} <= entry.keys() for entry in entries):
        return False
    splits = {name for entry in entries for name in entry["splits"]}
    return all(entry.name in ("images", IMPORT_FILE) or entry.name.removesuffix(".jsonl") in splits for entry in folder.iterdir())


def _judge_split(job: Job, name: str, parts: Sequence[tuple[Job, RawSplit]], writer: _Writer, *, coords: bool) -> None:
    tally, notes = writer.tally, writer.notes
    sources = " and ".join(dict.fromkeys(str(part.source) for part, _ in parts))

    def cause() -> str:
        return likely_cause([split for _, split in parts], job.options, parts[0][0].source, coords=coords)

    if not writer.written:
        why = f": {tally.first}" + (f". {cause()}" if tally.objects else "") if tally.first else ""
        raise DataError(f"{sources}: expected at least one usable image in split {name!r}, got none{why}")
    problem = tally.problem(parts[0][1].unlabelled, cause)
    if problem and not job.options.allow_loss:
        first = f" First: {tally.first}." if tally.first else ""
        raise DataError(f"{sources}: split {name!r}: {problem}.{first} Mend the source, or take what is left with --allow-loss")
    if problem:
        notes.warnings.append(f"split {name!r}: {problem}")
    elif tally.unlabelled:
        notes.warnings.append(
            f"split {name!r}: {tally.unlabelled} of {tally.images} images have no file of labels: imported without objects"
        )
    if tally.without_boxes:
        notes.warnings.append(f"split {name!r}: {tally.without_boxes} rows without any box left out")
    if not tally.objects:
        notes.warnings.append(f"split {name!r}: no image has an object")
    writer.left_out[name] = {
        "objects": tally.objects, "objects_lost": tally.objects_lost, "images": tally.images, "images_lost": tally.images_lost,
        "reasons": tally.by_reason,
    }  # fmt: skip


def _old_imports(folder: Path) -> dict[str, Any]:
    """The ``import.json`` of a folder that is added to."""
    path = folder / IMPORT_FILE
    if not path.is_file():
        return {"image_roots": [], "imports": []}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"image_roots": list(content["image_roots"]), "imports": list(content["imports"])}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path.name}: expected what an import writes, got {brief(error)}: import into another folder") from error


class _Writer:
    """Turns raw images into rows, with their images linked."""

    def __init__(self, options: ImportOptions, total: int, progress: Progress | None) -> None:
        self.options = options
        self.notes = _Notes(options.on_invalid == "error")
        self.total, self.progress, self.done = total, progress, 0
        self.written = self.crowd = self.difficult = 0
        self.classes: Counter[str] = Counter()
        self.left_out: dict[str, dict[str, Any]] = {}
        self.tally = Tally()
        self.roots: set[Path] = set()
        # By name under images/: the file; by file: the first split and place that used it.
        self._linked: dict[str, Path | bytes] = {}
        self._used: dict[Path, tuple[str, str]] = {}

    def know(self, images: Path) -> None:
        """Take in the images of a folder that is added to."""
        for path in (path for path in images.rglob("*") if not path.is_dir()):
            self._linked[path.relative_to(images).as_posix()] = path.resolve()

    def rows(self, name: str, parts: Sequence[tuple[Job, RawSplit]], images: Path) -> Iterator[dict[str, Any]]:
        """Rows of one output file."""
        self.written, self.tally = 0, Tally()
        ids: dict[str, tuple[str, str]] = {}
        for _, split in parts:
            roots = (self.options.images,) if self.options.images is not None else split.roots
            finder = ImageFinder(roots, self.options.follow_links)
            for fault in split.stray:
                self.notes.drop(str(fault))
                self.tally.lose_object(fault.reason, str(fault))
            for raw in split.images:
                self.tally.images += 1
                try:
                    row = self._row(raw, name, finder, images, ids)
                except Unusable as fault:
                    if not fault.empty:
                        self.notes.drop(str(fault))
                    self.tally.lose_image(fault)
                else:
                    self.written += 1
                    self.classes.update(o["desc"] for o in row["objects"])
                    self.crowd += sum("iscrowd" in o for o in row["objects"])
                    self.difficult += sum("difficult" in o for o in row["objects"])
                    yield row
                self.done += 1
                if self.progress is not None:
                    self.progress(self.done, max(self.total, self.done))

    def _row(
        self, raw: RawImage | Unusable, split: str, finder: ImageFinder, images: Path, ids: dict[str, tuple[str, str]]
    ) -> dict[str, Any]:
        if isinstance(raw, Unusable):
            raise raw
        self.tally.unlabelled += not raw.labelled
        try:
            found = finder.find(raw.names, raw.where) if raw.content is None else Found(Path(raw.names[0]), raw.names[0], Path())
            size = stated_size(found.path, raw) if raw.content is None else content_size(raw, images)
        except Unusable as fault:
            lost = sum(1 for _ in raw.objects)
            if lost:
                self.tally.lose_object(fault.reason, str(fault), lost)
            raise
        objects = self._objects(raw, size)
        name = self._place(raw, found, split, images)
        image_id = self._id(raw, name, ids)
        try:
            f"{name}{image_id}{json.dumps(raw.metadata, ensure_ascii=False) if raw.metadata else ''}".encode()
        except UnicodeEncodeError as error:
            raise Unusable("name not Unicode", f"{raw.where}: expected names in Unicode, got {name!a}: rename the file") from error
        return {
            "images": [f"images/{name}"], "width": size[0], "height": size[1], "objects": objects, "image_id": image_id,
            "metadata": raw.metadata,
        }  # fmt: skip

    def _objects(self, raw: RawImage, size: tuple[int, int]) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = []
        lost = 0
        for item in raw.objects:
            try:
                objects.append(self.tally.judge(item, size, self.options, self.options.coords, self.notes.repair))
            except Unusable as fault:
                lost += 1
                self.notes.drop(str(fault))
        if lost and not objects:
            # Without them it would be taught as an image on which there is nothing.
            raise Unusable("all objects left out", f"{raw.where}: expected an object that can be used, all {lost} are left out")
        return objects

    def _id(self, raw: RawImage, name: str, ids: dict[str, tuple[str, str]]) -> str:
        stem = os.path.splitext(name)[0]
        image_id = raw.image_id if raw.image_id and raw.image_id.strip() else f"{stem}-{raw.row}" if raw.row is not None else stem
        if image_id in ids and raw.row is None:
            if ids[image_id][0] == name:
                raise Unusable("image twice", f"{raw.where}: expected an image once, got {image_id!r} again (first at {ids[image_id][1]})")
            image_id = stem
        base, copies = image_id, 1
        while image_id in ids:
            copies += 1
            image_id = f"{base}-{copies}"
        ids[image_id] = (name, raw.where)
        return image_id

    def _place(self, raw: RawImage, found: Found, split: str, images: Path) -> str:
        # Of an image that is no file its hash: two of one name may be two images.
        source: Path | bytes = found.path if raw.content is None else hashlib.sha256(raw.content).digest()
        name = found.name
        if self._linked.get(name, source) != source:
            # Another image of this name, as in train/1.jpg and val/1.jpg.
            name, copies = f"{split}/{found.name}", 1
            while self._linked.get(name, source) != source:
                copies += 1
                name = f"{split}-{copies}/{found.name}"
        if name not in self._linked:
            target = images / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if raw.content is not None:
                target.write_bytes(raw.content)
            else:
                link_or_copy(found.path, target, copy=self.options.copy, command="import")
            self._linked[name] = source
        if isinstance(source, Path):
            self.roots.add(found.root)
            first = self._used.setdefault(source, (split, raw.where))
            if first[0] != split:
                # Evaluating on training images makes every number worthless; it must not pass unnoticed.
                self.notes.warn(f"{one_line(raw.where)}: expected an image in one split, {name} is also in {first[0]} ({first[1]})")
        return name


def stated_size(path: Path, raw: RawImage) -> tuple[int, int]:
    """Upright size from the image's header; what the source states must agree.

    Raises:
        Unusable: no usable image, or another size.
    """
    try:
        size = image_size(path)
    except DataError as error:
        raise Unusable("image unreadable", f"{raw.where}: {error}") from error
    if raw.stored and orientation(path) != 1:
        raise Unusable(
            "EXIF rotation", f"{raw.where}: expected an image without an EXIF rotation, which ms-swift ignores: turn the file and its boxes"
        )
    stated: list[int | None] = []
    for key, value in zip(("width", "height"), raw.size, strict=True):
        try:
            stated.append(side(value))
        except ValueError:
            raise Unusable("size unclear", f"{raw.where}: {key}: expected pixels, got {brief(value)}") from None
    for key, value, actual in zip(("width", "height"), stated, size, strict=True):
        if value is not None and value != actual:
            width, height = stated
            hint = size_problem(size, width, height) if width is not None and height is not None else None
            swapped = ": count size and boxes in the upright picture" if hint and "swapped" in hint else ""
            raise Unusable("image of another size", f"{raw.where}: {key}: expected the image's {actual} pixels, got {value}{swapped}")
    return size


def content_size(raw: RawImage, folder: Path) -> tuple[int, int]:
    """:func:`stated_size` of an image that is not a file."""
    path = folder / ".image"
    path.write_bytes(raw.content or b"")
    try:
        return stated_size(path, raw)
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
