"""Boxes in the answers of chat models: JSON in any wrapping, and the tags of Qwen, InternVL, MiniCPM and DeepSeek-VL2."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from coordexp.data.importers.base import Layout, RawObject, Unusable, brief
from coordexp.data.importers.judging import number

# Keys of boxes and how their numbers stand; Gemini's box_2d has y first.
_BOXES: Final[dict[str, Layout]] = {
    "bbox_2d": "xyxy", "bbox": "xyxy", "box": "xyxy", "bounding_box": "xyxy", "bboxes": "xyxy", "boxes": "xyxy", "box_2d": "yxyx",
}  # fmt: skip
_POINTS: Final = ("point_2d", "point")
_OUTLINES: Final = ("poly", "polygon")
_NAMES: Final = ("label", "desc", "name", "text_content", "ref", "phrase", "category", "class", "caption", "text", "object", "category_id")
_TAGS: Final = re.compile(
    r"(?:<ref>|<\|object_ref_start\|>|<\|ref\|>)([^<]*)(?:</ref>|<\|object_ref_end\|>|<\|/ref\|>)"
    r"|(?:<box>|<\|box_start\|>|<\|det\|>)([^<]*)(?:</box>|<\|box_end\|>|<\|/det\|>)"
    r"|(?:<quad>|<\|quad_start\|>)([^<]*)(?:</quad>|<\|quad_end\|>)"
)
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?")
_ASK: Final = r"(?:locate|detect|find|point to|ground)\s+(?:the\s+)?([^.,;:?\n]+?)"
_IMAGE: Final = r"(?:\s+in\s+(?:this|the)\s+image)?"
# Questions of the models' own documentation that name what is asked for.
_QUESTIONS: Final = (
    re.compile(r"(?:<ref>|<\|object_ref_start\|>)([^<]+)(?:</ref>|<\|object_ref_end\|>)"),
    re.compile(r"\b(?:sentence|phrase) describes:\s*(.+?)\s*$", re.IGNORECASE | re.DOTALL),
    re.compile(rf"\b{_ASK}{_IMAGE},?\s+(?:and\s+)?(?:output|report|return|provide)\b", re.IGNORECASE),
    re.compile(rf"^\s*(?:<image>\s*)?{_ASK}{_IMAGE}[.?]?\s*$", re.IGNORECASE),
)  # fmt: skip
# After so many brackets that begin no JSON the rest is prose.
_TRIES: Final = 50


_QUOTED: Final = re.compile(r"[{,]\s*'\w+'\s*:")
_LONGEST: Final = 1_000_000


class _Pairs(list[tuple[str, Any]]):
    """An object's pairs, a key as often as it stands there."""


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_Pairs)


def objects_of_text(text: str, where: str, question: str = "") -> list[RawObject | Unusable] | None:
    """The objects that an answer holds, an empty list for an answer that says there are none, None for one without any box.

    Objects without a name take the one that the question asks for, where it is of a known form.
    """
    found: list[RawObject | Unusable] = []
    asked = question_name(question)
    if _TAGS.search(text):
        found = list(_tagged(text, where, asked))
        return found or None
    values = _literal(text) or list(_json_values(text))
    if not values:
        return None
    for value in values:
        found += _walk(value, f"{where}: objects", len(found))
    for item in found:
        if isinstance(item, RawObject) and item.name is None:
            item.name = asked
    return found if found or any(value in ([], {}) or isinstance(value, _Pairs) for value in values) else None


def question_name(question: str) -> str | None:
    """What a question of a known form asks for."""
    for pattern in _QUESTIONS:
        match = pattern.search(question)
        if match:
            return match[1].strip() or None
    return None


def _tagged(text: str, where: str, asked: str | None) -> Iterator[RawObject | Unusable]:
    name, count = asked, 0
    for match in _TAGS.finditer(text):
        if match[1] is not None:
            name = match[1].strip()
            continue
        body, outline = (match[2], False) if match[2] is not None else (match[3], True)
        numbers = [float(n) for n in _NUMBER.findall(body)]
        size = 8 if outline else 4
        place = f"{where}: box {count + 1}"
        if not numbers or len(numbers) % size:
            count += 1
            yield Unusable("wrong count of numbers", f"{place}: expected {size} numbers, got {len(numbers)} in {brief(body)!r}")
            continue
        for start in range(0, len(numbers), size):
            count += 1
            yield RawObject(f"{where}: box {count}", numbers[start : start + size], "outline" if outline else "xyxy", None, name)


