"""The characters of an answer, byte by byte: which byte may follow, inside a description and at its two edges.

A description is written as ``json.dumps(desc, ensure_ascii=False)`` writes it: well-formed UTF-8, controls
and the two signs ``"`` and ``\\`` escaped in the one way that function escapes them. It may not contain a
reserved token's text ``<|...|>``, which the templates refuse as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple


class Left(NamedTuple):
    """Before a description: these bytes of the format are still to come."""

    rest: bytes


class Desc(NamedTuple):
    """Inside a description. ``kind`` names what is unfinished (``""``: nothing); ``reserved`` counts how much of a
    reserved token's text stands: 0 nothing, 1 ``<``, 2 ``<|...``, 3 ``<|...|``."""

    kind: str
    reserved: int


class Right(NamedTuple):
    """After a description: these bytes of the format, from its closing quote on, have been written."""

    written: bytes


class Coords(NamedTuple):
    """The value list of this geometry is open."""

    geometry: str


State = Left | Desc | Right | Coords

PLAIN: Final = ""
_SHORT_ESCAPES: Final = frozenset(b'"\\bfnrt')
# Kinds of escapes: after "\", after "\u", "\u0", "\u00", "\u000", "\u001".
_ESCAPES: Final[dict[str, dict[int, str]]] = {
    "\\": {**dict.fromkeys(_SHORT_ESCAPES, PLAIN), ord("u"): "u"},
    "u": {ord("0"): "u0"},
    "u0": {ord("0"): "u00"},
    "u00": {ord("0"): "u000", ord("1"): "u001"},
    # Of the controls, \b \t \n \f \r have their short forms.
    "u000": dict.fromkeys(b"01234567bef", PLAIN),
    "u001": dict.fromkeys(b"0123456789abcdef", PLAIN),
}
# Kinds of characters of several bytes: the range of the next byte, then what comes after it. RFC 3629, section 4.
_CONTINUE: Final[dict[str, tuple[int, int, str]]] = {
    "1": (0x80, 0xBF, PLAIN),
    "2": (0x80, 0xBF, "1"),
    "3": (0x80, 0xBF, "2"),
    "E0": (0xA0, 0xBF, "1"),
    "ED": (0x80, 0x9F, "1"),
    "F0": (0x90, 0xBF, "2"),
    "F4": (0x80, 0x8F, "2"),
}
# Bytes that are still needed, at least, to be back at PLAIN.
_DISTANCE: Final[dict[str, int]] = {
    PLAIN: 0, "\\": 1, "u": 4, "u0": 3, "u00": 2, "u000": 1, "u001": 1,
    "1": 1, "2": 2, "3": 3, "E0": 2, "ED": 2, "F0": 3, "F4": 3,
}  # fmt: skip
MAX_DISTANCE: Final = max(_DISTANCE.values())


def distance(state: State) -> int:
    """Bytes needed before the closing quote may be written; -1 when it has been."""
    return _DISTANCE[state.kind] if isinstance(state, Desc) else -1


def _lead(byte: int) -> str | None:
    """Kind after the first byte of a character of several bytes."""
    special = {0xE0: "E0", 0xED: "ED", 0xF0: "F0", 0xF4: "F4"}
    if byte in special:
        return special[byte]
    if 0xC2 <= byte <= 0xDF:
        return "1"
    if 0xE1 <= byte <= 0xEF:
        return "2"
    return "3" if 0xF1 <= byte <= 0xF3 else None


def _reserved(state: int, byte: int) -> int | None:
    """Progress in ``<|[^|<>]*|>`` after one more byte; None when it is complete."""
    if byte == ord("<"):
        return 1
    if byte == ord("|"):
        return {1: 2, 2: 3}.get(state, 0)
    if byte == ord(">"):
        return None if state == 3 else 0
    return 2 if state == 2 else 0


@dataclass(frozen=True)
class Characters:
    """The byte-level automaton. ``endings`` maps each geometry to the text between description and first value."""

    endings: dict[str, bytes]

    def step(self, state: State, byte: int) -> State | None:
        """The state after one more byte, None when the byte is illegal."""
        if isinstance(state, Left):
            if state.rest[0] != byte:
                return None
            return Left(state.rest[1:]) if len(state.rest) > 1 else Desc(PLAIN, 0)
        if isinstance(state, Desc):
            return self._inside(state, byte)
        if isinstance(state, Right):
            return self._right(state.written + bytes([byte]))
        return None

    def _right(self, written: bytes) -> State | None:
        for geometry, ending in self.endings.items():
            if ending == written:
                return Coords(geometry)
        return Right(written) if any(ending.startswith(written) for ending in self.endings.values()) else None

    def _inside(self, state: Desc, byte: int) -> State | None:
        if state.kind in _ESCAPES:
            kind = _ESCAPES[state.kind].get(byte)
            return None if kind is None else Desc(kind, state.reserved)
        if state.kind in _CONTINUE:
            low, high, kind = _CONTINUE[state.kind]
            return Desc(kind, state.reserved) if low <= byte <= high else None
        if byte == ord('"'):
            return self._right(b'"')
        if byte < 0x20:
            return None
        reserved = _reserved(state.reserved, byte)
        if reserved is None:
            return None
        if byte == ord("\\"):
            return Desc("\\", reserved)
        if byte < 0x80:
            return Desc(PLAIN, reserved)
        lead = _lead(byte)
        return None if lead is None else Desc(lead, reserved)

    def walk(self, state: State, text: bytes) -> State | None:
        """The state after ``text``, None when some byte of it is illegal."""
        current: State | None = state
        for byte in text:
            if current is None:
                return None
            current = self.step(current, byte)
        return current

    def ends(self, state: State, ordered: Sequence[tuple[bytes, int]]) -> dict[int, State]:
        """State after each legal token, by id. ``ordered`` are (bytes, id), sorted: what tokens share is walked once."""
        found: dict[int, State] = {}
        path: list[State | None] = [state]
        previous = b""
        for text, i in ordered:
            shared = 0
            while shared < min(len(previous), len(text)) and previous[shared] == text[shared]:
                shared += 1
            del path[shared + 1 :]
            for byte in text[len(path) - 1 :]:
                here = path[-1]
                path.append(None if here is None else self.step(here, byte))
                if path[-1] is None:
                    break
            end = path[-1]
            # A walk that broke off stays broken for every token with the same beginning.
            if end is not None:
                found[i] = end
            previous = text if end is not None else text[: len(path) - 1]
        return found
