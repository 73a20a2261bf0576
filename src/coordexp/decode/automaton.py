"""The answer grammar over the tokens of one tokenizer.

Format text is taken as the tokenizer writes it in a whole answer, so the model meets the pieces it was
trained on: between two places where it has a choice, the canonical tokens and no others. Where format and
description share a token (`` "(`` or ``!",``) the choice is by characters: every token whose bytes the
grammar allows, computed once per state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coordexp.decode.characters import MAX_DISTANCE, Characters, Coords, Desc, Left, State, distance
from coordexp.decode.tokens import token_bytes
from coordexp.errors import VocabError
from coordexp.grammar import GEOMETRIES, Geometry
from coordexp.vocab.coord_vocab import CoordVocab

FIRST: Final = '{"objects": [{"desc": "'
EMPTY: Final = '{"objects": []}'
NEXT: Final = ']}, {"desc": "'
LAST: Final = "]}]}"
SEPARATOR: Final = ", "
MIN_VALUES: Final[dict[str, int]] = {"bbox_2d": 4, "poly": 6, "point_2d": 2}

# First signs of a description, one of each kind that a tokenizer's split tells apart.
_PROBES: Final = (
    *(chr(c) for c in range(0x20, 0x7F) if chr(c) not in '"\\'), '\\"', "\\\\", "\\n", "\\u0000", '"', '",', "  ", " a", "''", "((",
    "\u00a0", "\u3000", "\u0301", "é", "日", "я", "٣", "½", "—", "☃", "😀",
)  # fmt: skip


@dataclass(frozen=True)
class End:
    """The answer is complete."""


@dataclass
class Node:
    """A place in format text: the tokens that may follow, and where each leads."""

    children: dict[int, Any] = field(default_factory=dict)

    def put(self, ids: Sequence[int], end: Any) -> Node:
        """Add a path of tokens that leads to ``end``."""
        node = self
        for i in ids[:-1]:
            node = node.children.setdefault(i, Node())
        node.children[ids[-1]] = end
        return self


@dataclass(frozen=True)
class Opening:
    """Format text up to a description: canonical tokens ``ids``, then the bytes ``rest``, whose tokens depend on it."""

    ids: tuple[int, ...]
    rest: bytes

    @property
    def cost(self) -> int:
        """Most tokens it can take."""
        return len(self.ids) + len(self.rest)


class AnswerGrammar:
    """Tables of one tokenizer: which tokens may follow where. Values are bins of ``vocab``.

    ``geometries`` are those an object may have.

    Raises:
        VocabError: a tokenizer that is not byte-level, has no end token, or joins the pieces of the format.
    """

    def __init__(self, tokenizer: Any, vocab: CoordVocab, *, geometries: Sequence[Geometry] = ("bbox_2d",)) -> None:
        if not geometries or set(geometries) - set(GEOMETRIES):
            raise ValueError(f"geometries: expected some of {', '.join(GEOMETRIES)}, got {list(geometries)}")
        if tokenizer.eos_token_id is None:
            raise VocabError("the tokenizer has no end token: constrained decoding cannot end an answer; use --unconstrained")
        self.tokenizer, self.vocab, self.eos = tokenizer, vocab, int(tokenizer.eos_token_id)
        self.bytes = token_bytes(tokenizer)
        barred = {*tokenizer.all_special_ids, *vocab.ids, self.eos}
        self._ordered = sorted((text, i) for i, text in enumerate(self.bytes) if text and i not in barred)
        self.characters = Characters({g: f'", "{g}": ['.encode() for g in geometries})
        self._legal: dict[State, dict[int, State]] = {}
        self._closing: dict[State, dict[int, State]] = {}
        self._right: dict[bytes, Node] = {}
        self.first, self.next = self._opening(FIRST), self._opening(NEXT)
        self.empty = (*self._ids(EMPTY), self.eos)
        self.last = (*self._ids(LAST), self.eos)
        self.separator = self._ids(SEPARATOR)
        self._nodes = {(start, more): self._choice(start, more) for start in (True, False) for more in (True, False)}
        self._points = {more: self._point(more) for more in (True, False)}
        self.between = Node().put(self.separator, None)
        values = max(MIN_VALUES[g] for g in geometries)
        rights = [len(self._ids(e[k:].decode())) for e in self.characters.endings.values() for k in range(1, len(e))]
        # Quote, rest of the key, values, end: what must still fit once a description is to be closed.
        self.tail = 1 + max(rights) + values + (values - 1) * len(self.separator) + len(self.last)
        self.tail_from_desc = self.tail + MAX_DISTANCE

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _opening(self, text: str) -> Opening:
        """Cut before the piece of the tokenizer's split that a description can still be part of."""
        split = self.tokenizer.backend_tokenizer.pre_tokenizer
        start = 0
        if split is not None:
            starts = [
                max(begin for _, (begin, _) in split.pre_tokenize_str(text + probe) if begin < len(text)) for probe in _PROBES
            ]  # fmt: skip
            start = min(starts)
        encoded = self.tokenizer([text + probe for probe in _PROBES], add_special_tokens=False, return_offsets_mapping=True)
        heads = {
            tuple(i for i, (begin, _) in zip(ids, offsets, strict=True) if begin < start)
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        }
        if start <= text.index('"desc"') or len(heads) != 1:
            raise VocabError(f"the tokenizer joins {text!r} with what follows: constrained decoding cannot use it; use --unconstrained")
        return Opening(heads.pop(), text[start:].encode())

    def _choice(self, start: bool, more: bool) -> Node:
        """An object or the end; only the end with ``more=False``. ``start``: at the head of the answer, else after an object."""
        opening, ending = (self.first, self.empty) if start else (self.next, self.last)
        node = Node().put(ending, End())
        return node.put(opening.ids, Left(opening.rest)) if more else node

    def begin(self, more: bool) -> Node:
        """The head of the answer."""
        return self._nodes[True, more]

    def after_object(self, more: bool) -> Node:
        """After the last value of an object."""
        return self._nodes[False, more]

    def after_point(self, more: bool) -> Node:
        """After a point that a polygon may end with, or not."""
        return self._points[more]

    def _point(self, more: bool) -> Node:
        return self._choice(False, more).put(self.separator, None)

    def right(self, written: bytes) -> Node:
        """Format text from the closing quote on, of which ``written`` is there already."""
        if written not in self._right:
            node = Node()
            for geometry, ending in self.characters.endings.items():
                if ending.startswith(written):
                    node.put(self._ids(ending[len(written) :].decode()), Coords(geometry))
            self._right[written] = node
        return self._right[written]

    def legal(self, state: Left | Desc, *, closing: bool = False) -> dict[int, State]:
        """State after each token that may follow ``state``; with ``closing`` only those that lead out of the description."""
        table = self._closing if closing else self._legal
        if state not in table:
            found = self.characters.ends(state, self._ordered)
            if closing:
                found = {i: end for i, end in found.items() if distance(end) < distance(state)}
            elif isinstance(state, Left):
                found = self._joinable(found)
            table[state] = found
        return table[state]

    def _joinable(self, found: dict[int, State]) -> dict[int, State]:
        """Leave out a token that stops inside the format text if the tokenizer joins it with all that may follow.

        Any two neighbours of a canonical byte-pair tokenisation are themselves canonical.
        """
        return {i: end for i, end in found.items() if not isinstance(end, Left) or self._is_followed(i, end)}

    def _is_followed(self, token: int, end: Left) -> bool:
        for successor in self.legal(end):
            try:
                text = (self.bytes[token] + self.bytes[successor]).decode()
            except UnicodeDecodeError:
                return True
            if self._ids(text) == (token, successor):
                return True
        return False
