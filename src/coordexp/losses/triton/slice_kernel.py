"""The slice pass as one kernel: a program a coordinate row, all terms and the gradient from registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from coordexp.losses.terms import CoordSlice, SliceOutcome

# In the order in which the kernel reads and writes them.
SCALED: Final = ("ce", "soft_ce", "w1", "crps", "entropy", "variance")
VALUES: Final = (*SCALED, "kl")
_WARPS: Final = 4


@triton.jit
def _softmax(z, inside):
    top = tl.max(z, axis=0)
    e = tl.exp(z - top)
    total = tl.sum(e, axis=0)
    lse = top + tl.log(total)
    return e / total, tl.where(inside, z - lse, 0.0)


@triton.jit
def _crps(p, k, center, inside):
    step = tl.minimum(tl.maximum(k + 1.0 - center, 0.0), 1.0)
    difference = tl.where(inside, tl.cumsum(p, axis=0) - step, 0.0)
    return tl.sum(difference * difference + tl.where(inside, step * (1.0 - step), 0.0), axis=0), difference


@triton.jit
def _project(p, slope):
    g = slope - tl.cumsum(slope, axis=0)
    return p * (g - tl.sum(p * g, axis=0))


# What varies from chunk to chunk is no reason to compile again. The number of bins is: known to be a multiple of 4, it is read in vectors.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["bins", "centers"])
def _slice_kernel(
    logits, targets, bins, centers, scales, values, gradient, rows, inverse_tau,
    GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < COLUMNS
    k = index.to(tl.float32)
    offset = row.to(tl.int64) * COLUMNS
    z = tl.load(logits + offset + index, mask=inside, other=-float("inf"))
    q = tl.load(targets + offset + index, mask=inside, other=0.0)
    label = tl.load(bins + row)
    center = tl.load(centers + row)
    p_1, log_p_1 = _softmax(z, inside)
    p, log_p = _softmax(z * inverse_tau, inside)

    is_label = index == label
    nll = -tl.sum(tl.where(is_label, log_p_1, 0.0), axis=0)
    soft = -tl.sum(tl.where(q > 0, q * log_p, 0.0), axis=0)
    floor = -tl.sum(tl.where(q > 0, q * tl.log(tl.where(q > 0, q, 1.0)), 0.0), axis=0)
    ahead = tl.cumsum(p - q, axis=0)
    w1 = tl.sum(tl.where(inside, tl.abs(ahead), 0.0), axis=0)
    crps, ahead_truth = _crps(p, k, center, inside)
    entropy = -tl.sum(p * log_p, axis=0)
    mean = tl.sum(p * k, axis=0)
    squared = (k - mean) * (k - mean)
    variance = tl.sum(p * squared, axis=0)
    tl.store(values + 0 * rows + row, nll)
    tl.store(values + 1 * rows + row, soft)
    tl.store(values + 2 * rows + row, w1)
    tl.store(values + 3 * rows + row, crps)
    tl.store(values + 4 * rows + row, entropy)
    tl.store(values + 5 * rows + row, variance)
    tl.store(values + 6 * rows + row, soft - floor)

    if GRADIENT:
        sign = tl.where(ahead > 0, 1.0, tl.where(ahead < 0, -1.0, 0.0))
        total = tl.load(scales + 1) * (p - q)
        total += tl.load(scales + 2) * _project(p, tl.where(inside, sign, 0.0))
        total += tl.load(scales + 3) * _project(p, 2.0 * ahead_truth)
        total -= tl.load(scales + 4) * p * (log_p + entropy)
        total += tl.load(scales + 5) * p * (squared - variance)
        total = total * inverse_tau + tl.load(scales + 0) * (p_1 - tl.where(is_label, 1.0, 0.0))
        tl.store(gradient + offset + index, total, mask=inside)


def slice_pass(s: CoordSlice, scales: Mapping[str, Tensor], gradient: bool) -> SliceOutcome:
    """As :func:`coordexp.losses.chunked.slice_pass`, for the terms in ``SCALED``; float32."""
    rows, columns = s.logits.shape
    device = s.logits.device
    z, q = s.logits.contiguous(), s.q.contiguous()
    zero = torch.zeros((), dtype=torch.float64, device=device)
    weights = torch.stack([scales.get(name, zero) for name in SCALED]).float()
    values = torch.empty(len(VALUES), rows, dtype=torch.float32, device=device)
    dz = torch.empty_like(z) if gradient else z
    if rows:
        _slice_kernel[(rows,)](
            z, q, s.bins.contiguous(), s.centers.contiguous(), weights, values, dz, rows, 1.0 / s.temperature,
            GRADIENT=gradient, COLUMNS=columns, BLOCK=triton.next_power_of_2(columns), num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dict(zip(VALUES, values, strict=True)), dz if gradient else None
