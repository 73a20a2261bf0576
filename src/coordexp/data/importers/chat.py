"""What formats of one row a sample share: files and splits, and the one image of a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Job, RawImage, RawObject, RawSplit, Unusable, brief, folder_split, split_name
from coordexp.data.importers.files import json_list, rows_of
from coordexp.errors import DataError

Rows = Iterable[tuple[str, dict[str, Any] | Unusable]]
# What makes a row's objects and metadata: (row, place).
Objects = Callable[[dict[str, Any], str], tuple[Iterable[RawObject | Unusable], dict[str, Any]]]
_IMAGES: Final = ("images", "image", "image_path", "img_path", "img", "file_name", "image_file", "filename")
_IMG_TAG: Final = re.compile(r"<img>([^<]+)</img>")
_SPLIT_WORD: Final = re.compile(r"(?:^|[._-])(train|training|val|valid|validation|test)(?:[._-]|$)", re.IGNORECASE)


def chat_splits(job: Job, objects: Objects, *, stored: bool = False) -> list[RawSplit]:
    """Splits of a folder of JSONL or JSON files, or the one of a file.

    Raises:
        DataError: nothing there, or a ``.json`` file that is no JSON.
        ConfigError: several names for one file, or a split that is not there.
    """
    source = job.source
    root = source.parent if source.is_file() else source
    if source.is_file():
        files = {job.file_split(source.stem): source}
    elif source.is_dir():
        files = split_files(source, (".jsonl", ".json"))
        if not files:
            raise DataError(f"{source}: expected train.jsonl, val.jsonl or test.jsonl, got none of them: give the file itself")
    else:
        raise DataError(f"{source}: expected a JSONL file or a folder of them, got nothing there")
    kept = set(files) if source.is_file() else set(job.choose(files))
    return [_split(name, path, objects, tuple({path.parent: 0, root: 0}), stored=stored) for name, path in files.items() if name in kept]


def split_files(folder: Path, suffixes: tuple[str, ...], test: Callable[[Path], bool] | None = None) -> dict[str, Path]:
    """The files of a folder (those that pass ``test``) by the split that they, or the folder they are in, name; the first suffix counts
    first. Where none names one, the only file there."""
    found: dict[str, Path] = {}
    every: list[Path] = []
    for suffix in suffixes:
        for path in sorted([*folder.glob(f"*{suffix}"), *folder.glob(f"*/*{suffix}")]):
            if test is not None and not test(path):
                continue
            every.append(path)
            word = _SPLIT_WORD.search(path.stem)
            name = folder_split(path.relative_to(folder).parts[:-1]) or (split_name(word[1]) if word else None)
            if name is not None:
                found.setdefault(name, path)
    if not found and len(every) == 1:
        found = {every[0].stem: every[0]}
    usual = ("train", "val", "test")
    return dict(sorted(found.items(), key=lambda item: usual.index(item[0]) if item[0] in usual else len(usual)))


def json_splits(job: Job, what: str, test: Callable[[Path], bool], suffixes: tuple[str, ...] = (".json",)) -> dict[str, Path]:
    """The files of a source that holds one file a split.

    Raises:
        DataError: none there.
        ConfigError: several names for one file, or a split that is not there.
    """
    source = job.source
    if source.is_file():
        word = _SPLIT_WORD.search(source.stem)
        return {job.file_split(split_name(word[1]) if word else source.stem): source}
    if not source.is_dir():
        raise DataError(f"{source}: expected {what}, got nothing there")
    files = split_files(source, suffixes, test)
    if not files:
        raise DataError(f"{source}: expected {what}, got none there: give the file itself")
    kept = job.choose(files)
    return {name: path for name, path in files.items() if name in kept}


def roots_beside(job: Job, path: Path, split: str) -> tuple[Path, ...]:
    """Folders in which the images of a file of annotations usually lie."""
    folder = path.parent
    base = folder.parent if folder.name.lower() in ("annotations", "annotation", "labels", "json") else folder
    inner = [base / "images" / split, base / split, base / "images", base / "data", base]
    return tuple(dict.fromkeys([folder, *inner, *([job.source] if job.source.is_dir() else [])]))


def _split(name: str, path: Path, objects: Objects, roots: tuple[Path, ...], *, stored: bool) -> RawSplit:
    if path.suffix.lower() == ".json":
        rows = json_list(path)
        count = len(rows)
    else:
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    return RawSplit(name, count, _Samples(path, objects, stored), roots)


@dataclass(frozen=True)
class _Samples:
    """The samples of a file, read again each time, so that no file is ever whole in memory."""

    path: Path
    objects: Objects
    stored: bool

    def __iter__(self) -> Iterator[RawImage | Unusable]:
        for where, row in rows_of(self.path):
            yield row if isinstance(row, Unusable) else self._sample(where, row)

    def _sample(self, where: str, row: dict[str, Any]) -> RawImage | Unusable:
        try:
            name = image_name(row, where)
            objects, metadata = self.objects(row, where)
        except Unusable as fault:
            return fault
        # Several questions about one image are several samples: the place in the file tells them apart.
        return RawImage(
            where, (name,), objects, row=where.rpartition(":")[2], size=(row.get("width"), row.get("height")), metadata=metadata,
            stored=self.stored,
        )  # fmt: skip


def image_name(row: dict[str, Any], where: str) -> str:
    """The one image that a row names.

    Raises:
        Unusable: none, or several.
    """
    value = next((row[key] for key in _IMAGES if row.get(key) not in (None, [], "")), None)
    if value is None:
        texts = [text for _, text in turns_of(row)]
        value = [part for part in _content_images(row)] or [name for text in texts for name in _IMG_TAG.findall(text)]
        if not value:
            raise Unusable("no image named", f"{where}: image: expected the path of one image, got none", empty=bool(texts))
    if isinstance(value, dict) and not isinstance(value.get("path"), str) and len(value) == 1:
        value = next(iter(value.values()))
    if isinstance(value, list) and len(set(map(str, value))) == 1 and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in ("path", "image", "url", "file_name") if isinstance(value.get(key), str)), value)
    if not isinstance(value, str) or not value.strip():
        raise Unusable("not one image", f"{where}: image: expected the path of one image, got {brief(value)}")
    return value


def _content_images(row: dict[str, Any]) -> Iterator[Any]:
    turns = row.get("messages", row.get("conversations"))
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and ("image" in part or "image_url" in part):
                yield part.get("image", part.get("image_url"))


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """``(role, text)`` of every turn; ``role`` is ``assistant`` for the model's."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        pairs = (("user", ("instruction", "query", "prompt", "question")), ("assistant", ("output", "response", "answer")))
        return [(role, row[key]) for role, keys in pairs for key in keys if isinstance(row.get(key), str)]
    found = []
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        role = str(turn.get("from", turn.get("role", ""))).lower()
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list):
            text = " ".join(part["text"] for part in text if isinstance(part, dict) and isinstance(part.get("text"), str))
        if isinstance(text, str):
            found.append(("assistant" if role in ("gpt", "assistant", "model", "bot") else role or "user", text))
    return found
