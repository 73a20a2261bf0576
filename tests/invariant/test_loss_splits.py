"""The loss layer alone, in float64: however positions are split over micro-batches, each term gives the same loss and gradient."""

from __future__ import annotations

import pytest
import torch

from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import TERMS, CoordObjective
from coordexp.losses.sums import LossSums, Normalizer
from heads import ALL, make_head

ROWS = 64
SPLITS = {"1x8": [8] * 8, "8x1": [ROWS], "4x2": [32, 32], "ragged": [5, 31, 1, 27], "a part without coordinates": [40, 24]}


def _run(head, objective, sizes, impl):
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    is_coord = ~head.centers.isnan()
    kept = head.labels != -100
    normalizer = Normalizer(text=(kept & ~is_coord).sum(), coord=is_coord.sum())
    loss, sums, start = torch.zeros((), dtype=torch.float64), LossSums(), 0
    for size in sizes:
        part = slice(start, start + size)
        output = linear_coord_loss(
            hidden[part], weight, head.labels[part], coord_start=head.start, num_bins=head.bins, objective=objective,
            centers=head.centers[part], extents=head.extents[part], normalizer=normalizer, impl=impl,
        )  # fmt: skip
        output.loss.backward()
        loss, sums, start = loss + output.loss.detach(), sums + output.sums, start + size
    return loss, sums, torch.cat([hidden.grad.flatten(), weight.grad.flatten()])


def _head(split):
    head = make_head(t=ROWS, coords=20, ignored=6)
    if split == "a part without coordinates":
        order = torch.cat([torch.nonzero(~head.centers.isnan()), torch.nonzero(head.centers.isnan())]).squeeze(-1)
        for name in ("hidden", "labels", "centers", "extents"):
            setattr(head, name, vars(head)[name][order])
        assert head.centers[40:].isnan().all()
    return head


@pytest.mark.parametrize("split", [name for name in SPLITS if name != "8x1"])
@pytest.mark.parametrize("normalization", ["group", "token"])
@pytest.mark.parametrize("impl", ["eager", "chunked"])
def test_every_term_alone_and_all_together_do_not_see_the_split(split, normalization, impl):
    head = _head(split)
    for terms in ({name: 1.0} for name in TERMS):
        _compare(head, CoordObjective(**{t: 0.0 for t in TERMS} | terms, temperature=0.8, normalization=normalization), split, impl)
    _compare(head, CoordObjective(**ALL, temperature=0.8, alpha=0.1, normalization=normalization), split, impl)


def _compare(head, objective, split, impl):
    loss, sums, gradient = _run(head, objective, SPLITS[split], impl)
    whole_loss, whole_sums, whole = _run(head, objective, SPLITS["8x1"], impl)
    assert abs(loss - whole_loss).item() <= 1e-10 * max(1.0, abs(whole_loss).item())
    assert (gradient - whole).norm() <= 1e-10 * whole.norm()
    # A systematic difference, too small to show in the norm, would add up here.
    assert abs((gradient - whole).mean()) <= 1e-12 * whole.abs().mean()
    for name in whole_sums:
        assert sums.count(name) == whole_sums.count(name), name
        assert abs(sums.sum(name) - whole_sums.sum(name)) <= 1e-10 * (1 + abs(whole_sums.sum(name))), name
