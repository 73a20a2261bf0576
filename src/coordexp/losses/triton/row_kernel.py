"""The row pass as one kernel: a program a row, an online logsumexp and then the gradient over the logits."""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from coordexp.losses.rows import RestStats, RowInputs

# Decision 16 has the estimate: with 32 warps a multiprocessor works on one row, whose second reading then comes from the L2 cache,
# and two loads of 16 bytes a thread are enough to keep the memory busy.
_WARPS: Final = 32
_LANES: Final = 2048
_LOAD_BYTES: Final = 16
# Columns are read in whole vectors: triton assumes that where a number is a multiple of this.
_MULTIPLE: Final = 16

_LOG2_E = tl.constexpr(1.4426950408889634)


# What varies from chunk to chunk is no reason to compile again: alignment of slices of the rows, the number of coordinates.
@triton.jit(
    do_not_specialize=["num_coord"], do_not_specialize_on_alignment=["labels", "label_logits", "lse_coords", "plus", "minus"]
)  # fmt: skip
def _rest_kernel(
    logits, stride, columns, labels, label_logits, lse_coords, plus, minus, out_max, out_lse, out_lse_1, out_above,
    num_coord, inverse_tau,
    TWO: tl.constexpr, TOP5: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    is_coord = row < num_coord
    scale = tl.where(is_coord, inverse_tau, 1.0)
    rate = scale * _LOG2_E
    label_logit = tl.load(label_logits + row)
    SIZE: tl.constexpr = LANES * WIDTH
    cols = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    blocks = tl.cdiv(columns, SIZE)
    # A running maximum and sum per lane, each within one thread: the loop has no barrier.
    # The maximum starts finite, so that a first block of -inf alone (the slice) gives 0 and not NaN.
    top = tl.full([LANES], -1.0e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    total_1 = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.int32)
    following = tl.load(logits + cols, mask=cols < columns, other=-float("inf"))
    for block in range(blocks):
        z = following.to(tl.float32)
        ahead = cols + (block + 1) * SIZE
        following = tl.load(logits + ahead, mask=ahead < columns, other=-float("inf"))
        new = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp2((top - new) * rate) + tl.sum(tl.exp2((z - new[:, None]) * rate), axis=1)
        if TWO:
            total_1 = total_1 * tl.exp2((top - new) * _LOG2_E) + tl.sum(tl.exp2((z - new[:, None]) * _LOG2_E), axis=1)
        if TOP5:
            above += tl.sum((z > label_logit).to(tl.int32), axis=1)
        top = new
    best = tl.max(top, axis=0)
    whole = tl.sum(total * tl.exp2((top - best) * rate), axis=0)
    lse = best * scale + tl.log(whole)
    tl.store(out_max + row, best)
    tl.store(out_lse + row, lse)
    if TWO:
        tl.store(out_lse_1 + row, best + tl.log(tl.sum(total_1 * tl.exp2((top - best) * _LOG2_E), axis=0)))
    if TOP5:
        tl.store(out_above + row, tl.sum(above, axis=0))
    if GRADIENT:
        difference = lse - tl.load(lse_coords + row)
        outside = 1.0 / (1.0 + tl.exp(-difference))
        inside = 1.0 / (1.0 + tl.exp(difference))
        plus_row = tl.load(plus + row)
        factor = (plus_row * outside - tl.load(minus + row) * inside) / whole
        label = tl.load(labels + row).to(tl.int32)
        # A coordinate's label lies in the slice, whose columns the caller fills.
        at_label = tl.where(is_coord, 0.0, plus_row)
        # Backwards: what was read last is in the cache still. Nothing reads the result before the whole chunk is written.
        for block in range(blocks):
            here = cols + (blocks - 1 - block) * SIZE
            z = tl.load(logits + here, mask=here < columns, other=-float("inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = factor * tl.exp2((z - best) * rate) - tl.where(here == label, at_label, 0.0)
            tl.store(logits + here, gradient.to(logits.dtype.element_ty), mask=here < columns, eviction_policy="evict_first")


def rest_pass(logits: Tensor, r: RowInputs) -> RestStats:
    """As :func:`coordexp.losses.rows.rest_pass`; float32 inside whatever the type of ``logits`` ``[c, V]``.

    Rows must lie a multiple of 16 apart; between V and the next such multiple they are overwritten.

    Raises:
        ValueError: another distance.
    """
    rows = logits.shape[0]
    maximum, lse, lse_1 = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    above = torch.empty(rows, dtype=torch.int32, device=logits.device)
    two = r.temperature != 1.0
    if rows:
        padded = _padded(logits)
        width = _LOAD_BYTES // logits.element_size()
        lanes = min(_LANES, triton.next_power_of_2(padded.shape[1]) // width)
        _rest_kernel[(rows,)](
            padded, padded.stride(0), padded.shape[1], r.labels, r.label_logit, r.lse_coord, r.plus, r.minus, maximum, lse, lse_1, above,
            r.num_coord, 1.0 / r.temperature,
            TWO=two, TOP5=r.top5, GRADIENT=r.gradient, LANES=lanes, WIDTH=width, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return RestStats(maximum, lse, lse_1 if two else lse, above if r.top5 else None)


def _padded(logits: Tensor) -> Tensor:
    """The same rows ``[c, W]``, W the next multiple of 16, with -inf in the new columns: they add nothing and get no gradient."""
    columns, stride = logits.shape[1], logits.stride(0)
    if stride % _MULTIPLE or logits.stride(1) != 1:
        raise ValueError(f"rows of logits must lie a multiple of {_MULTIPLE} elements apart, got strides {logits.stride()}")
    # Fails, rather than writing elsewhere, where the last row has no such columns.
    padded = logits.as_strided((logits.shape[0], -(-columns // _MULTIPLE) * _MULTIPLE), (stride, 1))
    padded[:, columns:] = -torch.inf
    return padded
