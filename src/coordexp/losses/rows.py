"""The row pass in plain torch: logsumexp over the rest of the vocabulary, and the gradient written over the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from coordexp.losses.terms import outside_mass

# Rows worked on together, in bytes of float32: they should stay in the cache; on a GPU launches cost more than that.
_BLOCK_BYTES: Final = {"cpu": 4 << 20, "cuda": 256 << 20}


@dataclass(frozen=True)
class RowInputs:
    """One chunk of ``c`` rows, the first ``num_coord`` of them coordinates (temperature ``temperature``, the others 1).

    ``label_logit`` ``[c]``; ``lse_coord`` ``[c]`` at the row's temperature. ``plus`` and ``minus`` ``[c]`` give the gradient
    over the rest, ``(plus (1 - m) - minus m) softmax(z_R)``, and ``-plus`` at a text label.
    """

    num_coord: int
    temperature: float
    labels: Tensor
    label_logit: Tensor
    lse_coord: Tensor
    plus: Tensor
    minus: Tensor
    gradient: bool


@dataclass(frozen=True)
class RestStats:
    """Over the rest of the vocabulary, per row ``[c]``: ``maximum``; ``lse`` at the row's temperature and ``lse_1`` at 1;
    ``above``, the number of logits greater than the label's."""

    maximum: Tensor
    lse: Tensor
    lse_1: Tensor
    above: Tensor


def rest_pass(logits: Tensor, r: RowInputs) -> RestStats:
    """Statistics of ``logits`` ``[c, V]`` (the slice's columns hold -inf); overwrites them, with the gradient if asked for."""
    wide = r.label_logit.dtype
    rows = max(1, _BLOCK_BYTES.get(logits.device.type, 64 << 20) // (logits.shape[1] * wide.itemsize))
    parts = []
    # Blocks do not straddle the two kinds of row: a block has one temperature.
    for start, stop, temperature in ((0, r.num_coord, r.temperature), (r.num_coord, logits.shape[0], 1.0)):
        for a in range(start, stop, rows):
            block = slice(a, min(a + rows, stop))
            parts.append(_block(logits[block], r, block, temperature))
    if not parts:
        parts.append(_block(logits, r, slice(0, 0), 1.0))
    return RestStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _block(logits: Tensor, r: RowInputs, rows: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    label = r.label_logit[rows, None]
    z = logits.to(label.dtype)  # the logits themselves, in place, where they are wide already
    top = z.amax(dim=-1, keepdim=True)
    above = (z > label).sum(dim=-1)
    z.sub_(top)
    lse_1 = None
    if temperature != 1.0:
        lse_1 = top + z.exp().sum(dim=-1, keepdim=True).log()
        z.mul_(1.0 / temperature)
    total = z.exp_().sum(dim=-1, keepdim=True)
    lse = top / temperature + total.log()
    if r.gradient:
        outside = outside_mass(r.lse_coord[rows, None], lse)
        inside = outside_mass(lse, r.lse_coord[rows, None])
        z.mul_((r.plus[rows, None] * outside - r.minus[rows, None] * inside) / total)
        if rows.start >= r.num_coord:
            z.scatter_add_(1, r.labels[rows, None], -r.plus[rows, None])
        if z is not logits:
            logits.copy_(z)
    return tuple(v.squeeze(-1) for v in (top, lse, lse if lse_1 is None else lse_1, above[:, None]))  # type: ignore[return-value]
