"""Which pair of conventions explains a systematic error of predicted boxes. numpy only.

A model that learned ``bin = u * E`` (``u`` the position as a share of the side, E the scale of the convention the labels
were made with) and is read as ``u' = bin / D`` errs by a straight line, whatever else it errs by:

    u' = (E / D) u - (1/2 / D if the labels were floored else 0)

The probe fits that line to *centres* of matched boxes. A model that draws boxes too large or too small moves the two edges
of a box apart and leaves its centre; so does matching by IoU, which prefers boxes that are too large. Boxes near the border
are left out: a prediction cannot leave the image, which pulls them inwards. What is left to confuse with a convention is
shrinkage: a model that reports the mean of what it believes pulls positions towards the middle by about
``noise^2 / spread^2``; every hypothesis, the healthy one too, may have up to 1.5 times that for free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.codec import CONVENTIONS

Floats = NDArray[np.float64]

# Fewer images or boxes carry no usable standard error.
MIN_IMAGES: Final = 20
MIN_BOXES: Final = 50
# An accusation needs a p value below this for the healthy reading ...
CLEAR: Final = 1e-5
# ... and one above this for the mix-up: a line that fits no pair is another fault.
FITS: Final = 1e-3
# Explanations whose log-likelihoods differ by less than this are all named.
CLOSE: Final = 4.0
_HUBER: Final = 1.5
_BINS: Final = 999.0


@dataclass(frozen=True)
class Pair:
    """Labels made under ``encode``, answers read under ``decode``: ``u' = slope * u + offset``, in shares of the side."""

    encode: str
    decode: str
    slope: float
    offset: float

    @property
    def harmless(self) -> bool:
        """Whether nothing is mixed up: one convention, or two that read alike but for a floor the labels have."""
        return self.slope == 1.0

    def error_bins(self, position: float) -> float:
        """Expected signed error at ``position`` (share of the side), in bins of 1/999 of the side."""
        return ((self.slope - 1) * position + self.offset) * _BINS


def pairs() -> list[Pair]:
    """Every (encode, decode) pair of :data:`coordexp.codec.CONVENTIONS`."""
    return [
        Pair(e, d, encode.scale / decode.scale, -0.5 / decode.scale if encode.floor else 0.0)
        for e, encode in CONVENTIONS.items()
        for d, decode in CONVENTIONS.items()
    ]


@dataclass(frozen=True)
class Line:
    """``error(u) = level + (slope - 1)(u - middle)`` of N centres, in shares of the side; ``covariance [2, 2]`` of (level, slope).

    ``noise`` is the robust standard deviation of a centre's error, ``spread`` that of the true centres.
    """

    level: float
    slope: float
    middle: float
    covariance: Floats
    noise: float
    spread: float
    boxes: int
    images: int

    @property
    def intercept(self) -> float:
        """The error at u = 0."""
        return self.level - (self.slope - 1) * self.middle

    def details(self) -> dict[str, Any]:
        """Slope and intercept in bins of 1/999, with standard errors."""
        at_zero = np.array([1.0, -self.middle])
        return {
            "slope": self.slope,
            "slope_se": float(np.sqrt(self.covariance[1, 1])),
            "intercept_bins": self.intercept * _BINS,
            "intercept_se_bins": float(np.sqrt(at_zero @ self.covariance @ at_zero)) * _BINS,
            "mean_error_bins": self.level * _BINS,
            "mean_error_se_bins": float(np.sqrt(self.covariance[0, 0])) * _BINS,
            "noise_bins": self.noise * _BINS,
            "boxes": self.boxes,
            "images": self.images,
        }