def _json_values(text: str) -> Iterator[Any]:
    """All JSON arrays and objects of a text, whatever stands around them."""
    at, tries = 0, 0
    while tries < _TRIES:
        starts = [place for place in (text.find("[", at), text.find("{", at)) if place >= 0]
        if not starts:
            return
        at = min(starts)
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            at, tries = at + 1, tries + 1
        else:
            yield value


def _literal(text: str) -> list[Any]:
    """The list or object of a text that is written as Python prints it, with single quotes."""
    # From the first opening to the last closing bracket; a pattern for that takes quadratic time where none is closed.
    first = min((place for place in (text.find("["), text.find("{")) if place >= 0), default=len(text))
    body = text[first : max(text.rfind("]"), text.rfind("}")) + 1]
    try:
        value = ast.literal_eval(body) if _QUOTED.search(body) and len(body) < _LONGEST else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return []
    return [value] if isinstance(value, list | dict) else []


def objects_of_value(value: Any, where: str) -> list[RawObject | Unusable]:
    """The objects of a list or object that JSON has made."""
    return list(_walk(value, where, 0))


def _walk(value: Any, where: str, count: int) -> list[RawObject | Unusable]:
    if isinstance(value, _Pairs):
        return [item for part in _parts(value) for item in _object(part, f"{where}[{count}]")]
    if isinstance(value, dict):
        return _object(value, f"{where}[{count}]")
    if isinstance(value, list) and len(value) in (2, 4) and all(number(v) is not None for v in value):
        return [RawObject(f"{where}[{count}]", value, "point" if len(value) == 2 else "xyxy", None)]
    if not isinstance(value, list):
        return [Unusable("no box", f"{where}[{count}]: expected an object with bbox_2d and label, got {brief(value)}")]
    found: list[RawObject | Unusable] = []
    for item in value:
        found += _walk(item, where, count + len(found))
    return found


def _parts(pairs: _Pairs) -> Iterator[dict[str, Any]]:
    """An object whose keys repeat is several: a new one begins with the first key that is there already."""
    part: dict[str, Any] = {}
    for key, value in pairs:
        if key in part:
            yield part
            part = {}
        part[key] = value
    yield part


def _object(item: dict[str, Any], where: str) -> list[RawObject | Unusable]:
    boxes = [key for key in (*_BOXES, *_POINTS, *_OUTLINES) if key in item]
    if len(boxes) > 1:
        return [Unusable("no box", f"{where}: expected one of bbox_2d and point_2d, got {', '.join(boxes)}")]
    name = next((item[key] for key in _NAMES if item.get(key) not in (None, "")), None)
    if boxes:
        return _values(item[boxes[0]], boxes[0], name, item, f"{where}")
    nested = [value for value in item.values() if isinstance(value, list)]
    if any(isinstance(v, dict | _Pairs) for value in nested for v in value):
        return [found for value in nested for found in _walk(value, where, 0)]
    # {"cat": [1, 2, 3, 4], "dog": [[5, 6, 7, 8], [9, 9, 20, 20]]}
    named = {key: value for key, value in item.items() if isinstance(value, list) and value}
    if named and len(named) == len(item):
        return [found for key, value in named.items() for found in _values(value, "bbox_2d", key, {}, f"{where}.{key}")]
    if not item:
        return []
    return [Unusable("no box", f"{where}: expected one of bbox_2d and point_2d, got {brief(', '.join(map(str, item))) or 'none'}")]


def _values(value: Any, key: str, name: Any, item: dict[str, Any], where: str) -> list[RawObject | Unusable]:
    if isinstance(value, list) and value and all(isinstance(v, list) for v in value):
        flat = key in _OUTLINES and all(len(v) == 2 for v in value)
        if not flat:
            return [found for i, v in enumerate(value) for found in _values(v, key, name, item, f"{where}.{key}[{i}]")]
        value = [number_ for pair in value for number_ in pair]
    layout: Layout = "point" if key in _POINTS else "outline" if key in _OUTLINES else _BOXES[key]
    flags = {"crowd": item.get("iscrowd"), "difficult": item.get("difficult"), "area": item.get("area")}
    return [RawObject(where, value, layout, None, name, **flags)]
