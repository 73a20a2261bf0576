"""``CoordObjective``: which terms are trained, with what weight, towards which target. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal

Target = Literal["gaussian", "hl_gauss", "two_hot", "one_hot"]
Normalization = Literal["group", "token"]

TEXT_TERMS: Final = ("text_ce", "text_gate")
COORD_TERMS: Final = ("ce", "soft_ce", "w1", "crps", "gate", "entropy", "variance")
TERMS: Final = TEXT_TERMS + COORD_TERMS
SPREAD_TERMS: Final = ("entropy", "variance")


@dataclass(frozen=True, kw_only=True)
class CoordObjective:
    """Weights of the terms, the temperature of the coordinate terms, and their soft target.

    The loss is ``sum over terms of weight * sum(l) / count``. With ``normalization="group"`` the text
    terms divide by the number of text positions and the others by the number of coordinate positions;
    with ``"token"`` all divide by the number of supervised positions.

    ``sigma`` is in bins. With ``alpha`` set the target is size-adaptive, per position
    ``clip(alpha * extent, sigma_min, sigma_max)``, and ``sigma`` is unused. ``truncate`` cuts the target
    beyond that many bins from the centre; None means no cut with a fixed ``sigma`` and
    ``ceil(4 sigma)`` with ``alpha``.

    Raises:
        ValueError: a weight that is not finite, or below zero (entropy and variance may be), a temperature or width that is not positive.
    """

    text_ce: float = 1.0
    ce: float = 0.0
    soft_ce: float = 1.0
    w1: float = 0.0
    crps: float = 0.0
    gate: float = 1.0
    text_gate: float = 0.0
    entropy: float = 0.0
    variance: float = 0.0
    temperature: float = 1.0
    target: Target = "gaussian"
    sigma: float = 2.0
    alpha: float | None = None
    sigma_min: float = 0.5
    sigma_max: float = 4.0
    truncate: int | None = None
    normalization: Normalization = "group"

    def __post_init__(self) -> None:
        for name in TERMS:
            if not math.isfinite(self.weight(name)):
                raise ValueError(f"objective.{name}: expected a finite weight, got {self.weight(name)}")
            # Below zero these have no lower bound: training would push the truth away. The spread of a distribution may go either way.
            if name not in SPREAD_TERMS and self.weight(name) < 0:
                raise ValueError(f"objective.{name}: expected a weight of 0 or more, got {self.weight(name)}")
        widths = {"temperature": self.temperature, "sigma": self.sigma, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        if self.alpha is not None:
            widths["alpha"] = self.alpha
        for name, value in widths.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"objective.{name}: expected a positive number, got {value}")
        if not self.active:
            raise ValueError("objective: expected a term with a weight, got 0 for all of them: nothing would be trained")
        if self.sigma_max < self.sigma_min:
            raise ValueError(f"objective.sigma_max: expected at least sigma_min={self.sigma_min}, got {self.sigma_max}")
        if self.truncate is not None and self.truncate < 0:
            raise ValueError(f"objective.truncate: expected 0 or more bins, got {self.truncate}")
        if self.target not in ("gaussian", "hl_gauss", "two_hot", "one_hot"):
            raise ValueError(f"objective.target: expected gaussian, hl_gauss, two_hot or one_hot, got {self.target!r}")
        if self.normalization not in ("group", "token"):
            raise ValueError(f"objective.normalization: expected group or token, got {self.normalization!r}")

    def weight(self, term: str) -> float:
        """Weight of a term by name.

        Raises:
            KeyError: not the name of a term.
        """
        if term not in TERMS:
            raise KeyError(term)
        return float(self.__dict__[term])

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the terms with a weight other than zero, in the order of the fields."""
        return tuple(f.name for f in fields(self) if f.name in TERMS and self.weight(f.name) != 0.0)

    @classmethod
    def plain_ce(cls) -> CoordObjective:
        """The recipe that is ordinary supervised fine-tuning: full-vocabulary cross-entropy, token mean."""
        return cls(text_ce=1.0, ce=1.0, gate=1.0, soft_ce=0.0, temperature=1.0, normalization="token")
