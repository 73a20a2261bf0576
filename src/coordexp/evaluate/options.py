"""Options of the ``evaluate`` section."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from coordexp.evaluate.registry import key_problem


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """``bootstrap`` resamples of the photos give the 95 % intervals (0: none).

    ``match``: ``exact`` compares normalised descriptions; ``semantic`` first renames each predicted description to the
    nearest one of the records, where the cosine similarity under the text model in ``match_model`` is at least
    ``match_similarity``. ``expect`` holds lower bounds by results key; ``best`` in a key stands for the best readout. A run says
    of each whether it was reached, and exits with code 1 when one was not.

    Raises:
        ValueError: an unknown key in ``expect``, with the nearest one there is, or a bound that is no number.
    """

    bootstrap: int = 1000
    seed: int = 0
    match: Literal["exact", "semantic"] = "exact"
    match_model: str | None = None
    match_similarity: float = 0.7
    expect: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.match == "semantic" and self.match_model is None:
            raise ValueError("evaluate.match_model: expected the folder of a text model for semantic matching, got none")
        if self.match == "exact" and self.match_model is not None:
            raise ValueError("evaluate.match_model: a text model is used by semantic matching only: set evaluate.match to semantic")
        if not -1 <= self.match_similarity <= 1:
            raise ValueError(f"evaluate.match_similarity: expected a cosine between -1 and 1, got {self.match_similarity}")
        if self.expect:
            for key, least in self.expect.items():
                problem = key_problem(key)
                if problem is not None:
                    raise ValueError(f"evaluate.expect.{key}: {problem}")
                if not math.isfinite(least):
                    raise ValueError(f"evaluate.expect.{key}: expected a finite lower bound, got {least}")
