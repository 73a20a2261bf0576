"""The terms of the objective and their closed-form gradients, as pure functions of coordinate positions.

``z`` ``[N, K]`` are the logits of the coordinate slice in float32 or wider, ``tau`` the temperature,
``log_p = log_softmax(z / tau)``, ``p`` its exponential, ``q`` the soft target; ``L_C``, ``L_R`` are the
logsumexp over the slice and over the rest of the vocabulary at one temperature. Values are per position
``[N]``; ``*_gradient`` is the derivative in ``z`` ``[N, K]``. ``docs/math.md`` derives them.

A new term is a value, a gradient and a line in ``SLICE_TERMS`` here, and a weight in ``CoordObjective``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True)
class CoordSlice:
    """What a slice term sees: ``logits`` ``[N, K]``, true ``bins`` ``[N]`` int64, real ``centers`` ``[N]``, target
    ``q`` ``[N, K]``, and the distribution at the training temperature (``log_p``, ``p``, ``lse``) and at 1 (``*_1``)."""

    logits: Tensor
    bins: Tensor
    centers: Tensor
    q: Tensor
    temperature: float
    log_p: Tensor
    p: Tensor
    lse: Tensor
    log_p_1: Tensor
    p_1: Tensor
    lse_1: Tensor

    @staticmethod
    def of(logits: Tensor, bins: Tensor, centers: Tensor, q: Tensor, temperature: float) -> CoordSlice:
        """The slice's distributions from its logits; nothing is computed twice where the temperature is 1."""
        lse_1 = torch.logsumexp(logits, dim=-1)
        log_p_1 = logits - lse_1[:, None]
        p_1 = log_p_1.exp()
        log_p, p, lse = log_p_1, p_1, lse_1
        if temperature != 1.0:
            scaled = logits / temperature
            lse = torch.logsumexp(scaled, dim=-1)
            log_p = scaled - lse[:, None]
            p = log_p.exp()
        return CoordSlice(logits, bins, centers, q, temperature, log_p, p, lse, log_p_1, p_1, lse_1)


@dataclass(frozen=True)
class SliceTerm:
    """A term of the slice alone: its value ``[N]`` and the value's gradient in the slice logits ``[N, K]``."""

    value: Callable[[CoordSlice], Tensor]
    gradient: Callable[[CoordSlice], Tensor]


# Of a slice pass: term values [n], the weighted gradient [n, K] if asked for.
SliceOutcome = tuple[dict[str, Tensor], Tensor | None]


def soft_ce(log_p: Tensor, q: Tensor) -> Tensor:
    """``-sum_k q_k log p_k`` in nats; its floor is ``H(q)``. Where ``q_k = 0`` the term is 0."""
    return -torch.where(q > 0, q * log_p, torch.zeros_like(q)).sum(dim=-1)


def soft_ce_gradient(p: Tensor, q: Tensor, *, tau: float) -> Tensor:
    """``(p - q) / tau``."""
    return (p - q) / tau


def target_entropy(q: Tensor) -> Tensor:
    """``H(q) = -sum_k q_k log q_k`` in nats, the floor of :func:`soft_ce`; ``kl = soft_ce - H(q)``."""
    return -torch.special.xlogy(q, q).sum(dim=-1)


def ce(log_p_1: Tensor, bins: Tensor) -> Tensor:
    """Hard cross-entropy inside the slice at tau = 1, ``-log softmax(z)[t]``, nats.

    ``ce + gate`` at tau = 1 is ordinary full-vocabulary cross-entropy.
    """
    return -log_p_1.gather(-1, bins[:, None]).squeeze(-1)


def ce_gradient(p_1: Tensor, bins: Tensor) -> Tensor:
    """``softmax(z)_k - [k = t]``."""
    return p_1.scatter_add(-1, bins[:, None], torch.full_like(p_1[:, :1], -1.0))


def w1(p: Tensor, q: Tensor) -> Tensor:
    """Wasserstein-1 distance ``sum_k |P_k - Q_k|`` of the two CDFs, in bins. Improper as a lone objective."""
    return (p - q).cumsum(dim=-1).abs().sum(dim=-1)


def w1_gradient(p: Tensor, q: Tensor, *, tau: float) -> Tensor:
    """``p_k (g_k - gbar) / tau`` with ``g_k = sum_{j >= k} sign(P_j - Q_j)``, ``gbar = sum_k p_k g_k``."""
    return _cdf_gradient(p, torch.sign((p - q).cumsum(dim=-1)), tau)


