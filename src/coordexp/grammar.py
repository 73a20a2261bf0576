"""The answer format ``coord_json``: one line of JSON in which coordinates are bare tokens.

``{"objects": [{"desc": "black cat", "bbox_2d": [<|coord_110|>, <|coord_310|>, <|coord_402|>, <|coord_655|>]}]}``

``render`` and ``parse`` live side by side and round-trip; ``Rendered.spans`` says which characters are
coordinates and which are description, and everything else is format.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

Geometry = Literal["bbox_2d", "poly", "point_2d"]
Role = Literal["coord", "desc", "format"]
ROLE_CODES: Final[dict[str, int]] = {"none": 0, "coord": 1, "desc": 2, "format": 3}
GEOMETRIES: Final[tuple[Geometry, ...]] = ("bbox_2d", "poly", "point_2d")

# A model can write anything. Bins have at most nine digits, which Python turns into a number in constant time; repeats are possessive
# (``*+``), so that no pattern goes back over blanks and parsing takes time linear in the text.
COORD_TOKEN: Final = re.compile(r"<\|coord_([0-9]{1,9})\|>")
_COORD_ITEM = r'"?<\|coord_[0-9]{1,9}\|>"?'
_COORD_LIST: Final = re.compile(rf"\[\s*+(?:{_COORD_ITEM}(?:\s*+,\s*+{_COORD_ITEM})*+)?+\s*+\]")
_OBJECT_START: Final = re.compile(r'\{\s*+"desc"\s*+:\s*+')
# A JSON string. Escapes are checked here, since json's own errors count the lines before them.
_STRING: Final = re.compile(r'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"')
_GEOMETRY_KEY: Final = re.compile(r'\s*+,\s*+"(bbox_2d|poly|point_2d)"\s*+:\s*+')
_OBJECT_END: Final = re.compile(r"\s*+\}")
_LISTED_ANSWER: Final = re.compile(r'\s*+\{\s*+"objects"\s*+:\s*+\[')
_LISTED_SEPARATOR: Final = re.compile(r"\s*+,?\s*+")
_LISTED_END: Final = re.compile(r"\]\s*+\}")
_KEYED_ANSWER: Final = re.compile(r'\s*+\{\s*+"object_\d++"\s*+:')
_KEYED_SEPARATOR: Final = re.compile(r'\s*+\{?\s*+,?\s*+"object_\d++"\s*+:\s*+')
_LISTED_TAIL: Final = re.compile(r"\]\s*+\}\s*+\Z")
_KEYED_END: Final = re.compile(r"\}")
_NEXT_OBJECT: Final = re.compile(r'"object_\d++"\s*+:\s*+\{|\{\s*+"desc"')
HALF_PAIR: Final = re.compile(r"[\ud800-\udfff]")


def geometries_of(found: Collection[str]) -> tuple[Geometry, ...]:
    """The geometries in ``found``, in the order of ``GEOMETRIES``; boxes where there are none."""
    return tuple(name for name in GEOMETRIES if name in found) or ("bbox_2d",)


def coord_token(k: int) -> str:
    """Text of the token of bin ``k``."""
    return f"<|coord_{k}|>"


@dataclass(frozen=True)
class Instance:
    """One object of an answer: a description and one geometry as bins.

    ``bins`` holds x and y in turn. ``centers`` (continuous bin positions of the ground truth) and
    ``extents`` (object size along each value's axis, in bins) are for training targets; a parsed
    instance has none.
    """

    desc: str
    bins: tuple[int, ...]
    geometry: Geometry = "bbox_2d"
    centers: tuple[float, ...] = field(default=(), compare=False)
    extents: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of the rendered text. ``slot`` is ``(instance, value index)`` for a coordinate."""

    start: int
    end: int
    role: Role
    slot: tuple[int, int] | None = None


@dataclass(frozen=True)
class Rendered:
    """An answer's text and its coordinate and description spans, in order."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class ParsedAnswer:
    """What could be read (``instances``) and how often something could not, by reason (``problems``).

    ``coord_index`` gives, per instance, where its values stand among all coordinate tokens of the
    text, so that a reader of the model's distributions can find them. ``desc_spans`` gives the characters
    ``[start, end)`` of each description as written, without its quotes.
    """

    instances: tuple[Instance, ...]
    problems: dict[str, int]
    coord_index: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    desc_spans: tuple[tuple[int, int], ...] = field(default=(), compare=False)


def render(instances: Sequence[Instance]) -> Rendered:
    """Text of an answer, with spans.

    Raises:
        ValueError: an instance whose number of values does not fit its geometry.
    """
    parts: list[str] = ['{"objects": [']
    spans: list[Span] = []
    length = len(parts[0])

    def put(text: str, role: Role | None = None, slot: tuple[int, int] | None = None) -> None:
        nonlocal length
        parts.append(text)
        if role is not None:
            spans.append(Span(length, length + len(text), role, slot))
        length += len(text)

    for i, instance in enumerate(instances):
        problem = _arity_problem(instance.geometry, len(instance.bins))
        if problem:
            raise ValueError(f"object {i} ({instance.desc!r}): {problem}")
        put('{"desc": "' if i == 0 else ', {"desc": "')
        put(json.dumps(instance.desc, ensure_ascii=False)[1:-1], "desc")
        put(f'", "{instance.geometry}": [')
        for j, k in enumerate(instance.bins):
            if j:
                put(", ")
            put(coord_token(k), "coord", (i, j))
        put("]}")
    put("]}")
    return Rendered("".join(parts), tuple(spans))


def _arity_problem(geometry: str, count: int) -> str | None:
    if geometry == "bbox_2d" and count != 4:
        return f"bbox_2d expects 4 values, got {count}"
    if geometry == "point_2d" and count != 2:
        return f"point_2d expects 2 values, got {count}"
    if geometry == "poly" and (count < 6 or count % 2):
        return f"poly expects at least 3 points (an even number of values), got {count} values"
    return None


def parse(text: str, strict: bool = False, *, num_bins: int = 1000) -> ParsedAnswer:
    """Read an answer, in the format of :func:`render` or the older keyed one.

    What is whole is salvaged; everything else is counted in ``problems`` under ``no_answer``,
    ``truncated``, ``bad_object``, ``bad_arity``, ``bin_out_of_range``, ``degenerate_box`` or
    ``trailing_text``. Boxes with ``x2 <= x1`` or ``y2 <= y1`` are dropped and counted. A description with half a surrogate pair
    is no text: its object is a ``bad_object``. Time is linear in the length of the text.

    Raises:
        ValueError: with ``strict=True``, when there is any problem.
    """
    problems: Counter[str] = Counter()
    instances: list[Instance] = []
    index: list[tuple[int, ...]] = []
    written: list[tuple[int, int]] = []
    keyed = _KEYED_ANSWER.match(text)
    head = keyed or _LISTED_ANSWER.match(text)
    if head is None:
        if text.strip() != "{}":
            problems["no_answer"] += 1
    else:
        ordinals = {m.start(): n for n, m in enumerate(COORD_TOKEN.finditer(text))}
        end = _read_objects(text, 0 if keyed else head.end(), bool(keyed), num_bins, ordinals, instances, index, written, problems)
        tail = text[end:].strip()
        closed = (_KEYED_END if keyed else _LISTED_END).match(tail)
        if closed is None:
            problems["truncated"] += 1
        elif tail[closed.end() :].strip():
            problems["trailing_text"] += 1
    if strict and problems:
        raise ValueError(f"answer does not follow the format: {dict(problems)} in {text[:200]!r}")
    return ParsedAnswer(tuple(instances), dict(problems), tuple(index), tuple(written))


def _read_objects(
    text: str,
    at: int,
    keyed: bool,
    num_bins: int,
    ordinals: dict[int, int],
    instances: list[Instance],
    index: list[tuple[int, ...]],
    written: list[tuple[int, int]],
    problems: Counter[str],
) -> int:
    """Append every whole object from ``at`` on; return where the object list ends."""
    separator = _KEYED_SEPARATOR if keyed else _LISTED_SEPARATOR
    while True:
        gap = separator.match(text, at)
        start = gap.end() if gap else at
        if not text.startswith("{", start):
            return at
        found = _read_object(text, start)
        if found is None:
            # Resume at the next object that starts well; without one the rest is lost.
            problems["bad_object"] += 1
            resume = _NEXT_OBJECT.search(text, start + 1)
            if resume is None:
                return _closing(text)
            at = resume.start()
            continue
        desc, where, geometry, span, at = found
        tokens = list(COORD_TOKEN.finditer(text, *span))
        bins = tuple(int(m.group(1)) for m in tokens)
        fault = _bins_fault(geometry, bins, num_bins)
        if fault:
            problems[fault] += 1
        else:
            instances.append(Instance(desc, bins, geometry))
            index.append(tuple(ordinals[m.start()] for m in tokens))
            written.append(where)


def _closing(text: str) -> int:
    """Where the end of an answer begins whose last object is bad: before its last brackets if it is whole JSON, else behind the text."""
    try:
        json.loads(COORD_TOKEN.sub("0", text))
    except (ValueError, RecursionError):
        return len(text)
    end = _LISTED_TAIL.search(text)
    return end.start() if end else text.rindex("}")


def _read_object(text: str, start: int) -> tuple[str, tuple[int, int], Geometry, tuple[int, int], int] | None:
    """``(desc, its span, geometry, span of the value list, end of the object)`` of the object at ``start``, or None."""
    opening = _OBJECT_START.match(text, start)
    string = _STRING.match(text, opening.end()) if opening else None
    key = _GEOMETRY_KEY.match(text, string.end()) if string else None
    values = _COORD_LIST.match(text, key.end()) if key else None
    closing = _OBJECT_END.match(text, values.end()) if values else None
    if string is None or key is None or values is None or closing is None:
        return None
    desc = json.loads(string[0])
    if HALF_PAIR.search(desc):
        return None
    return desc, (string.start() + 1, string.end() - 1), _geometry(key.group(1)), values.span(), closing.end()


def _geometry(name: str) -> Geometry:
    return next(g for g in GEOMETRIES if g == name)


def _bins_fault(geometry: Geometry, bins: tuple[int, ...], num_bins: int) -> str | None:
    if _arity_problem(geometry, len(bins)):
        return "bad_arity"
    if any(k >= num_bins for k in bins):
        return "bin_out_of_range"
    if geometry == "bbox_2d" and (bins[2] <= bins[0] or bins[3] <= bins[1]):
        return "degenerate_box"
    return None


def token_roles(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> tuple[list[int], list[tuple[int, int] | None]]:
    """Role code and coordinate slot of every token of an answer.

    ``offsets`` are the tokens' character ranges in the answer's text, ascending. A token that lies
    within one span has its role; a token across a boundary is ``format``.
    """
    roles: list[int] = []
    slots: list[tuple[int, int] | None] = []
    cursor = 0
    for start, end in offsets:
        while cursor < len(spans) and spans[cursor].end <= start:
            cursor += 1
        inside = cursor < len(spans) and spans[cursor].start <= start and end <= spans[cursor].end and end > start
        roles.append(ROLE_CODES[spans[cursor].role if inside else "format"])
        slots.append(spans[cursor].slot if inside else None)
    return roles, slots
