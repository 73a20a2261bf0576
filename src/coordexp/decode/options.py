"""Options of the ``decode`` section. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReadoutName = Literal["argmax", "expectation", "median", "topk_mean", "window", "auto"]
ScoreName = Literal["none", "constant", "token", "distribution"]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Generation in batches, greedy at ``temperature`` 0. ``readout`` fills ``bbox_2d`` of a prediction; every readout is kept beside it.

    ``constrained`` decoding cannot leave the answer format and feeds what it forces without a forward pass;
    ``max_objects`` bounds its list. ``score`` names what a box's score is (``decode/scores.py``); ``none`` writes none.
    ``save_distributions`` keeps the coordinate distributions beside the file.
    """

    readout: ReadoutName = "auto"
    batch_size: int = 32
    max_new_tokens: int = 256
    constrained: bool = True
    max_objects: int = 100
    score: ScoreName = "distribution"
    temperature: float = 0.0
    seed: int = 0
    save_distributions: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "max_objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"decode.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"decode.temperature: expected 0 (greedy) or a positive number, got {self.temperature}")
