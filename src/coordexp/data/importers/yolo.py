"""YOLO: images, and one ``.txt`` of labels an image.

Source: a data set yaml (``path``, ``train``, ``val``, ``test``, ``names``) or a folder with one; Darknet's ``obj.data`` or a folder with
it; or a folder of images and labels with ``classes.txt`` (``obj.names``, ``_darknet.labels``), whose folders train, valid and test are
the splits.

An image's labels are at the same place under ``labels`` instead of ``images`` (in any case), else beside the image, else in a folder
``labels`` beside the image's own. An image without labels is a background; a split without any is an error.

Convention: a line is ``class cx cy w h`` relative to the image's sides (0..1), or ``class x1 y1 x2 y2 x3 y3 ...``, an outline or an
oriented box. With ``kpt_shape`` in the yaml the box of a line is read and its key points are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import yaml

from coordexp.data.importers.base import Job, RawImage, RawObject, RawSplit, Unusable, brief, by_key, folder_split, id_text, split_name
from coordexp.data.importers.files import Head, text_of
from coordexp.data.importers.finding import ImageFinder, image_files, plain_name
from coordexp.data.importers.judging import number
from coordexp.data.yaml_text import PlainLoader, parse_yaml
from coordexp.errors import DataError

_SPLITS: Final = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_NAMES: Final = ("classes.txt", "obj.names", "_darknet.labels", "*.names", "names.txt", "labels.txt", "predefined_classes.txt")
_NOTHING: Final[tuple[Any, ...]] = (None, "", "~", "null", "Null", "NULL", [])
_LABELS: Final = ("labels", "label", "annotations", "txt")


class _TextLoader(PlainLoader):
    """Every value as it is written: a class can be called no, 007 or null. A key that stands twice is refused."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, Any] = {}
        for key, value in node.value:
            name, text = str(key.value), str(value.value)
            if name in seen and seen[name] != text:
                problem = f"expected a key once, got {name} as {brief(seen[name], 40)!r} and as {brief(text, 40)!r}"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[name] = text
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {}


def looks(head: Head) -> bool:
    """A data set yaml, Darknet's files, or a folder with one of them."""
    path = head.path
    if path.is_dir():
        return bool(_configs(path)) or bool(_name_files(path))
    return head.suffix in (".yaml", ".yml", ".data", ".names")


def read(job: Job) -> list[RawSplit]:
    """The splits of the source.

    Raises:
        DataError: no YOLO data set, or one that is broken; a split that is asked for and has no images.
        ConfigError: a split that is asked for and not named.
    """
    source = job.source
    if not source.exists():
        raise DataError(f"{source}: expected a YOLO data set yaml or a folder with one, got nothing there")
    found = [source] if source.is_file() else _configs(source)
    if len(found) > 1:
        shown = ", ".join(path.name for path in found)
        raise DataError(f"{source}: expected a data set yaml or a folder with one, got {len(found)} there ({shown}): give the yaml itself")
    if not found:
        return _read_plain(job)
    return _read_darknet(job, found[0]) if found[0].suffix == ".data" else _read_yaml(job, found[0])


def _configs(folder: Path) -> list[Path]:
    """The data set yamls of a folder, else Darknet's files."""
    yamls = sorted(path for pattern in ("*.yaml", "*.yml") for path in folder.glob(pattern))
    if len(yamls) > 1:
        likely = [path for path in yamls if path.stem in ("data", "dataset")]
        yamls = likely if len(likely) == 1 else yamls
    return yamls or sorted(folder.glob("*.data"))


def class_names(path: Path) -> tuple[dict[str, str], int]:
    """Names by class number, and how many numbers of key points a line has (0: none), of a data set yaml, ``obj.data``, a list of one name
    a line, or the folder with one of them.

    Raises:
        DataError: none of these, or one without names.
    """
    found = _configs(path) if path.is_dir() else [path]
    if path.is_dir() and not found:
        return _plain_names(path), 0
    if len(found) > 1 or not path.exists() or found[0].suffix.lower() not in (".yaml", ".yml", ".data", ".txt", ".names", ".labels"):
        raise DataError(f"{path}: expected names of classes, a data set yaml, obj.data or classes.txt, got something else: name that file")
    file = found[0]
    if file.suffix.lower() in (".yaml", ".yml"):
        content = _yaml_of(file)
        return _names(content.get("names"), file), _key_points(content.get("kpt_shape"), file)
    if file.suffix.lower() == ".data":
        return _darknet_names(file.parent.resolve(), _darknet_of(file), file), 0
    return _names(_lines(file), file), 0


