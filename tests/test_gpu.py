"""What only a GPU can show: memory, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import CoordObjective
from heads import DEVICE, make_head, on_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
IMPLS = ["chunked", "triton"]
BUDGET_MB = 16


def _call(head, impl):
    """Labels, centres and counts on the host."""
    return linear_coord_loss(
        head.hidden, head.weight, head.labels, coord_start=head.start, num_bins=head.bins, objective=CoordObjective(temperature=0.9),
        centers=head.centers, impl=impl, logits_budget_mb=BUDGET_MB,
    )  # fmt: skip


def _large():
    head = on_device(make_head(t=4000, coords=1500, vocabulary=20_030, bins=1000, start=19_030, width=64).to(torch.bfloat16))
    head.hidden.requires_grad_()
    head.weight.requires_grad_()
    return head


@pytest.mark.parametrize("impl", IMPLS)
def test_memory_is_the_budget_the_gradients_and_a_few_slices(impl):
    head = _large()
    _call(head, impl).loss.backward()  # compiles; cuBLAS takes its workspace
    head.hidden.grad = head.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _call(head, impl).loss.backward()
    used = torch.cuda.max_memory_allocated() - before
    rows, width = head.hidden.shape
    gradients = 20_030 * width * (4 + 2) + 3 * rows * width * 2
    slices = 40 * min(rows, BUDGET_MB * 2**20 // (20_032 * 2)) * 1000 * 4
    # Plain torch works on float32 copies of the chunk.
    copies = {"triton": 1, "chunked": 7}[impl]
    assert used < copies * BUDGET_MB * 2**20 + gradients + slices


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_waits_for_the_device(impl):
    head = _large()
    _call(head, impl).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _call(head, impl).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
