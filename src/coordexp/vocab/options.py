"""Options of the ``vocab`` and ``adapter`` sections. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Init = Literal["mean", "digits", "ordinal"]


@dataclass(frozen=True, kw_only=True)
class VocabOptions:
    """How ``run`` gives the model its coordinate tokens. With ``extend=False`` the model must have them."""

    extend: bool = True
    init: Init = "ordinal"
    seed: int = 0


Part = Literal["vision", "aligner", "language_model"]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What of the model is trained.

    ``kind``: ``none`` trains the weights themselves, ``lora`` and ``dora`` train low-rank updates of the linear layers
    in ``targets``, ``rows`` the coordinate rows alone. ``targets``: ``all-linear`` (every linear layer of the language model),
    ``vision`` or ``aligner`` (every one of that part), or ends of module names, such as ``q_proj``. The update is
    ``alpha / rank * B A``, with ``dropout`` before A. ``new_rows``: the coordinate rows of embedding and head are trained
    beside it. ``freeze``: parts in which nothing is trained; the language model includes embedding and head, whose
    coordinate rows ``new_rows`` trains all the same.

    Raises:
        ValueError: a number out of range, or nothing left to train.
    """

    kind: Literal["none", "lora", "dora", "rows"] = "none"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    new_rows: bool = True
    freeze: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank: expected at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"adapter.alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout: expected a number from 0 up to, not including, 1, got {self.dropout}")
        if not self.target_names or not all(self.target_names):
            raise ValueError("adapter.targets: expected all-linear or names of layers, got nothing")
        if self.kind == "rows" and not self.new_rows:
            raise ValueError("adapter.new_rows: kind rows trains nothing else: set adapter.new_rows=true or another kind")
        if self.kind == "none" and set(self.freeze) == {"vision", "aligner", "language_model"}:
            raise ValueError(
                "adapter.freeze: every part is frozen and nothing is left to train: set adapter.kind=rows to train new rows alone"
            )

    @property
    def target_names(self) -> tuple[str, ...]:
        """``targets`` as a tuple."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    @property
    def separate_rows(self) -> bool:
        """Whether the coordinate rows are a parameter of their own."""
        return self.kind != "none" and self.new_rows