def _key_points(shape: Any, path: Path) -> int:
    """Numbers of the key points of a line: their count times 2 or 3."""
    if shape in _NOTHING:
        return 0
    sides = [number(value) for value in shape] if isinstance(shape, list) else []
    if len(sides) != 2 or any(side is None or side < 1 or not side.is_integer() for side in sides):
        raise DataError(f"{path}: kpt_shape: expected two whole numbers, got {brief(shape)}")
    return int((sides[0] or 0) * (sides[1] or 0))


def _yaml_of(path: Path) -> dict[Any, Any]:
    try:
        content = parse_yaml(text_of(path, "a YOLO data set yaml"), _TextLoader)
    except ValueError as error:
        raise DataError(f"{path}: expected a YOLO data set yaml, got a file that fails with: {brief(error, 300)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a YOLO data set yaml with names and train, got {type(content).__name__}")
    return content


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in text_of(path).splitlines() if line.strip()]


def _read_yaml(job: Job, path: Path) -> list[RawSplit]:
    content = _yaml_of(path)
    names = _names(content.get("names"), path)
    root = _root(job, content.get("path"), path)
    entries = {name: next((content[key] for key in keys if content.get(key) not in _NOTHING), None) for name, keys in _SPLITS.items()}
    entries = {name: entry for name, entry in entries.items() if entry is not None}
    if not entries:
        raise DataError(f"{path}: expected train, val or test, got none of them")
    labels = _Labels(root, job.options.follow_links)
    splits = []
    for name in job.choose(entries):
        try:
            images = _images(job, entries[name], root, f"{path}: {name}")
        except Unusable as fault:
            if job.options.splits:
                raise DataError(str(fault)) from fault
            job.note(f"{fault}: left out")
            continue
        splits.append(_split(job, name, images, root, names, labels, points="kpt_shape" in content))
    if not splits:
        raise DataError(f"{path}: expected images of {' or '.join(entries)}, got none: {list(job.notes)[-1]}")
    return splits


def _split(
    job: Job, name: str, images: list[tuple[str, str]], root: Path, names: dict[str, str], labels: _Labels, *, points: bool = False
) -> RawSplit:
    reader = _Images(job, images, root, names, labels, points)
    return RawSplit(name, len(images), reader, (root,), unlabelled=partial(labels.hint, [name for _, name in images[:20]]))


def _names(names: Any, path: Path) -> dict[str, str]:
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    good = isinstance(pairs, dict) and pairs and all(isinstance(v, str) and v.strip() for v in pairs.values())
    if not good:
        raise DataError(f"{path}: names: expected a list of names or a map of numbers to names, got {brief(names)}")
    return {name: text.strip() for name, text in by_key(pairs.items(), "names", str(path)).items()}


def _root(job: Job, stated: Any, path: Path) -> Path:
    beside = path.parent.resolve()
    root = path.parent / str("." if stated in _NOTHING else stated)
    if not os.path.isdir(root):
        job.note(f"{path.name}: path: {brief(stated)!r} is not here; the folder of the yaml is read instead")
        return beside
    return root.resolve()


def _images(job: Job, entries: Any, root: Path, where: str) -> list[tuple[str, str]]:
    """Place and name of every image of a split.

    Raises:
        DataError: an entry that is no path, or leaves the data set.
        Unusable: nothing where an entry says.
    """
    found: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str) or "\0" in entry:
            raise DataError(f"{where}: expected a folder or a list file, got {brief(entry)}")
        target = _target(root, entry)
        if target is None:
            raise Unusable("no split folder", f"{where}: expected a folder or a list file, got {entry!r}, nothing at {root / entry}")
        if not target.resolve().is_relative_to(root) and not job.options.follow_links:
            raise DataError(f"{where}: expected a place inside {root}, got {entry!r}: --follow-links takes links that leave it")
        if target.is_dir():
            inner = target.relative_to(root).as_posix() if target.is_relative_to(root) else target.as_posix()
            found += [(name, name) for name in ((PurePosixPath(inner) / p).as_posix() for p in image_files(target, follow=True))]
        else:
            found += _listed(target)
    return found


