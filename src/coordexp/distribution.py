"""Readouts and statistics of distributions over coordinate bins. torch only.

``p`` is ``[M, K]``: M distributions over K bins, each row non-negative and summing to 1, in float32 or float64. Readouts
return ``[M]`` real bin positions. Ties go to the lowest bin. Everything raises ValueError for another shape or type: bfloat16
tells only 507 of 1,000 bins apart, and a sum of its probabilities says little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor


def _checked(p: Tensor) -> Tensor:
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"expected distributions of shape [M, K] with K >= 2, got {list(p.shape)}")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"distributions over bins must be float32 or float64, got {p.dtype}: convert the logits before the softmax")
    return p


def _bins(p: Tensor) -> Tensor:
    return torch.arange(_checked(p).shape[1], device=p.device, dtype=p.dtype)


def argmax(p: Tensor) -> Tensor:
    """Most probable bin, the readout of greedy decoding."""
    return _checked(p).argmax(dim=-1).to(p.dtype)


def expectation(p: Tensor) -> Tensor:
    """Mean ``sum_k p_k k``: the Bayes choice under squared error; one per cent of stray mass spoils it."""
    return p @ _bins(p)


def median(p: Tensor) -> Tensor:
    """Median of the piecewise-uniform density in which bin k covers ``[k - .5, k + .5)``.

    ``k - .5 + (.5 - P_{k-1}) / p_k`` with k the first bin whose CDF reaches one half.
    """
    cdf = _checked(p).cumsum(dim=-1)
    half = 0.5 * cdf[:, -1:]
    k = (cdf < half).sum(dim=-1, keepdim=True).clamp_max(p.shape[1] - 1)
    mass = p.gather(-1, k)
    below = cdf.gather(-1, k) - mass
    return (k.to(p.dtype) - 0.5 + (half - below) / mass).squeeze(-1)


def topk_mean(p: Tensor, *, k: int = 10) -> Tensor:
    """Mean over the ``k`` most probable bins, renormalised."""
    values, index = _checked(p).topk(min(k, p.shape[1]), dim=-1)
    return (values * index.to(p.dtype)).sum(dim=-1) / values.sum(dim=-1)


def window(p: Tensor, *, half_width: int = 16) -> Tensor:
    """Expectation within ``half_width`` bins of the mode, renormalised."""
    near = (_bins(p)[None, :] - argmax(p)[:, None]).abs() <= half_width
    kept = p * near
    return (kept @ _bins(p)) / kept.sum(dim=-1)


def modes(p: Tensor, *, threshold: float = 0.1, separation: int = 3) -> Tensor:
    """Number of modes: local maxima above ``threshold`` of the highest, more than ``separation`` bins apart.

    Of two maxima closer than that the higher (then the lower bin) counts once. Returns int64 ``[M]``.
    """
    width = 2 * separation + 1
    padded = torch.nn.functional.pad(_checked(p), (separation, separation), value=-1.0)
    windows = padded.unfold(-1, width, 1)
    highest = windows.max(dim=-1).values
    first = windows[..., :separation].max(dim=-1).values < p
    peak = (p == highest) & first & (p > threshold * p.max(dim=-1, keepdim=True).values)
    return peak.sum(dim=-1)


def auto(p: Tensor, *, half_width: int = 16) -> Tensor:
    """``window`` where the distribution has one mode, ``median`` where it has several."""
    return torch.where(modes(p) > 1, median(p), window(p, half_width=half_width))


READOUTS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "argmax": argmax,
    "expectation": expectation,
    "median": median,
    "topk_mean": topk_mean,
    "window": window,
    "auto": auto,
}


def entropy(p: Tensor) -> Tensor:
    """``-sum p log p`` in nats, with ``0 log 0 = 0``."""
    return -torch.special.xlogy(_checked(p), p).sum(dim=-1)


def std(p: Tensor) -> Tensor:
    """Standard deviation in bins."""
    offset = _bins(p)[None, :] - expectation(p)[:, None]
    return (p * offset.square()).sum(dim=-1).sqrt()


def tail_mass(p: Tensor, *, half_width: int = 16) -> Tensor:
    """Probability farther than ``half_width`` bins from the mode."""
    far = (_bins(p)[None, :] - argmax(p)[:, None]).abs() > half_width
    return (p * far).sum(dim=-1)


def pit(p: Tensor, centers: Tensor) -> Tensor:
    """Probability integral transform ``P_{k-1} + (c + .5 - k) p_k``, k the bin that holds the truth c ``[M]``.

    Uniform on [0, 1] for calibrated distributions.
    """
    k = torch.floor(centers + 0.5).long().clamp(0, _checked(p).shape[1] - 1)[:, None]
    mass = p.gather(-1, k).squeeze(-1)
    below = p.cumsum(dim=-1).gather(-1, k).squeeze(-1) - mass
    return below + (centers + 0.5 - k.squeeze(-1).to(p.dtype)) * mass
