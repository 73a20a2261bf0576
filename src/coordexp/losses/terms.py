"""The terms of the objective as pure functions of one position's logits; values are per position ``[N]``.

``s`` are the coordinate-slice logits over the temperature, ``z_C / tau``, ``[N, K]`` in float32 or wider;
``log_p = log_softmax(s)``; ``L_C``, ``L_R`` are the logsumexp over the slice and over the rest of the
vocabulary at one temperature. Gradients are autograd's here; ``docs/math.md`` gives their closed forms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_ce(log_p: Tensor, q: Tensor) -> Tensor:
    """``-sum_k q_k log p_k`` in nats; its floor is ``H(q)``. Where ``q_k = 0`` the term is 0."""
    return -torch.where(q > 0, q * log_p, torch.zeros_like(q)).sum(dim=-1)


def target_entropy(q: Tensor) -> Tensor:
    """``H(q) = -sum_k q_k log q_k`` in nats, the floor of :func:`soft_ce`; ``kl = soft_ce - H(q)``."""
    return -torch.special.xlogy(q, q).sum(dim=-1)


def ce(slice_logits: Tensor, bins: Tensor) -> Tensor:
    """Hard cross-entropy inside the slice at tau = 1, ``-log softmax(z_C)[t]``, nats; ``bins`` ``[N]`` int64.

    ``ce + gate`` at tau = 1 is ordinary full-vocabulary cross-entropy.
    """
    return F.cross_entropy(slice_logits, bins, reduction="none")


def w1(p: Tensor, q: Tensor) -> Tensor:
    """Wasserstein-1 distance ``sum_k |P_k - Q_k|`` of the two CDFs, in bins. Improper as a lone objective."""
    return (p - q).cumsum(dim=-1).abs().sum(dim=-1)


def crps(p: Tensor, centers: Tensor) -> Tensor:
    """Continuous ranked probability score of the step CDF against the continuous truth c, in bins.

    ``sum_k (P_k - H_k)^2 + H_k (1 - H_k)`` with ``H_k = clip(k + 1 - c, 0, 1)``: the exact integral of
    ``(F(x) - 1[x >= c])^2``. Proper (Gneiting and Raftery 2007).
    """
    k = torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)
    step = (k[None, :] + 1.0 - centers.to(p.dtype)[:, None]).clamp(0.0, 1.0)
    return ((p.cumsum(dim=-1) - step).square() + step * (1.0 - step)).sum(dim=-1)


def gate(lse_coord: Tensor, lse_rest: Tensor) -> Tensor:
    """``-log(mass of the slice) = softplus(L_R - L_C)``, nats, never negative."""
    return F.softplus(lse_rest - lse_coord)


def text_gate(lse_coord: Tensor, lse_rest: Tensor) -> Tensor:
    """``-log(1 - mass of the slice) = softplus(L_C - L_R)`` at text positions, tau = 1, nats."""
    return F.softplus(lse_coord - lse_rest)


def entropy(log_p: Tensor) -> Tensor:
    """``-sum p log p`` in nats; a positive weight sharpens the distribution."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def variance(p: Tensor) -> Tensor:
    """``sum_k p_k (k - mu)^2`` with ``mu = sum_k p_k k``, in bins squared."""
    k = torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)
    mean = (p * k).sum(dim=-1, keepdim=True)
    return (p * (k[None, :] - mean).square()).sum(dim=-1)


def text_ce(lse_all: Tensor, label_logit: Tensor) -> Tensor:
    """Ordinary cross-entropy ``logsumexp(z) - z_y`` over the full vocabulary at tau = 1, nats."""
    return lse_all - label_logit
