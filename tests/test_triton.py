"""The triton kernels against the plain torch passes: in triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from coordexp.losses import terms
from coordexp.losses.objective import CoordObjective
from coordexp.losses.triton import slice_kernel
from heads import ALL, make_head, relative, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(head):
    for name in ("hidden", "weight", "bias"):
        setattr(head, name, vars(head)[name].to(DEVICE))
    return head


def small(**kwargs):
    return on_device(make_head(t=24, coords=9, ignored=3, **kwargs).to(torch.float32))


@pytest.mark.parametrize(
    ("tau", "start", "options"),
    [
        (1.0, 53, {}),
        (0.3, 0, {"with_bias": True}),
        (2.5, 25, {"chunk": 5, "grad_output": 0.37}),
    ],
)
def test_kernels_equal_the_plain_passes(tau, start, options):
    head = small(start=start)
    objective = CoordObjective(**ALL, temperature=tau, alpha=0.1)
    theirs, ours = run(head, objective, "chunked", **options), run(head, objective, "triton", **options)
    assert ours.output.loss.item() == pytest.approx(theirs.output.loss.item(), rel=2e-6)
    for name, gradient in theirs.gradients.items():
        assert relative(ours.gradients[name], gradient) <= 5e-6, name
    for name in theirs.output.sums:
        assert ours.output.sums.sum(name).item() == pytest.approx(theirs.output.sums.sum(name).item(), rel=1e-5, abs=1e-5), name
    for name, value in theirs.output.diagnostics.items():
        torch.testing.assert_close(ours.output.diagnostics[name], value, rtol=1e-5, atol=1e-4, equal_nan=True, msg=name)


def test_a_thousand_bins_and_several_blocks_of_columns():
    head = on_device(make_head(t=7, coords=4, ignored=1, vocabulary=9500, bins=1000, start=0).to(torch.float32))
    objective = CoordObjective(ce=0.3, crps=0.05, w1=0.05, temperature=0.9)
    theirs, ours = run(head, objective, "chunked"), run(head, objective, "triton")
    assert ours.output.loss.item() == pytest.approx(theirs.output.loss.item(), rel=2e-6)
    for name, gradient in theirs.gradients.items():
        assert relative(ours.gradients[name], gradient) <= 5e-6, name


def test_evaluation_and_trained_rows_only():
    head = small()
    rows = head.weight[head.start : head.start + head.bins] + 0.1
    for options in ({"train": ()}, {"train": ("rows",), "rows": rows}):
        theirs, ours = run(head, CoordObjective(**ALL), "chunked", **options), run(head, CoordObjective(**ALL), "triton", **options)
        assert ours.output.loss.item() == pytest.approx(theirs.output.loss.item(), rel=2e-6)
        assert ours.gradients.keys() == theirs.gradients.keys()
        for name, gradient in theirs.gradients.items():
            assert relative(ours.gradients[name], gradient) <= 5e-6, name


def test_the_slice_kernel_knows_every_term_we_ship():
    assert set(slice_kernel.SCALED) == set(terms.SLICE_TERMS)


def test_float64_is_refused_not_rounded():
    with pytest.raises(ValueError, match="float32"):
        run(make_head(t=5, coords=2, ignored=1), CoordObjective(), "triton")


def test_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="CUDA"):
        run(make_head(t=5, coords=2, ignored=1).to(torch.float32), CoordObjective(), "triton")
