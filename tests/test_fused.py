"""The fused objective against the eager specification: gradients, chunking, precision, memory, what it never does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from coordexp.losses import chunked, linear
from coordexp.losses.objective import TERMS, CoordObjective
from heads import ALL, DEVICE, make_head, on_device, relative, run, textbook


def same(a, b, tolerance):
    assert abs(a.output.loss - b.output.loss).item() <= tolerance
    assert a.gradients.keys() == b.gradients.keys()
    for name, gradient in a.gradients.items():
        assert (gradient - b.gradients[name]).abs().max().item() <= tolerance, name
    for name in a.output.sums:
        scale = 1 + abs(b.output.sums.sum(name).item())
        assert abs(a.output.sums.sum(name) - b.output.sums.sum(name)).item() <= tolerance * scale, name
        assert a.output.sums.count(name) == b.output.sums.count(name), name
    assert a.output.diagnostics.keys() == b.output.diagnostics.keys()
    for name, value in a.output.diagnostics.items():
        torch.testing.assert_close(value, b.output.diagnostics[name], rtol=tolerance, atol=10 * tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("start", [0, 25, 53])
def test_all_terms_together_equal_autograd_in_float64(tau, start):
    head = make_head(start=start)
    objective = CoordObjective(**ALL, temperature=tau, alpha=0.1)
    for options in ({}, {"with_bias": True, "train": ("hidden", "weight", "bias")}, {"grad_output": 0.37}):
        same(run(head, objective, "chunked", **options), run(head, objective, "eager", **options), 1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_equals_autograd_in_float64(term, tau):
    head = make_head(seed=1)
    objective = CoordObjective(**{name: 0.0 for name in TERMS} | {term: 0.7}, temperature=tau, normalization="token")
    same(run(head, objective, "chunked"), run(head, objective, "eager"), 1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 13, 500])
def test_the_chunk_size_changes_nothing(chunk):
    head = make_head()
    objective = CoordObjective(**ALL, temperature=0.8)
    same(run(head, objective, "chunked", chunk=chunk), run(head, objective, "eager"), 1e-12)


@pytest.mark.parametrize("coords", [0, 52])
def test_rows_of_one_kind_only(coords):
    """No coordinate at all, nothing but coordinates."""
    head = make_head(coords=coords, t=57, ignored=5)
    objective = CoordObjective(**ALL, temperature=0.8)
    same(run(head, objective, "chunked", chunk=9), run(head, objective, "eager"), 1e-12)


@pytest.mark.parametrize("train", [("hidden",), ("weight",), ("rows",), ("hidden", "rows"), ("bias",), ()])
def test_only_what_trains_gets_a_gradient(train):
    head = make_head()
    rows = head.weight[head.start : head.start + head.bins] + 0.1 if "rows" in train else None
    options = {"rows": rows, "train": train, "with_bias": True}
    same(run(head, CoordObjective(**ALL), "chunked", **options), run(head, CoordObjective(**ALL), "eager", **options), 1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_float32_is_within_rounding_of_float64(tau):
    head = make_head(t=200, coords=70, vocabulary=1003, bins=200, start=700, width=24, scale=0.3)
    objective = CoordObjective(ce=0.3, crps=0.02, w1=0.05, text_gate=0.4, temperature=tau)
    exact, single = run(head, objective, "eager"), run(head.to(torch.float32), objective, "chunked", chunk=31)
    assert single.output.loss.item() == pytest.approx(exact.output.loss.item(), rel=1e-6)
    for name in ("hidden", "weight"):
        assert relative(single.gradients[name], exact.gradients[name]) <= 2e-6, name


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_float32_on_sharp_logits_errs_no_more_than_float32_autograd(tau):
    head = make_head(t=200, coords=70, vocabulary=1003, bins=200, start=700, width=24)
    objective = CoordObjective(ce=0.3, crps=0.02, w1=0.05, text_gate=0.4, temperature=tau)
    single = head.to(torch.float32)
    exact, ours, theirs = run(head, objective, "eager"), run(single, objective, "chunked", chunk=31), run(single, objective, "eager")
    for name in ("hidden", "weight"):
        assert relative(ours.gradients[name], exact.gradients[name]) <= 1.1 * relative(theirs.gradients[name], exact.gradients[name]), name


@pytest.mark.parametrize("into_slice", [True, False])
def test_mass_near_one_and_near_zero_keeps_the_gate_exact(into_slice):
    head = make_head()
    axis = torch.zeros_like(head.hidden[0])
    axis[0] = 1.0
    head.hidden[:, 0] = 12.0 if into_slice else -12.0
    head.weight[head.start : head.start + head.bins] += axis
    objective = CoordObjective(text_gate=0.1)
    exact, single = run(head, objective, "eager"), run(head.to(torch.float32), objective, "chunked")
    mass = exact.output.diagnostics["mass"][: exact.output.num_coord]
    assert (mass > 0.99).float().mean() > 0.3 if into_slice else (mass < 0.01).float().mean() > 0.3
    gates = (single.output.sums.sum("gate").item(), exact.output.sums.sum("gate").item())
    assert gates[0] == pytest.approx(gates[1], rel=1e-5)
    for name in ("hidden", "weight"):
        assert relative(single.gradients[name], exact.gradients[name]) <= 2e-6, name


def test_logits_of_ten_thousand_stay_finite_and_right():
    head = make_head(scale=1000.0)
    assert (head.hidden @ head.weight.T).abs().max() > 1e4
    objective = CoordObjective(ce=0.3, crps=0.02)
    exact, single = run(head, objective, "eager"), run(head.to(torch.float32), objective, "chunked")
    assert single.output.loss.item() == pytest.approx(exact.output.loss.item(), rel=1e-3)
    for name in ("hidden", "weight"):
        assert torch.isfinite(single.gradients[name]).all()
        assert relative(single.gradients[name], exact.gradients[name]) <= 1e-3, name


def test_truncate_zero_is_hard_cross_entropy_at_the_nearest_bin():
    head = make_head()
    soft = run(head, CoordObjective(truncate=0, text_ce=0.0, gate=0.0), "chunked")
    hard = run(head, CoordObjective(ce=1.0, soft_ce=0.0, text_ce=0.0, gate=0.0), "chunked")
    nearest = torch.floor(head.centers.nan_to_num() + 0.5).long() + head.start
    assert (nearest == head.labels)[~head.centers.isnan()].all()
    assert soft.output.loss.item() == pytest.approx(hard.output.loss.item(), rel=1e-14)
    for name, gradient in soft.gradients.items():
        torch.testing.assert_close(gradient, hard.gradients[name], rtol=0, atol=1e-15)


def test_two_backward_passes_accumulate_like_one_over_everything():
    head = make_head(t=60)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    whole = run(head, CoordObjective(**ALL), "eager")
    text, coord = whole.output.sums.count("text_ce"), whole.output.sums.count("ce")
    for part in (slice(0, 25), slice(25, 60)):
        linear.linear_coord_loss(
            hidden[part], weight, head.labels[part], coord_start=head.start, num_bins=head.bins, objective=CoordObjective(**ALL),
            centers=head.centers[part], normalizer=linear.Normalizer(text=text, coord=coord), impl="chunked",
        ).loss.backward()  # fmt: skip
    torch.testing.assert_close(hidden.grad, whole.gradients["hidden"], rtol=0, atol=1e-14)
    torch.testing.assert_close(weight.grad, whole.gradients["weight"], rtol=0, atol=1e-14)


def test_a_second_backward_through_one_loss_is_refused_not_wrong():
    head = make_head()
    hidden = head.hidden.clone().requires_grad_()
    loss = linear.linear_coord_loss(hidden, head.weight, head.labels, coord_start=25, num_bins=40, objective=CoordObjective()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already used"):
        loss.backward()


def test_autocast_leaves_float32_weights_and_their_precision_alone():
    head = make_head().to(torch.float32)
    plain = run(head, CoordObjective(**ALL), "chunked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(head, CoordObjective(**ALL), "chunked")
    assert cast.gradients["weight"].dtype == torch.float32
    same(cast, plain, 0.0)


@pytest.mark.parametrize("low", [False, True])
def test_bfloat16_errs_no_more_than_the_textbook_in_bfloat16(low, monkeypatch):
    """Also with products in bfloat16, as on a GPU."""
    head = make_head(t=256, coords=90, vocabulary=1003, bins=200, start=700, width=32, scale=2.0)
    objective = CoordObjective(sigma=2.0)
    rounded = head.to(torch.bfloat16)
    exact = run(rounded.to(torch.float64), objective, "eager")
    if low:
        monkeypatch.setattr(chunked, "_FLOAT32_IS_FASTER", frozenset())
    ours = run(rounded, objective, "chunked", chunk=64)
    theirs = textbook(rounded, objective)
    for name in ("hidden", "weight"):
        assert ours.gradients[name].dtype == torch.bfloat16
        budget = relative(theirs[name], exact.gradients[name])
        assert relative(ours.gradients[name], exact.gradients[name]) <= budget + 1e-5, (name, budget)
    assert ours.output.loss.item() == pytest.approx(exact.output.loss.item(), rel=2e-3 if low else 1e-6)


class _Types(TorchDispatchMode):
    """Types of the products with all ``columns`` of the vocabulary, and the type that each product of elements is computed in."""

    def __init__(self, columns=0):
        super().__init__()
        self.columns, self.matrices, self.scales = columns, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.mm and self.columns in (args[0].shape[1], args[1].shape[1]):
            self.matrices.append(args[0].dtype)
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_):
            self.scales.append(torch.result_type(*args))
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_autocast_decides_the_type_of_the_products_where_float32_is_not_faster(monkeypatch):
    """Float32 weights under bfloat16 autocast."""
    monkeypatch.setattr(chunked, "_FLOAT32_IS_FASTER", frozenset())
    head = make_head(t=200, coords=70, vocabulary=1003, bins=200, start=700, width=24)
    objective = CoordObjective(sigma=2.0)
    exact, single = run(head, objective, "eager"), on_device(head.to(torch.float32))
    with torch.autocast(DEVICE, dtype=torch.bfloat16), _Types(columns=1003) as seen:
        ours = run(single, objective, "chunked", chunk=31, train=("hidden",))
    assert seen.matrices == [torch.bfloat16] * 2 * 4, "logits and dh, four chunks"
    assert ours.gradients["hidden"].dtype == torch.float32
    assert 1e-4 < relative(ours.gradients["hidden"].cpu(), exact.gradients["hidden"]) < 1e-2, "as from bfloat16"
    with torch.autocast(DEVICE, dtype=torch.bfloat16), _Types(columns=93) as seen:
        wide = on_device(make_head())
        same(run(wide, objective, "chunked"), run(wide, objective, "eager"), 1e-12)
    assert set(seen.matrices) == {torch.float64}, "as everywhere under autocast"


@pytest.mark.gpu
@pytest.mark.parametrize("grad_output", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_of_a_gradient_is_not_rounded_to_its_type(dtype, grad_output, monkeypatch):
    """1/52 in bfloat16 is 0.3 % off, for every element alike: what a CUDA device makes of a scalar tensor."""
    monkeypatch.setattr(chunked, "_FLOAT32_IS_FASTER", frozenset())
    rounded = on_device(make_head().to(dtype))
    hidden, weight = rounded.hidden.clone().requires_grad_(), rounded.weight.clone().requires_grad_()
    loss = linear.linear_coord_loss(
        hidden, weight, rounded.labels, coord_start=25, num_bins=40, objective=CoordObjective(), centers=rounded.centers, impl="chunked"
    ).loss
    with _Types() as seen:
        (loss * grad_output).backward()
    assert set(seen.scales) <= {torch.float32, torch.float64}
    exact = run(rounded.to(torch.float64), CoordObjective(), "eager", grad_output=grad_output).gradients
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        got, true = leaf.grad.double(), exact[name]
        along = (got * true).sum() / true.square().sum()
        assert abs(along.item() - 1) < 1e-3, "no common factor"
        assert relative(got, true) < (6e-3 if dtype == torch.bfloat16 else 1e-3)


class _Watch(TorchDispatchMode):
    """Sizes of all results, and the operators that read a value back to the host."""

    def __init__(self):
        super().__init__()
        self.sizes, self.reads, self.inputs = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select", "aten.equal", "unique")):
            self.reads.append(str(func))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self.inputs:
                self.sizes.append(value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",), ()])
def test_no_full_logits_no_needless_dw_and_no_wait_for_the_host(train, monkeypatch):
    head = make_head(t=300, coords=100, vocabulary=4000, bins=40, start=25, width=8).to(torch.float32)
    watch = _Watch()

    def watched(x):
        watch.inputs.add(x.weight.untyped_storage().data_ptr())  # its views are no new memory
        with watch:
            return chunked.chunked(x)

    monkeypatch.setattr(linear, "implementation", lambda name, device: watched)
    run(head, CoordObjective(**ALL, temperature=0.9), "chunked", chunk=16, train=train, top5=False)
    supervised, buffer = 295, 16 * 4032
    assert max(watch.sizes) == buffer < supervised * 4000
    assert (4000 * 8 in watch.sizes) == ("weight" in train), "dW is made only where the weight trains"
    assert not watch.reads


def test_a_sharded_weight_is_refused():
    from torch import distributed
    from torch.distributed.tensor import DTensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        head = make_head()
        head.weight = DTensor.from_local(head.weight, init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded"):
            linear.linear_coord_loss(head.hidden, head.weight, head.labels, coord_start=25, num_bins=40, objective=CoordObjective())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits_budget_mb": 0}, "logits_budget_mb must be positive"),
        ({"num_bins": 93, "coord_start": 0}, "do not fit a vocabulary of 93"),
        ({"coord_start": 60}, r"\[60, 100\) do not fit a vocabulary of 93"),
        ({"bias": torch.zeros(3)}, r"bias must have shape \[93\], got \[3\]"),
        ({"coord_weight": torch.zeros(40, 3)}, r"coord_weight must have shape \[40, 12\], got \[40, 3\]"),
        ({"extents": torch.full((57,), -1.0)}, "extents must be 0 or more bins"),
        ({"extents": torch.zeros(3)}, r"extents must have shape \[57\]"),
        ({"centers": torch.zeros(57, dtype=torch.bfloat16)}, r"centers must be float32 or float64, got torch.bfloat16"),
        ({"centers": torch.zeros(57, dtype=torch.float16)}, r"centers must be float32 or float64, got torch.float16"),
        ({"extents": torch.zeros(57, dtype=torch.bfloat16)}, r"extents must be float32 or float64, got torch.bfloat16"),
    ],
)
def test_bad_input_names_both_sides(change, words):
    head = make_head()
    arguments = {"coord_start": 25, "num_bins": 40, "objective": CoordObjective()} | change
    with pytest.raises(ValueError, match=words):
        linear.linear_coord_loss(head.hidden, head.weight, head.labels, **arguments)


def test_a_new_term_reaches_every_implementation_through_one_table(monkeypatch):
    """As docs/math.md shows it: a value, a gradient, a weight."""
    from coordexp.losses import terms

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithPeak(CoordObjective):
        peak: float = 0.0

    def value(s):
        return s.p.square().sum(-1)

    def gradient(s):
        return 2 * s.p * (s.p - value(s)[:, None]) / s.temperature

    monkeypatch.setitem(terms.SLICE_TERMS, "peak", terms.SliceTerm(value, gradient))
    monkeypatch.setattr("coordexp.losses.objective.TERMS", (*TERMS, "peak"))
    head, objective = make_head(), WithPeak(peak=0.5, temperature=0.8)
    assert "peak" in objective.active
    same(run(head, objective, "chunked"), run(head, objective, "eager"), 1e-12)
    assert run(head, objective, "chunked").output.loss != run(head, WithPeak(temperature=0.8), "chunked").output.loss