def _target(root: Path, entry: str) -> Path | None:
    """What an entry of a yaml names. Exports of a widespread tool say ../train/images for train/images; training tools read them so."""
    plain = plain_name(entry)
    while True:
        if os.path.exists(root / plain):
            return root / plain
        if not plain.startswith("../"):
            return None
        plain = plain.removeprefix("../")


def _listed(path: Path) -> list[tuple[str, str]]:
    """The images of a list file, each with its line."""
    lines = text_of(path, "one image path a line").splitlines()
    return [(f"{path.name}:{n}", line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]


def _read_darknet(job: Job, path: Path) -> list[RawSplit]:
    """Darknet's ``obj.data``: ``names``, ``train`` and ``valid`` are files, written from the folder in which darknet was started."""
    root = path.parent.resolve()
    content = _darknet_of(path)
    classes = _darknet_names(root, content, path)
    lists = {split_name(key): content[key] for key in ("train", "valid", "val", "test") if content.get(key)}
    if not lists:
        raise DataError(f"{path}: expected train or valid, got {', '.join(content) or 'none of them'}")
    labels = _Labels(root, job.options.follow_links)
    splits = []
    for name in job.choose(lists):
        try:
            listed = _darknet_file(root, lists[name], f"{path}: {name}")
        except DataError as error:
            if job.options.splits or len(lists) == 1:
                raise
            job.note(f"{error}: left out")
            continue
        splits.append(_split(job, name, _listed(listed), root, classes, labels))
    if not splits:
        raise DataError(f"{path}: expected a list of images, got none: {list(job.notes)[-1]}")
    return splits


def _darknet_of(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in text_of(path).splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _darknet_names(root: Path, content: dict[str, str], path: Path) -> dict[str, str]:
    names = _darknet_file(root, content.get("names", "obj.names"), f"{path}: names")
    return _names(_lines(names), names)


def _darknet_file(root: Path, name: str, where: str) -> Path:
    parts = PurePosixPath(plain_name(name)).parts
    for start in range(len(parts)):
        path = root.joinpath(*parts[start:])
        if ".." not in parts[start:] and os.path.isfile(path) and path.resolve().is_relative_to(root):
            return path
    raise DataError(f"{where}: expected a file, got {name!r}, nothing of that name in {root}")


def _name_files(folder: Path) -> list[Path]:
    return sorted(
        {path for pattern in _NAMES for path in (*folder.glob(pattern), *folder.glob(f"*/{pattern}"), *folder.glob(f"*/*/{pattern}"))}
    )


def _plain_names(folder: Path) -> dict[str, str]:
    files = _name_files(folder)
    known = {tuple(names) for names in map(_lines, files) if names}
    if len(known) != 1:
        got = "none" if not known else f"several that differ ({', '.join(str(path.relative_to(folder)) for path in files)})"
        raise DataError(f"{folder}: expected a data set yaml, obj.data or one list of class names (classes.txt), got {got}")
    return _names(list(next(iter(known))), files[0])


def _read_plain(job: Job) -> list[RawSplit]:
    """A folder without a yaml: images, labels, and a file of class names somewhere."""
    root = job.source.resolve()
    names = _plain_names(job.source)
    splits: dict[str, list[tuple[str, str]]] = {}
    for path in image_files(root, follow=job.options.follow_links):
        splits.setdefault(folder_split(path.parts[:-1]) or "all", []).append((path.as_posix(), path.as_posix()))
    if not splits:
        raise DataError(f"{job.source}: expected images, got none")
    labels = _Labels(root, job.options.follow_links)
    return [_split(job, name, splits[name], root, names, labels) for name in job.choose(splits)]


class _Labels:
    """Where the labels of an image are."""

    def __init__(self, root: Path, follow: bool) -> None:
        self.root, self.follow = root, follow
        self._folders: dict[Path, dict[str, str]] = {}

    def find(self, name: PurePosixPath) -> Path | None:
        """The label file of ``root/name``, or None."""
        for candidate in self._candidates(name):
            path = self._real(candidate.with_suffix(".txt"))
            if path is not None and os.path.isfile(path):
                return path
        return None

    def _candidates(self, name: PurePosixPath) -> Iterator[PurePosixPath]:
        parts = name.parts
        at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i].lower() in ("images", "image", "img", "imgs")), None)
        if at is not None:
            yield from (PurePosixPath(*parts[:at], labels, *parts[at + 1 :]) for labels in _LABELS[:2])
        yield name
        yield from (name.parent / labels / name.name for labels in _LABELS)
        yield from (PurePosixPath(labels, *parts) for labels in _LABELS)
        yield from (name.parent.parent / labels / name.name for labels in _LABELS if len(parts) > 1)

    def _real(self, path: PurePosixPath) -> Path | None:
        """The path in the case in which it stands on the disk."""
        folder = self.root
        for part in path.parts:
            if part == "..":
                return None
            if folder not in self._folders:
                self._folders[folder] = {name.lower(): name for name in os.listdir(folder)} if folder.is_dir() else {}
            there = folder / part
            if not os.path.exists(there):
                if part.lower() not in self._folders[folder]:
                    return None
                there = folder / self._folders[folder][part.lower()]
            folder = there
        return folder

    def hint(self, names: Sequence[str]) -> str:
        """What to say where no image has labels: where files of their names are, if anywhere."""
        stems = {PurePosixPath(name).stem for name in names}
        near = next((path for path in sorted(self.root.rglob("*.txt")) if path.stem in stems), None)
        if near is not None:
            where = near.parent.relative_to(self.root).as_posix()
            return f"they are looked for beside the images and in labels for images, but lie in {where}: rename that folder to labels"
        first = next(iter(names), "")
        return f"looked for {PurePosixPath(first).stem}.txt beside {first} and in labels for images, and nowhere else in {self.root} either"


