"""Decoding that cannot leave the answer format: one follower a row, and the masks of a batch.

Structure, number of values, ``x2 > x1`` and ``y2 > y1`` in bins, the end token where the answer may end, at
most ``max_objects`` objects, and room: an answer is closed in time to fit ``max_tokens``. An object equal to
an earlier one in description and box ends the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor

from coordexp.decode.automaton import MIN_VALUES, AnswerGrammar, Node
from coordexp.decode.characters import Coords, Desc, Left, Right, State
from coordexp.errors import ConfigError

Stopped = Literal["max_objects", "duplicate", "budget"]


class Follower:
    """Where one answer stands.

    Raises:
        ConfigError: ``max_tokens`` that no answer fits into.
    """

    def __init__(self, grammar: AnswerGrammar, *, max_objects: int, max_tokens: int) -> None:
        if max_tokens < len(grammar.empty):
            raise ConfigError(f"max_new_tokens: expected at least {len(grammar.empty)}, the length of an empty answer, got {max_tokens}")
        self.grammar, self.max_objects, self.room = grammar, max_objects, max_tokens
        self.done = False
        self._squeezed = False
        self._objects: set[tuple[bytes, str, tuple[int, ...]]] = set()
        self._text = b""
        self._opened = 0
        self._geometry = ""
        self._bins: list[int] = []
        self._reason = self._limit(0, grammar.first.cost)
        self._at: Node | State | None = grammar.begin(self._reason is None)

    @property
    def stopped(self) -> Stopped | None:
        """What other than the model ended the list; None while the answer is unfinished."""
        if not self.done:
            return None
        return "budget" if self._squeezed else self._reason

    def _limit(self, count: int, opening: int) -> Stopped | None:
        """Why no further object may begin after ``count``, None if it may."""
        if count >= self.max_objects:
            return "max_objects"
        return "budget" if self.room < opening + self.grammar.tail_from_desc else None

    def bins(self) -> range | None:
        """The legal bins where a value is due, else None. The second corner lies strictly beyond the first."""
        if not isinstance(self._at, Coords):
            return None
        k = self.grammar.vocab.num_bins
        if self._at.geometry != "bbox_2d":
            return range(k)
        slot = len(self._bins)
        return range(k - 1) if slot < 2 else range(self._bins[slot - 2] + 1, k)

    def legal(self) -> dict[int, Any]:
        """The legal tokens where no value is due, with their states."""
        if isinstance(self._at, Node):
            return self._at.children
        assert isinstance(self._at, Left | Desc)
        return self.grammar.legal(self._at, closing=self._closing())

    def _closing(self) -> bool:
        """Whether a description has to end now for the rest of the answer to fit."""
        return isinstance(self._at, Desc) and self.room <= self.grammar.tail_from_desc

    def state_key(self) -> tuple[Any, ...]:
        """Equal for two followers with the same legal tokens; for caching masks."""
        if isinstance(self._at, Node):
            return ("node", id(self._at))
        return (type(self._at).__name__, self._at, self._closing())

    def forced(self) -> int | None:
        """The one token that may follow, None where there is a choice. A value never counts as forced: it has a distribution."""
        if self.done or isinstance(self._at, Coords):
            return None
        legal = self.legal()
        return next(iter(legal)) if len(legal) == 1 else None

    def advance(self, token: int) -> None:
        """Take a token.

        Raises:
            ValueError: a token that is not legal here.
        """
        if self.done:
            raise ValueError("the answer is complete")
        bins = self.bins()
        if bins is not None:
            k = token - self.grammar.vocab.start
            if k not in bins:
                raise ValueError(f"token {token} is no bin of {bins.start}..{bins.stop - 1}")
            self._bins.append(k)
            self.room -= 1
            self._at = self._after_value()
            return
        legal = self.legal()
        if token not in legal:
            raise ValueError(f"token {token} ({self.grammar.tokenizer.decode([token])!r}) does not follow the format here")
        before, end = self._at, legal[token]
        self._squeezed = self._squeezed or self._closing()
        self.room -= 1
        if isinstance(before, Node) and isinstance(end, Left):
            if self._bins:
                self._objects.add((self._text, self._geometry, tuple(self._bins)))
            self._text, self._opened = b"", len(end.rest)
        elif not isinstance(before, Node):
            self._text += self.grammar.bytes[token]
        self._enter(end)

    def _enter(self, end: Any) -> None:
        if isinstance(end, Right):
            self._text = self._text[self._opened : len(self._text) - len(end.written)]
            self._at = self.grammar.right(end.written)
        elif isinstance(end, Coords):
            # From a token that spans the whole key; otherwise the text has been cut already.
            ending = self.grammar.characters.endings[end.geometry]
            if not isinstance(self._at, Node):
                self._text = self._text[self._opened : len(self._text) - len(ending)]
            self._geometry, self._bins, self._at = end.geometry, [], end
        elif end is None:
            self._at = Coords(self._geometry)
        elif isinstance(end, Node | Left | Desc):
            self._at = end
        else:
            self._at, self.done = None, True

    def _after_value(self) -> Node:
        count, least = len(self._bins), MIN_VALUES[self._geometry]
        if count < least or count % 2:
            return self.grammar.between
        repeated = (self._text, self._geometry, tuple(self._bins)) in self._objects
        # No two objects before this one are equal, or the list had ended.
        self._reason = "duplicate" if repeated else self._limit(len(self._objects) + 1, self.grammar.next.cost)
        more = self._reason is None
        if self._geometry == "poly" and self.room >= 2 * (len(self.grammar.separator) + 1) + len(self.grammar.last):
            return self.grammar.after_point(more)
        return self.grammar.after_object(more)


class Masks:
    """Legal tokens of a batch as booleans ``[B, V]``; what does not depend on an answer's bins is cached by state."""

    def __init__(self, grammar: AnswerGrammar) -> None:
        self.grammar = grammar
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, followers: Sequence[Follower], like: Tensor) -> Tensor:
        """``like`` ``[B, V]`` are the logits; a row whose answer is complete may hold anything."""
        return torch.stack([self._row(follower, like) for follower in followers])

    def _row(self, follower: Follower, like: Tensor) -> Tensor:
        if follower.done:
            return like.new_ones(like.shape[1], dtype=torch.bool)
        bins = follower.bins()
        if bins is not None:
            row = like.new_zeros(like.shape[1], dtype=torch.bool)
            row[self.grammar.vocab.start + bins.start : self.grammar.vocab.start + bins.stop] = True
            return row
        key = (*follower.state_key(), like.shape[1], like.device)
        if key not in self._cache:
            row = like.new_zeros(like.shape[1], dtype=torch.bool)
            row[torch.tensor(sorted(follower.legal()), device=like.device)] = True
            self._cache[key] = row
        return self._cache[key]


class GrammarProcessor(LogitsProcessor):
    """The same constraint for ``transformers``' own ``generate``; forced tokens cost a forward pass there.

    One processor serves one call, greedy or sampled, without beams.
    """

    def __init__(self, grammar: AnswerGrammar, *, prompt_length: int, max_objects: int, max_new_tokens: int) -> None:
        self.grammar, self.prompt_length = grammar, prompt_length
        self.limits = {"max_objects": max_objects, "max_tokens": max_new_tokens}
        self.masks = Masks(grammar)
        self.followers: list[Follower] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]``, minus infinity where the format does not allow the token."""
        if not self.followers:
            self.followers = [Follower(self.grammar, **self.limits) for _ in range(input_ids.shape[0])]
        if input_ids.shape[1] > self.prompt_length:
            for follower, token in zip(self.followers, input_ids[:, -1].tolist(), strict=True):
                if not follower.done:
                    follower.advance(token)
        return scores.masked_fill(~self.masks(self.followers, scores), -torch.inf)
