"""The triton kernels against the plain torch passes: in triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from coordexp.losses import chunked, rows, terms
from coordexp.losses.objective import CoordObjective
from coordexp.losses.triton import row_kernel, slice_kernel
from heads import ALL, DEVICE, make_head, on_device, relative, run, textbook

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_err_no_more_than_the_textbook_in_them(dtype, monkeypatch):
    """Logits in the type of the inputs, as on a GPU, in several chunks."""
    monkeypatch.setattr(chunked, "_FLOAT32_IS_FASTER", frozenset())
    head = on_device(make_head(t=48, coords=18, ignored=3, vocabulary=203, bins=64, start=100, width=16, scale=2.0).to(dtype))
    objective = CoordObjective(sigma=2.0)
    exact = run(head.to(torch.float64), objective, "eager")
    ours, theirs = run(head, objective, "triton", chunk=10), textbook(head, objective)
    assert ours.output.loss.item() == pytest.approx(exact.output.loss.item(), rel=2e-3)
    for name in ("hidden", "weight"):
        assert ours.gradients[name].dtype == dtype
        assert relative(ours.gradients[name], exact.gradients[name]) <= relative(theirs[name], exact.gradients[name]) + 1e-5, name


@pytest.mark.parametrize("columns", [93, 96, 97, 3001])
def test_what_lies_between_the_vocabulary_and_the_stride_counts_for_nothing(columns):
    generator = torch.Generator().manual_seed(0)
    buffer = torch.full((6, -(-columns // 64) * 64), torch.nan, device=DEVICE)
    buffer[:, :columns] = torch.randn(6, columns, generator=generator).to(DEVICE)
    buffer[:, 5:11] = -torch.inf
    plain = buffer[:, :columns].clone()
    labels = torch.tensor([6, 7, columns - 1, 0, 3, 20], device=DEVICE)
    label_logit = plain.gather(1, labels[:, None]).squeeze(1)
    label_logit[:2] = 0.5
    inputs = rows.RowInputs(
        num_coord=2, temperature=0.7, labels=labels, label_logit=label_logit, lse_coord=torch.randn(6, generator=generator).to(DEVICE),
        plus=torch.rand(6, generator=generator).to(DEVICE), minus=torch.rand(6, generator=generator).to(DEVICE), gradient=True, top5=True,
    )  # fmt: skip
    ours, theirs = row_kernel.rest_pass(buffer[:, :columns], inputs), rows.rest_pass(plain, inputs)
    for name in ("maximum", "lse", "lse_1", "above"):
        torch.testing.assert_close(vars(ours)[name], vars(theirs)[name], rtol=2e-6, atol=1e-6, check_dtype=False, msg=name)
    torch.testing.assert_close(buffer[:, :columns], plain, rtol=2e-6, atol=1e-6)


def test_rows_that_cannot_be_read_in_vectors_are_refused():
    with pytest.raises(ValueError, match=r"multiple of 16 elements apart, got strides \(93, 1\)"):
        row_kernel._padded(torch.zeros(3, 93))
    with pytest.raises(RuntimeError, match="storage"):
        row_kernel._padded(torch.zeros(3 * 96 - 3).as_strided((3, 93), (96, 1)))


def test_the_slice_kernel_knows_every_term_we_ship():
    assert set(slice_kernel.SCALED) == set(terms.SLICE_TERMS)


def test_float64_is_refused_not_rounded():
    with pytest.raises(ValueError, match="float32"):
        run(make_head(t=5, coords=2, ignored=1), CoordObjective(), "triton")


def test_the_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="CUDA"):
        run(make_head(t=5, coords=2, ignored=1).to(torch.float32), CoordObjective(), "triton")
