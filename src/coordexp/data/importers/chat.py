"""What the two chat formats share: sources of one row a sample, their images, and their coordinates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coordexp.data.importers.base import COORDS, Draft, Job, Split
from coordexp.data.rows import read_row
from coordexp.errors import ConfigError, DataError

# What makes a row's objects: (row, size of the image, place) -> objects.
Objects = Callable[[dict[str, Any], tuple[int, int], str], list[dict[str, Any]]]


def chat_splits(job: Job, objects: Objects) -> list[Split]:
    """Splits of a folder of ``{train,val,test}.jsonl`` (or ``.json``) files, or the one of a file.

    Raises:
        DataError: nothing there, or a ``.json`` file that is no list.
        ConfigError: several names for one file.
    """
    source, names = job.source, job.options.splits
    if source.is_file():
        if len(names) > 1:
            raise ConfigError(f"--split: expected one name for the one file {source}, got {len(names)}")
        files = {names[0] if names else source.stem: source}
    elif source.is_dir():
        found = [source / f"{name}{suffix}" for name in ("train", "val", "test") for suffix in (".jsonl", ".json")]
        files = {path.stem: path for path in found if path.is_file()}
    else:
        raise DataError(f"{source}: expected a JSONL file or a folder of them, got nothing there")
    if not files:
        raise DataError(f"{source}: expected train.jsonl, val.jsonl or test.jsonl, got none of them: give the file itself")
    return [_split(job, name, path, objects) for name, path in files.items() if not names or name in names]


def stated_coords(job: Job, row_says: str | None, where: str) -> str:
    """The convention of a row's numbers: what the row says, else what the user said, which may not contradict each other.

    Raises:
        ConfigError: nobody said.
        DataError: a contradiction.
    """
    user = job.options.coords
    if row_says is None and user is None:
        raise ConfigError(f"--coords: expected one of {', '.join(COORDS)}, got none: {where} does not say what its numbers are")
    if row_says is not None and user is not None and row_says != user:
        raise DataError(f"{where}: expected {user} coordinates, as --coords says, got a row that says {row_says}")
    return row_says or str(user)


def _split(job: Job, name: str, path: Path, objects: Objects) -> Split:
    root = job.options.images or path.parent

    def draft(item: tuple[str, bytes | dict[str, Any]]) -> Draft:
        where, content = item
        row = read_row(content, where) if isinstance(content, bytes) else content
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected one JSON object, got {str(row)[:80]}")
        image = job.image(root, _image_name(row, where), where)
        size = job.size(image, where, (row.get("width"), row.get("height")))
        inside = image.relative_to(root.resolve())
        # Several questions about one image are several samples: the place in the file tells them apart.
        number = where.rpartition(":")[2]
        return Draft(where, image, inside.as_posix(), *size, objects(row, size, where), f"{inside.with_suffix('').as_posix()}-{number}")

    if path.suffix == ".json":
        rows = _json_list(path)
        return Split(name, len(rows), [(f"{path.name}:{i}", row) for i, row in enumerate(rows, start=1)], draft)
    with path.open("rb") as file:
        count = sum(1 for line in file if line.strip())
    return Split(name, count, _Lines(path), draft)


class _Lines:
    """Numbered lines of a file, read again each time, so that no file is ever whole in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{self.path.name}:{number}", line


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of samples, got a file that fails with: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of samples, got {type(rows).__name__}")
    return rows


def _image_name(row: dict[str, Any], where: str) -> str:
    value = row.get("images", row.get("image"))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: image: expected the path of one image, got {str(value)[:80]}")
    return value
