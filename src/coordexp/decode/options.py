"""Options of the ``decode`` section. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReadoutName = Literal["argmax", "expectation", "median", "topk_mean", "window", "auto"]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Greedy generation in batches. ``readout`` fills ``bbox_2d`` of a prediction; every readout is kept beside it."""

    readout: ReadoutName = "auto"
    batch_size: int = 32
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.max_new_tokens < 1:
            raise ValueError("decode.batch_size and decode.max_new_tokens: expected at least 1")
