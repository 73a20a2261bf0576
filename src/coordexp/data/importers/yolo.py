"""YOLO folders to record files: a data set yaml, images, and one ``.txt`` of labels an image.

Source: the yaml (``path``, ``train``, ``val``, ``test``, ``names``) or a folder that holds one. An image's labels are at the
same place under ``labels`` instead of ``images``; an image without a label file is a background, without objects.

Convention: a line is ``class cx cy w h``, relative to the image's sides (0..1), or ``class x1 y1 x2 y2 x3 y3 ...``, an outline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from coordexp.data.importers.base import Draft, Job, Split
from coordexp.errors import DataError

_SUFFIXES: Final = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def read_yolo(job: Job) -> list[Split]:
    """The splits that the yaml names.

    Raises:
        DataError: no such yaml, or one that is broken; a split folder that is missing or lies outside the data set.
    """
    path = _yaml_path(job.source)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a YOLO data set yaml, got a file that fails with: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a YOLO data set yaml with names and train, got {type(content).__name__}")
    if "kpt_shape" in content:
        raise DataError(f"{path}: kpt_shape: expected boxes or outlines, got a key point data set, which is not supported")
    names = _names(content.get("names"), path)
    root = _root(content.get("path"), path)
    reader = _Reader(job, root, names)
    splits = []
    for split in ("train", "val", "test"):
        if content.get(split):
            images = _images(content[split], root, f"{path}: {split}")
            splits.append(Split(split, len(images), images, reader.draft))
    if not splits:
        raise DataError(f"{path}: expected train, val or test, got none of them")
    return splits


def _yaml_path(source: Path) -> Path:
    if source.is_file():
        return source
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")]) if source.is_dir() else []
    if len(found) != 1:
        raise DataError(f"{source}: expected a data set yaml or a folder with one, got {len(found)} there: give the yaml itself")
    return found[0]


def _names(names: Any, path: Path) -> dict[int, str]:
    pairs = dict(enumerate(names)) if isinstance(names, list) else names
    if (
        not isinstance(pairs, dict)
        or not pairs
        or not all(isinstance(k, int) and isinstance(v, str) and v.strip() for k, v in pairs.items())
    ):
        raise DataError(f"{path}: names: expected a list of names or a map of numbers to names, got {str(names)[:80]}")
    return pairs


def _root(stated: Any, path: Path) -> Path:
    if stated is None:
        return path.parent.resolve()
    root = path.parent / str(stated)
    if not root.is_dir():
        raise DataError(f"{path}: path: expected the folder of the data set, got {stated!r}, nothing at {root}: correct or remove it")
    return root.resolve()


def _images(entries: Any, root: Path, where: str) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            raise DataError(f"{where}: expected a folder or a list file, got {str(entry)[:80]}")
        target = root / entry
        # Exports of a widespread tool say ../train/images for train/images; training tools read them so as well.
        if not target.exists() and entry.startswith("../"):
            target = root / entry.removeprefix("../")
        if not target.resolve().is_relative_to(root):
            raise DataError(f"{where}: expected a place inside {root}, got {entry!r}")
        if target.is_dir():
            found += [(str(p.relative_to(root)), p) for p in sorted(target.rglob("*")) if p.suffix.lower() in _SUFFIXES]
        elif target.is_file():
            try:
                lines = target.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise DataError(f"{target}: expected UTF-8 text with one image path a line, got {error.reason}") from error
            found += [(f"{target.name}:{n}", root / line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
        else:
            raise DataError(f"{where}: expected a folder or a list file, got {entry!r}, nothing at {target}")
    return found


@dataclass(frozen=True)
class _Reader:
    job: Job
    root: Path
    names: dict[int, str]

    def draft(self, item: tuple[str, Path]) -> Draft:
        where, listed = item
        image = self.job.image(self.root, str(listed), where)
        size = self.job.size(image, where)
        parts = list(image.relative_to(self.root).parts)
        if "images" in parts[:-1]:
            at = len(parts) - 2 - parts[:-1][::-1].index("images")
            labels = self.root.joinpath(*parts[:at], "labels", *parts[at + 1 :]).with_suffix(".txt")
        else:
            labels = image.with_suffix(".txt")
        objects = self.job.collect(self._makers(labels, size))
        name = Path(*parts[1:] if parts[0] == "images" and len(parts) > 1 else parts)
        return Draft(where, image, name.as_posix(), *size, objects, name.with_suffix("").as_posix())

    def _makers(self, labels: Path, size: tuple[int, int]) -> Iterator[Callable[[], dict[str, Any]]]:
        if not labels.exists():
            return
        shown = labels.relative_to(self.root).as_posix()
        if not labels.resolve().is_relative_to(self.root):
            raise DataError(f"{shown}: expected labels inside {self.root}, got a link that leaves it")
        try:
            lines = labels.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{shown}: expected a text file of labels, got one that fails with: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield partial(self._object, line.split(), size, f"{shown}:{number}")

    def _object(self, words: list[str], size: tuple[int, int], where: str) -> dict[str, Any]:
        try:
            label, numbers = float(words[0]), [float(word) for word in words[1:]]
        except ValueError as error:
            raise DataError(f"{where}: expected numbers, got {' '.join(words)[:80]!r}") from error
        if label not in self.names:
            raise DataError(f"{where}: expected a class among {min(self.names)}..{max(self.names)}, got {words[0]}")
        desc = self.job.label(self.names[int(label)], where)
        values = self.job.to_pixels(numbers, size, "norm1", where)
        if len(values) == 4:
            x, y, width, height = values
            box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            return {"desc": desc, "bbox_2d": self.job.geometry("bbox_2d", box, size, where)}
        if len(values) >= 6 and len(values) % 2 == 0:
            return {"desc": desc, "poly": self.job.geometry("poly", values, size, where)}
        raise DataError(f"{where}: expected class and 4 numbers, or class and at least 3 points, got {len(words)} numbers")
