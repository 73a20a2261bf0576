"""Soft targets over the coordinate bins: ``q[n, k] >= 0``, each row sums to 1.

``centers`` ``[N]`` are real bin positions, ``sigma`` ``[N]`` positive widths in bins. Every target is cut
at ``|k - c| > truncate`` (the nearest bin is always kept) and renormalised, also where the vocabulary ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coordexp.losses.objective import CoordObjective


def sigma_for(objective: CoordObjective, centers: Tensor, extents: Tensor | None) -> Tensor:
    """Target width per position ``[N]``, in bins: ``sigma``, or ``clip(alpha * extent, sigma_min, sigma_max)``.

    Raises:
        ValueError: ``alpha`` is set and ``extents`` is None.
    """
    if objective.alpha is None:
        return torch.full_like(centers, objective.sigma)
    if extents is None:
        raise ValueError("objective.alpha makes the target size-adaptive: extents [T] are required, got None")
    return (objective.alpha * extents.to(centers.dtype)).clamp(objective.sigma_min, objective.sigma_max)


def soft_target(objective: CoordObjective, centers: Tensor, num_bins: int, extents: Tensor | None = None) -> Tensor:
    """Target distributions ``[N, K]`` in the dtype of ``centers``.

    ``gaussian``: density at the bins, ``exp(-(k - c)^2 / 2 sigma^2)``. ``hl_gauss``: Gaussian integrated
    over each bin (Imani and White 2018; Farebrother et al. 2024); use it below a sigma of about 1.5.
    ``two_hot``: linear weights on the two neighbouring bins (the limit used by distribution focal loss).
    ``one_hot``: the nearest bin, halves up.
    """
    sigma = sigma_for(objective, centers, extents)[:, None]
    offset = torch.arange(num_bins, device=centers.device, dtype=centers.dtype)[None, :] - centers[:, None]
    if objective.target == "gaussian":
        log_q = -0.5 * (offset / sigma).square()
    elif objective.target == "hl_gauss":
        log_q = _log_normal_mass((offset - 0.5) / sigma, (offset + 0.5) / sigma)
    elif objective.target == "two_hot":
        log_q = torch.log((1.0 - offset.abs()).clamp_min(0.0))
    else:
        log_q = torch.full_like(offset, -torch.inf)
    nearest = torch.floor(centers + 0.5).long().clamp(0, num_bins - 1)[:, None]
    if objective.target == "one_hot":
        log_q = log_q.scatter(-1, nearest, 0.0)
    limit = truncation(objective, sigma)
    if limit is not None:
        cut = offset.abs() > limit
        cut = cut.scatter(-1, nearest, False)
        log_q = log_q.masked_fill(cut, -torch.inf)
    return torch.softmax(log_q, dim=-1)


def truncation(objective: CoordObjective, sigma: Tensor) -> Tensor | float | None:
    """Cut distance in bins: ``truncate``; ``ceil(4 sigma)`` per position when ``alpha`` is set; else None."""
    if objective.truncate is not None:
        return float(objective.truncate)
    return None if objective.alpha is None else torch.ceil(4.0 * sigma)


def _log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """``log(Phi(high) - Phi(low))`` without cancellation, computed in the lower tail by symmetry."""
    flip = low > 0
    a, b = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + torch.log1p(-torch.exp(log_a - log_b))
