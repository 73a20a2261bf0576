"""``impl="triton"``: the chunk loop of :mod:`coordexp.losses.chunked` with both passes as kernels."""

from __future__ import annotations

import os

import torch

from coordexp.losses import chunked
from coordexp.losses.linear import HeadInputs, HeadResult
from coordexp.losses.terms import SLICE_TERMS
from coordexp.losses.triton import row_kernel, slice_kernel


def fused(x: HeadInputs) -> HeadResult:
    """CUDA; with ``TRITON_INTERPRET=1``, set before triton is imported, also the CPU, slowly, for tests.

    A term that the slice kernel does not know is no obstacle: all slice terms are then computed in torch.

    Raises:
        ValueError: tensors elsewhere, or float64.
    """
    if not (x.hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(f"impl 'triton' needs tensors on a CUDA device, got {x.hidden.device}: use chunked")
    if x.wide != torch.float32:
        raise ValueError(f"impl 'triton' works in float32, got hidden of {x.hidden.dtype}: use chunked or eager")
    known = set(SLICE_TERMS) <= set(slice_kernel.SCALED)
    return chunked.fused_loss(x, row_pass=row_kernel.rest_pass, slice_pass=slice_kernel.slice_pass if known else chunked.slice_pass)