def crps(p: Tensor, centers: Tensor) -> Tensor:
    """Continuous ranked probability score of the step CDF against the continuous truth c, in bins.

    ``sum_k (P_k - H_k)^2 + H_k (1 - H_k)`` with ``H_k = clip(k + 1 - c, 0, 1)``: the exact integral of
    ``(F(x) - 1[x >= c])^2``. Proper (Gneiting and Raftery 2007).
    """
    step = _truth_cdf(p, centers)
    return ((p.cumsum(dim=-1) - step).square() + step * (1.0 - step)).sum(dim=-1)


def crps_gradient(p: Tensor, centers: Tensor, *, tau: float) -> Tensor:
    """As :func:`w1_gradient` with ``2 (P_j - H_j)`` in the place of the sign."""
    return _cdf_gradient(p, 2.0 * (p.cumsum(dim=-1) - _truth_cdf(p, centers)), tau)


def entropy(log_p: Tensor) -> Tensor:
    """``-sum p log p`` in nats; a positive weight sharpens the distribution."""
    return -(log_p.exp() * log_p).sum(dim=-1)


def entropy_gradient(log_p: Tensor, p: Tensor, *, tau: float) -> Tensor:
    """``-p (log p + entropy) / tau``."""
    return -p * (log_p + entropy(log_p)[:, None]) / tau


def variance(p: Tensor) -> Tensor:
    """``sum_k p_k (k - mu)^2`` with ``mu = sum_k p_k k``, in bins squared."""
    return (p * _squared_offset(p)).sum(dim=-1)


def variance_gradient(p: Tensor, *, tau: float) -> Tensor:
    """``p ((k - mu)^2 - variance) / tau``."""
    offset = _squared_offset(p)
    return p * (offset - (p * offset).sum(dim=-1, keepdim=True)) / tau


def gate(lse_coord: Tensor, lse_rest: Tensor) -> Tensor:
    """``-log(mass of the slice) = softplus(L_R - L_C)``, nats, never negative.

    Gradient: ``softmax(z_all / tau) / tau`` over the rest, ``-(1 - m) p / tau`` in the slice, ``m`` the mass.
    """
    return _softplus(lse_rest - lse_coord)


def text_gate(lse_coord: Tensor, lse_rest: Tensor) -> Tensor:
    """``-log(1 - mass of the slice) = softplus(L_C - L_R)`` at text positions, tau = 1, nats.

    Gradient: ``m softmax(z_C)`` in the slice, ``-m softmax(z_R)`` over the rest.
    """
    return _softplus(lse_coord - lse_rest)


def text_ce(lse_all: Tensor, label_logit: Tensor) -> Tensor:
    """Ordinary cross-entropy ``logsumexp(z) - z_y`` over the full vocabulary at tau = 1, nats."""
    return lse_all - label_logit


def outside_mass(lse_coord: Tensor, lse_rest: Tensor) -> Tensor:
    """``1 - m = sigmoid(L_R - L_C)``: probability outside the slice, without cancellation."""
    return torch.sigmoid(lse_rest - lse_coord)


SLICE_TERMS: Final[dict[str, SliceTerm]] = {
    "ce": SliceTerm(lambda s: ce(s.log_p_1, s.bins), lambda s: ce_gradient(s.p_1, s.bins)),
    "soft_ce": SliceTerm(lambda s: soft_ce(s.log_p, s.q), lambda s: soft_ce_gradient(s.p, s.q, tau=s.temperature)),
    "w1": SliceTerm(lambda s: w1(s.p, s.q), lambda s: w1_gradient(s.p, s.q, tau=s.temperature)),
    "crps": SliceTerm(lambda s: crps(s.p, s.centers), lambda s: crps_gradient(s.p, s.centers, tau=s.temperature)),
    "entropy": SliceTerm(lambda s: entropy(s.log_p), lambda s: entropy_gradient(s.log_p, s.p, tau=s.temperature)),
    "variance": SliceTerm(lambda s: variance(s.p), lambda s: variance_gradient(s.p, tau=s.temperature)),
}


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``. torch's own becomes linear beyond 20, an error of 2e-9 in value and gradient."""
    return torch.logaddexp(x, torch.zeros_like(x))


def _bins(p: Tensor) -> Tensor:
    return torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)


def _truth_cdf(p: Tensor, centers: Tensor) -> Tensor:
    return (_bins(p)[None, :] + 1.0 - centers.to(p.dtype)[:, None]).clamp(0.0, 1.0)


def _squared_offset(p: Tensor) -> Tensor:
    k = _bins(p)
    return (k[None, :] - (p * k).sum(dim=-1, keepdim=True)).square()


def _cdf_gradient(p: Tensor, slope: Tensor, tau: float) -> Tensor:
    """Gradient of a function of the CDF with ``slope_j = d value / d P_j``; a constant in g drops out, so no flip."""
    g = slope - slope.cumsum(dim=-1)
    return p * (g - (p * g).sum(dim=-1, keepdim=True)) / tau
