"""Options of the ``evaluate`` section."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """``bootstrap`` resamples of the images give the 95 % intervals (0: none).

    ``expect`` holds lower bounds by results key; ``best`` in a key stands for the best readout. A run says
    of each whether it was reached, and exits with code 1 when one was not.
    """

    bootstrap: int = 1000
    seed: int = 0
    expect: dict[str, float] = field(default_factory=dict)