def fit_line(predicted: Floats, true: Floats, image: NDArray[np.int64], axes: tuple[int, ...] = (0, 1)) -> Line | None:
    """The line through centres of matched boxes ``[P, 4]`` in shares of the side, ``axes`` pooled; None with too few.

    Huber's estimate (tuning 1.5 robust standard deviations), standard errors clustered by ``image``.
    """
    low, high = list(axes), [axis + 2 for axis in axes]
    u = (true[:, low] + true[:, high]) / 2
    error = (predicted[:, low] + predicted[:, high]) / 2 - u
    noise = _robust_sd(error.ravel())
    margin = max(0.03, 4 * noise)
    inside = (true[:, low] > margin) & (true[:, high] < 1 - margin)
    groups = np.repeat(image[:, None], len(axes), axis=1)[inside]
    u, error = u[inside], error[inside]
    boxes, images = int(inside.any(axis=1).sum()), len(np.unique(groups))
    if boxes < MIN_BOXES or images < MIN_IMAGES or np.ptp(u) == 0:
        return None
    middle = float(u.mean())
    design = np.stack([np.ones_like(u), u - middle], axis=1)
    theta, scale = np.array([np.median(error), 0.0]), 0.0
    for _ in range(50):
        residual = error - design @ theta
        scale = max(_robust_sd(residual), 1e-7)
        weight = np.minimum(1.0, _HUBER * scale / np.maximum(np.abs(residual), 1e-300))
        step = np.linalg.solve(design.T @ (design * weight[:, None]), design.T @ (weight * residual))
        theta = theta + step
        if np.abs(step).max() < 1e-9:
            break
    residual = error - design @ theta
    psi = np.clip(residual, -_HUBER * scale, _HUBER * scale)
    bread = np.linalg.inv(design.T @ (design * (np.abs(residual) < _HUBER * scale)[:, None]))
    _, index = np.unique(groups, return_inverse=True)
    scores = np.stack([np.bincount(index, weights=design[:, j] * psi, minlength=images) for j in range(2)], axis=1)
    covariance = bread @ (scores.T @ scores) @ bread * images / (images - 1)
    # Exact predictions have no noise: then the arithmetic's own size stands in for it.
    covariance = covariance + np.eye(2) * 1e-14
    return Line(float(theta[0]), 1 + float(theta[1]), middle, covariance, scale, float(u.std()), boxes, images)


def _robust_sd(values: Floats) -> float:
    return float(np.median(np.abs(values - np.median(values))) * 1.4826) if values.size else 0.0


def distance(line: Line, slope: float, offset: float) -> float:
    """Squared distance of the fitted (level, slope) from a hypothesis, in standard errors, after the free shrinkage."""
    level = (slope - 1) * line.middle + offset
    gap = np.array([line.level - level, line.slope - slope])
    precision = np.linalg.inv(line.covariance)
    # Two noisy edges make a centre: an edge's variance is up to twice the centre's.
    free = 3.0 * line.noise**2 / line.spread**2
    shrink = np.array([0.0, -1.0])
    amount = float(np.clip((shrink @ precision @ gap) / (shrink @ precision @ shrink), 0.0, free))
    rest = gap - amount * shrink
    return float(rest @ precision @ rest)


def p_value(squared: float, images: int) -> float:
    """Chance of such a squared distance or more under the hypothesis: Hotelling's T² with two components, ``images - 1`` degrees."""
    freedom = images - 2
    f = squared * freedom / (2 * (images - 1))
    return float((1 + 2 * f / freedom) ** (-freedom / 2))


def _fits(pair: Pair, lines: tuple[Line, ...]) -> bool:
    return all(p_value(distance(line, pair.slope, pair.offset), line.images) > FITS for line in lines)


@dataclass(frozen=True)
class Verdict:
    """``healthy``: p value of a straight reading. ``explains``: the pairs that fit, best first, where something is clearly mixed up.

    ``table`` holds every pair with its expected error and p value.
    """

    line: Line
    healthy: float
    explains: tuple[Pair, ...]
    table: list[dict[str, Any]]

    @property
    def clear(self) -> bool:
        """Whether the error is systematic beyond doubt."""
        return self.healthy < CLEAR

    @property
    def floored(self) -> bool:
        """Whether the plain half bin of floored labels is among what fits."""
        return any(pair.harmless for pair in self.explains)


def judge(line: Line, axes: tuple[Line, ...] = ()) -> Verdict:
    """Compare the fitted line with what every pair of conventions would do.

    ``axes``: the lines of x and of y alone. A convention shows on both; what shows on one only is another fault.
    """
    found = [(distance(line, pair.slope, pair.offset), pair) for pair in pairs()]
    healthy = distance(line, 1.0, 0.0)
    table = [
        {
            "encode": pair.encode,
            "decode": pair.decode,
            "slope": pair.slope,
            "offset_bins": pair.offset * _BINS,
            "error_at_middle_bins": pair.error_bins(line.middle),
            "p": p_value(squared, line.images),
        }
        for squared, pair in found
    ]
    p = p_value(healthy, line.images)
    explains: tuple[Pair, ...] = ()
    if p < CLEAR:
        # A pair that reads straight explains nothing that the healthy reading does not.
        able = sorted(((s, q) for s, q in found if (q.slope, q.offset) != (1.0, 0.0)), key=lambda item: item[0])
        best = able[0][0]
        explains = tuple(q for s, q in able if s <= best + 2 * CLOSE and _fits(q, (line, *axes)))
    return Verdict(line, p, explains, table)
