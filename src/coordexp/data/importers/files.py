"""Reading text, JSON and XML of unknown origin: encodings, broken files, and one line a row. Every failure is a DataError in one line."""

from __future__ import annotations

import codecs
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from coordexp.data.importers.base import Unusable, brief
from coordexp.data.rows import read_row
from coordexp.errors import DataError

_MARKS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DECLARED: Final = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"'][^>]*\?>")
_DECLARATION: Final = re.compile(r"^\s*<\?xml[^>]*\?>")


def text_of(path: Path, what: str = "a text file") -> str:
    """The file as text: UTF-8, or UTF-16 with its mark.

    Raises:
        DataError: another encoding, or a file that cannot be read.
    """
    try:
        data = path.read_bytes()
        return data.decode(next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected {what} in UTF-8, got one that fails with: {brief(error)}") from error


def json_of(path: Path, what: str) -> Any:
    """The file as one JSON value. ``NaN`` and ``Infinity`` are read: it is the single number that is judged.

    Raises:
        DataError: no JSON.
    """
    text = text_of(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected {what}, got a file that fails with: {brief(error)}") from error


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """``(file:line, row)`` of JSONL, or of a JSON list where the name ends in ``.json``; what is no object is Unusable."""
    if path.suffix.lower() == ".json":
        content = json_list(path)
        for number, row in enumerate(content, start=1):
            where = f"{path.name}:{number}"
            yield where, row if isinstance(row, dict) else Unusable("unreadable", f"{where}: expected one JSON object, got {brief(row)}")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"{path.name}:{number}", _row(line, f"{path.name}:{number}")


def json_list(path: Path) -> list[Any]:
    """The rows of a ``.json`` file: a list, one object, or, as some tools write it, JSONL in spite of its name.

    Raises:
        DataError: no JSON.
    """
    text = text_of(path, "a JSON list of samples")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
            raise DataError(f"{path}: expected a JSON list of samples, got a file that fails with: {brief(error)}") from error
        rows = [_row(line.encode(), f"{path.name}:{i}") for i, line in enumerate(lines, start=1)]
        return [row for row in rows if isinstance(row, dict)]
    if isinstance(content, dict):
        return [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a JSON list of samples, got {type(content).__name__}")
    return content


def _row(line: bytes, where: str) -> dict[str, Any] | Unusable:
    try:
        return read_row(line, where)
    except DataError as error:
        return Unusable("unreadable", str(error))


class _PlainTree(ET.TreeBuilder):
    """Refuses a document type before any entity of it can be expanded or fetched."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError("expected plain XML, got a document type declaration (<!DOCTYPE>)")


def xml_of(path: Path, shown: str) -> ET.Element:
    """The root element. Any encoding that is declared and known to Python; without a declaration UTF-8, or UTF-16 by its mark; bytes that
    fit neither are read as Latin-1, which leaves everything but accents as it is.

    Raises:
        Unusable: broken XML, an unknown encoding, a document type.
    """
    try:
        data = path.read_bytes()
        declared = _DECLARED.match(data)
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), declared[1].decode() if declared else None)
        try:
            text = data.decode(encoding or "utf-8")
        except UnicodeDecodeError:
            if encoding is not None:
                raise
            text = data.decode("latin-1")
        parser = ET.XMLParser(target=_PlainTree())
        parser.feed(_DECLARATION.sub("", text, count=1))
        return parser.close()
    except DataError as error:
        raise Unusable("unreadable", f"{shown}: {error}") from error
    except (ET.ParseError, LookupError, ValueError, OSError) as error:
        raise Unusable("unreadable", f"{shown}: expected XML, got a file that fails with: {brief(error)}") from error


@dataclass(frozen=True)
class Head:
    """What a file or folder shows at first sight: ``top`` are the keys of a JSON object, ``row`` the first row of a list or of lines."""

    path: Path
    top: frozenset[str] = frozenset()
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()


def head_of(path: Path) -> Head:
    """The head of anything; a file that is no JSON has none."""
    if path.is_dir() or path.suffix.lower() not in (".json", ".jsonl", ".ndjson", ".geojson"):
        return Head(path)
    if path.suffix.lower() == ".json":
        try:
            content = json_of(path, "JSON")
        except DataError:
            content = None
        if isinstance(content, dict):
            return Head(path, frozenset(content), content)
        if isinstance(content, list):
            return Head(path, row=next((row for row in content[:100] if isinstance(row, dict)), {}))
    first = next((row for _, row in _safely(path) if isinstance(row, dict)), {})
    return Head(path, row=first)


def _safely(path: Path) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    try:
        yield from rows_of(path)
    except DataError:
        return
