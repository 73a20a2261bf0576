"""The row pass as one kernel: a program a row, an online logsumexp and then the gradient over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coordexp.losses.rows import RestStats, RowInputs

_BLOCK = 8192


@triton.jit
def _rest_kernel(
    logits, stride, columns, labels, label_logits, lse_coords, plus, minus, out_max, out_lse, out_lse_1, out_above,
    num_coord, inverse_tau,
    TWO: tl.constexpr, TOP5: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    is_coord = row < num_coord
    scale = tl.where(is_coord, inverse_tau, 1.0)
    label_logit = tl.load(label_logits + row)
    # Finite, so that a first block of -inf alone (the slice) gives 0 and not NaN.
    top = -1.0e30
    total = 0.0
    total_1 = 0.0
    above = 0
    for start in range(0, columns, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = tl.load(logits + cols, mask=cols < columns, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp((top - new) * scale) + tl.sum(tl.exp((z - new) * scale), axis=0)
        if TWO:
            total_1 = total_1 * tl.exp(top - new) + tl.sum(tl.exp(z - new), axis=0)
        if TOP5:
            above += tl.sum((z > label_logit).to(tl.int32), axis=0)
        top = new
    lse = top * scale + tl.log(total)
    tl.store(out_max + row, top)
    tl.store(out_lse + row, lse)
    if TWO:
        tl.store(out_lse_1 + row, top + tl.log(total_1))
    if TOP5:
        tl.store(out_above + row, above)
    if GRADIENT:
        difference = lse - tl.load(lse_coords + row)
        outside = 1.0 / (1.0 + tl.exp(-difference))
        inside = 1.0 / (1.0 + tl.exp(difference))
        plus_row = tl.load(plus + row)
        factor = (plus_row * outside - tl.load(minus + row) * inside) / total
        label = tl.load(labels + row)
        # A coordinate's label lies in the slice, whose columns the caller fills.
        at_label = tl.where(is_coord, 0.0, plus_row)
        for start in range(0, columns, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            z = tl.load(logits + cols, mask=cols < columns, other=-float("inf")).to(tl.float32)
            gradient = factor * tl.exp((z - top) * scale) - tl.where(cols == label, at_label, 0.0)
            tl.store(logits + cols, gradient.to(logits.dtype.element_ty), mask=cols < columns)


def rest_pass(logits: Tensor, r: RowInputs) -> RestStats:
    """As :func:`coordexp.losses.rows.rest_pass`; float32 inside whatever the type of ``logits`` ``[c, V]``."""
    rows, columns = logits.shape
    maximum, lse, lse_1 = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    above = torch.empty(rows, dtype=torch.int32, device=logits.device)
    two = r.temperature != 1.0
    if rows:
        _rest_kernel[(rows,)](
            logits, logits.stride(0), columns, r.labels, r.label_logit, r.lse_coord, r.plus, r.minus, maximum, lse, lse_1, above,
            r.num_coord, 1.0 / r.temperature,
            TWO=two, TOP5=r.top5, GRADIENT=r.gradient, BLOCK=min(_BLOCK, triton.next_power_of_2(columns)), num_warps=16,
        )  # fmt: skip
    return RestStats(maximum, lse, lse_1 if two else lse, above if r.top5 else None)