@dataclass(frozen=True)
class _Images:
    job: Job
    items: Sequence[tuple[str, str]]
    root: Path
    names: dict[str, str]
    labels: _Labels
    points: bool

    def __iter__(self) -> Iterator[RawImage | Unusable]:
        finder = ImageFinder((self.job.options.images or self.root,), self.job.options.follow_links)
        for where, name in self.items:
            try:
                found = finder.find((name,), where)
            except Unusable as fault:
                yield RawImage(where, (name,), self._lost(name, fault))
                continue
            link = found.path.relative_to(self.root) if found.path.is_relative_to(self.root) else Path(plain_name(name))
            path = self.labels.find(PurePosixPath(link.as_posix()))
            objects = [] if path is None else self._objects(path)
            yield RawImage(where, (name,), objects, labelled=path is not None)

    def _lost(self, name: str, fault: Unusable) -> list[RawObject | Unusable]:
        path = self.labels.find(PurePosixPath(plain_name(name))) if "\0" not in name else None
        return [] if path is None else self._objects(path)

    def _objects(self, path: Path) -> list[RawObject | Unusable]:
        shown = path.relative_to(self.root).as_posix()
        if not self.labels.follow and not path.resolve().is_relative_to(self.root):
            return [
                Unusable("unreadable", f"{shown}: expected labels inside {self.root}, got a link that leaves it (--follow-links takes it)")
            ]
        try:
            lines = text_of(path, "a text file of labels").splitlines()
        except DataError as error:
            return [Unusable("unreadable", f"{shown}: {str(error).partition(': ')[2]}")]
        return [self._object(line.split(), f"{shown}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]

    def _object(self, words: list[str], where: str) -> RawObject | Unusable:
        numbers = [number(word) for word in words]
        if any(value is None for value in numbers):
            return Unusable("not numbers", f"{where}: expected finite numbers, got {brief(' '.join(words))!r}")
        values = [value for value in numbers if value is not None]
        label = id_text(values[0])
        if label not in self.names:
            known = f"{next(iter(self.names))}..{list(self.names)[-1]}"
            return Unusable("unknown category", f"{where}: expected a class among {known}, got {words[0]}")
        name, values = self.names[label], values[1:]
        if len(values) == 4 or (self.points and len(values) > 4):
            return RawObject(where, values[:4], "cxcywh", "norm1", name)
        if len(values) == 5:
            return Unusable(
                "wrong count of numbers",
                f"{where}: expected class and 4 numbers, got 5: a score (then these are predictions) or an angle, which cannot be "
                "told apart",
            )
        if len(values) >= 6 and len(values) % 2 == 0:
            return RawObject(where, values, "outline", "norm1", name)
        got = len(values) + 1
        return Unusable(
            "wrong count of numbers", f"{where}: expected class and 4 numbers, or class and at least 3 points, got {got} numbers"
        )

