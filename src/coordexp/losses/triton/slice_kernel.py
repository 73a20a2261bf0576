"""The slice pass as one kernel: a program a coordinate row, all terms, diagnostics and the gradient from registers."""

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
DIAGNOSTICS: Final = (
    "nll", "p_gt", "margin", "rank", "argmax_bin", "expected_bin", "median_bin", "window_bin", "topk_bin", "dist_entropy", "dist_std",
    "tail_mass", "modes", "crps_tau1", "pit", "p_gt_ceiling",
)  # fmt: skip


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


@triton.jit
def _slice_kernel(
    logits, targets, stride, bins, centers, scales, values, diagnostics, gradient, rows, columns, inverse_tau,
    GRADIENT: tl.constexpr, HALF_WIDTH: tl.constexpr, TOPK: tl.constexpr, SEPARATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    inside = index < columns
    k = index.to(tl.float32)
    offset = row.to(tl.int64) * stride
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

    best = tl.argmax(p_1, axis=0)
    best_bin = best.to(tl.float32)
    best_p = tl.max(p_1, axis=0)
    true_logit = tl.sum(tl.where(is_label, z, 0.0), axis=0)
    cdf = tl.cumsum(p_1, axis=0)
    half = 0.5 * tl.max(cdf, axis=0)
    middle = tl.minimum(tl.sum(tl.where(inside & (cdf < half), 1, 0), axis=0), columns - 1)
    at_middle = index == middle
    mass = tl.sum(tl.where(at_middle, p_1, 0.0), axis=0)
    below = tl.sum(tl.where(at_middle, cdf, 0.0), axis=0) - mass
    near = tl.where(tl.abs(k - best_bin) <= HALF_WIDTH, p_1, 0.0)
    near_mass = tl.sum(near, axis=0)
    far_mass = tl.sum(p_1 - near, axis=0)
    mean_1 = tl.sum(p_1 * k, axis=0)
    spread = tl.sqrt(tl.sum(p_1 * (k - mean_1) * (k - mean_1), axis=0))

    left = p_1
    top_mass = 0.0
    top_sum = 0.0
    for _ in range(TOPK):
        peak = tl.argmax(left, axis=0)
        height = tl.max(left, axis=0)
        top_mass += height
        top_sum += height * peak.to(tl.float32)
        left = tl.where(index == peak, -1.0, left)

    # A mode is above all bins to its left within the separation, and not below any to its right.
    is_mode = inside & (p_1 > 0.1 * best_p)
    for d in range(1, SEPARATION + 1):
        earlier = tl.load(logits + offset + index - d, mask=inside & (index >= d), other=-float("inf"))
        later = tl.load(logits + offset + index + d, mask=index + d < columns, other=-float("inf"))
        is_mode = is_mode & (earlier < z) & (later <= z)
    crps_1, _unused = _crps(p_1, k, center, inside)

    tl.store(diagnostics + 0 * rows + row, nll)
    tl.store(diagnostics + 1 * rows + row, tl.sum(tl.where(is_label, p_1, 0.0), axis=0))
    tl.store(diagnostics + 2 * rows + row, tl.max(z, axis=0) - true_logit)
    tl.store(diagnostics + 3 * rows + row, tl.sum(tl.where(z > true_logit, 1.0, 0.0), axis=0))
    tl.store(diagnostics + 4 * rows + row, best_bin)
    tl.store(diagnostics + 5 * rows + row, mean_1)
    tl.store(diagnostics + 6 * rows + row, middle.to(tl.float32) - 0.5 + (half - below) / mass)
    tl.store(diagnostics + 7 * rows + row, tl.sum(near * k, axis=0) / near_mass)
    tl.store(diagnostics + 8 * rows + row, top_sum / top_mass)
    tl.store(diagnostics + 9 * rows + row, -tl.sum(p_1 * log_p_1, axis=0))
    tl.store(diagnostics + 10 * rows + row, spread)
    tl.store(diagnostics + 11 * rows + row, far_mass)
    tl.store(diagnostics + 12 * rows + row, tl.sum(tl.where(is_mode, 1.0, 0.0), axis=0))
    tl.store(diagnostics + 13 * rows + row, crps_1)
    home = tl.minimum(tl.maximum(tl.floor(center + 0.5), 0.0), columns - 1.0)
    home_p = tl.sum(tl.where(k == home, p_1, 0.0), axis=0)
    before = tl.sum(tl.where(k < home, p_1, 0.0), axis=0)
    tl.store(diagnostics + 14 * rows + row, before + (center + 0.5 - home) * home_p)
    tl.store(diagnostics + 15 * rows + row, tl.sum(tl.where(is_label, q, 0.0), axis=0))


def slice_pass(s: CoordSlice, scales: Mapping[str, Tensor], gradient: bool, diagnostics: bool) -> SliceOutcome:
    """As :func:`coordexp.losses.chunked.slice_pass`, for the terms in ``SCALED``; float32."""
    rows, columns = s.logits.shape
    device = s.logits.device
    z, q = s.logits.contiguous(), s.q.contiguous()
    zero = torch.zeros((), dtype=torch.float64, device=device)
    weights = torch.stack([scales.get(name, zero) for name in SCALED]).float()
    values = torch.empty(len(VALUES), rows, dtype=torch.float32, device=device)
    at_1 = torch.empty(len(DIAGNOSTICS), rows, dtype=torch.float32, device=device)
    dz = torch.empty_like(z) if gradient else z
    if rows:
        _slice_kernel[(rows,)](
            z, q, columns, s.bins.contiguous(), s.centers.contiguous(), weights, values, at_1, dz, rows, columns,
            1.0 / s.temperature,
            GRADIENT=gradient, HALF_WIDTH=16, TOPK=min(10, columns), SEPARATION=3, BLOCK=triton.next_power_of_2(columns), num_warps=4,
        )  # fmt: skip
    named = dict(zip(VALUES, values, strict=True)), dict(zip(DIAGNOSTICS, at_1, strict=True)) if diagnostics else {}
    return *named, dz if gradient else None
