"""Options of the ``evaluate`` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """``bootstrap`` resamples of the images give the 95 % intervals (0: none)."""

    bootstrap: int = 1000
    seed: int = 0
