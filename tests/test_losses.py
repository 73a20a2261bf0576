"""Terms, targets and the eager objective against plain loops, quadrature and torch's own cross-entropy, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from coordexp.losses import targets, terms
from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import TERMS, CoordObjective
from coordexp.losses.sums import LossSums, Normalizer

K, START, V, D = 40, 25, 90, 12


def _case(t=30, coords=11, ignored=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, D, generator=g, dtype=dtype)
    weight = torch.randn(V, D, generator=g, dtype=dtype)
    labels = torch.randint(0, START, (t,), generator=g)
    order = torch.randperm(t, generator=g)
    labels[order[:coords]] = torch.randint(START, START + K, (coords,), generator=g)
    labels[order[coords : coords + ignored]] = -100
    centers = (labels - START).double() + 0.8 * torch.rand(t, generator=g, dtype=torch.float64) - 0.4
    centers[(labels < START) | (labels >= START + K)] = math.nan
    return hidden, weight, labels, centers.clamp(0, K - 1)


@pytest.fixture(params=["eager", "chunked"], autouse=True)
def impl(request, monkeypatch):
    """Every test of this file holds for both; three rows a chunk where there are chunks."""
    monkeypatch.setitem(_loss.__kwdefaults__, "impl", request.param)


def _loss(case, objective, *, impl="", **kwargs):
    hidden, weight, labels, centers = case
    return linear_coord_loss(
        hidden, weight, labels, coord_start=START, num_bins=K, objective=objective, centers=centers,
        impl=impl, logits_budget_mb=3 * 128 * 8 / 2**20, **kwargs,
    )  # fmt: skip


def _softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def _slow_terms(z, label, center, tau, sigma):
    """One row, plain Python floats."""
    if not START <= label < START + K:
        p = _softmax(z)
        mass = sum(p[START : START + K])
        return {"text_ce": -math.log(p[label]), "text_gate": -math.log1p(-mass)}
    p = _softmax([v / tau for v in z[START : START + K]])
    raw = [math.exp(-((k - center) ** 2) / (2 * sigma**2)) for k in range(K)]
    q = [v / sum(raw) for v in raw]
    w1 = crps = cp = cq = 0.0
    for k in range(K):
        cp, cq = cp + p[k], cq + q[k]
        w1 += abs(cp - cq)
        # Exact integral over x in [k, k+1) of (F(x) - 1[x >= c])^2 with a step CDF F = cp there.
        below = min(max(center - k, 0.0), 1.0)
        crps += below * cp**2 + (1 - below) * (cp - 1) ** 2
    mean = sum(k * v for k, v in enumerate(p))
    full = _softmax([v / tau for v in z])
    return {
        "ce": -math.log(_softmax(z[START : START + K])[label - START]),
        "soft_ce": -sum(a * math.log(b) for a, b in zip(q, p, strict=True)),
        "w1": w1,
        "crps": crps,
        "gate": -math.log(sum(full[START : START + K])),
        "entropy": -sum(v * math.log(v) for v in p),
        "variance": sum(v * (k - mean) ** 2 for k, v in enumerate(p)),
    }


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_every_term_equals_a_plain_loop(tau):
    case = _case()
    output = _loss(case, CoordObjective(temperature=tau, sigma=1.7))
    hidden, weight, labels, centers = case
    logits = (hidden @ weight.T).tolist()
    expected: dict[str, list[float]] = {}
    for row, label, center in zip(logits, labels.tolist(), centers.tolist(), strict=True):
        if label != -100:
            for name, value in _slow_terms(row, label, center, tau, 1.7).items():
                expected.setdefault(name, []).append(value)
    assert set(expected) == set(TERMS)
    for name, values in expected.items():
        assert output.sums.sum(name).item() == pytest.approx(sum(values), rel=1e-12), name
        assert output.sums.count(name).item() == len(values), name


def test_each_weight_and_normalisation_enters_the_loss_once():
    case = _case()
    base = _loss(case, CoordObjective()).sums
    text, coord = base.count("text_ce").item(), base.count("ce").item()
    for name in TERMS:
        for normalization in ("group", "token"):
            objective = CoordObjective(**{t: 0.0 for t in TERMS} | {name: 0.7}, normalization=normalization)
            group = text if name.startswith("text") else coord
            denominator = group if normalization == "group" else text + coord
            expected = 0.7 * base.sum(name).item() / denominator
            assert _loss(case, objective).loss.item() == pytest.approx(expected, rel=1e-12), (name, normalization)


def test_plain_ce_recipe_is_ordinary_cross_entropy_in_loss_and_gradient():
    hidden, weight, labels, centers = _case()
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    _loss((*mine, labels, centers), CoordObjective.plain_ce()).loss.backward()
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    reference = F.cross_entropy(theirs[0] @ theirs[1].T, labels, ignore_index=-100)
    reference.backward()
    assert _loss((*mine, labels, centers), CoordObjective.plain_ce()).loss.item() == pytest.approx(reference.item(), rel=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-14)


def test_closed_form_gradients_of_the_slice_terms_hold():
    """The forms of docs/math.md, in the slice logits, against autograd of the terms."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(6, K, generator=g, dtype=torch.float64, requires_grad=True)
    centers = torch.rand(6, generator=g, dtype=torch.float64) * (K - 1)
    tau = 0.7
    q = targets.soft_target(CoordObjective(sigma=2.0), centers, K)
    log_p = torch.log_softmax(z / tau, -1)
    p = log_p.exp()
    k = torch.arange(K, dtype=torch.float64)
    step = (k + 1 - centers[:, None]).clamp(0, 1)

    def reverse(sign):
        tail = sign.flip(-1).cumsum(-1).flip(-1)
        return p * (tail - (p * tail).sum(-1, keepdim=True)) / tau

    mean = (p * k).sum(-1, keepdim=True)
    spread = (p * (k - mean) ** 2).sum(-1, keepdim=True)
    forms = {
        "soft_ce": (terms.soft_ce(log_p, q), (p - q) / tau),
        "w1": (terms.w1(p, q), reverse(torch.sign((p - q).cumsum(-1)))),
        "crps": (terms.crps(p, centers), reverse(2 * (p.cumsum(-1) - step))),
        "entropy": (terms.entropy(log_p), -p * (log_p + terms.entropy(log_p)[:, None]) / tau),
        "variance": (terms.variance(p), p * ((k - mean) ** 2 - spread) / tau),
    }
    for name, (value, closed) in forms.items():
        (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
        torch.testing.assert_close(gradient, closed.detach(), rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("target", ["gaussian", "hl_gauss", "two_hot", "one_hot"])
@pytest.mark.parametrize("center", [0.0, 0.4, 17.3, 38.9, 39.0])
def test_targets_are_distributions_around_the_centre(target, center):
    c = torch.tensor([center], dtype=torch.float64)
    q = targets.soft_target(CoordObjective(target=target, sigma=1.5), c, K)
    assert q.min() >= 0
    assert q.sum().item() == pytest.approx(1, abs=1e-12)
    assert abs(q.argmax().item() - center) <= 0.5
    if target == "two_hot":
        assert (q @ torch.arange(K, dtype=torch.float64)).item() == pytest.approx(center, abs=1e-12)
    if target == "hl_gauss":
        phi = [0.5 * (1 + math.erf((k - 0.5 - center) / 1.5 / math.sqrt(2))) for k in range(K + 1)]
        mass = torch.tensor([b - a for a, b in pairwise(phi)], dtype=torch.float64)
        torch.testing.assert_close(q[0], mass / mass.sum(), rtol=0, atol=1e-13)


def test_truncation_cuts_keeps_the_nearest_bin_and_renormalises():
    c = torch.tensor([10.4], dtype=torch.float64)
    q = targets.soft_target(CoordObjective(sigma=2.0, truncate=3), c, K)[0]
    assert q.nonzero().squeeze(-1).tolist() == [8, 9, 10, 11, 12, 13]
    assert q.sum().item() == pytest.approx(1)
    zero = targets.soft_target(CoordObjective(sigma=2.0, truncate=0), c, K)[0]
    assert zero.tolist() == [float(k == 10) for k in range(K)]


def test_size_adaptive_sigma_is_clipped_and_needs_extents():
    objective = CoordObjective(alpha=0.1, sigma_min=0.5, sigma_max=4.0)
    sigma = targets.sigma_for(objective, torch.zeros(3), torch.tensor([0.0, 20.0, 900.0]))
    assert sigma.tolist() == [0.5, 2.0, 4.0]
    with pytest.raises(ValueError, match="extents"):
        targets.sigma_for(objective, torch.zeros(3), None)


def test_crps_and_w1_agree_with_an_outside_library_where_they_should():
    scoringrules = pytest.importorskip("scoringrules")
    g = torch.Generator().manual_seed(1)
    members = torch.randint(0, K, (50,), generator=g)
    p = torch.bincount(members, minlength=K).double()[None] / 50
    center = torch.tensor([13.4], dtype=torch.float64)
    theirs = scoringrules.crps_ensemble(13.4, members.double().numpy(), estimator="nrg")
    assert terms.crps(p, center).item() == pytest.approx(float(theirs), rel=1e-9)


def test_nothing_supervised_gives_a_zero_with_a_graph():
    hidden, weight, labels, centers = _case()
    for ignore in (labels >= 0, labels >= START):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        masked = labels.masked_fill(ignore, -100)
        output = _loss((h, w, masked, centers), CoordObjective(text_ce=0.0))
        output.loss.backward()
        assert output.loss.item() == 0.0
        assert h.grad is not None
        assert w.grad is not None


def test_a_split_with_the_whole_normalizer_sums_to_the_whole():
    case = _case(t=40)
    objective = CoordObjective(ce=0.3, w1=0.2, crps=0.1, text_gate=0.4)
    hidden, weight, labels, centers = case
    whole = _loss(case, objective)
    normalizer = Normalizer(text=whole.sums.count("text_ce"), coord=whole.sums.count("ce"))
    pieces = (slice(0, 3), slice(3, 29), slice(29, 40))
    parts = [_loss((hidden[s], weight, labels[s], centers[s]), objective, normalizer=normalizer) for s in pieces]
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    total = parts[0].sums + parts[1].sums + parts[2].sums
    for name in whole.sums:
        assert total.sum(name).item() == pytest.approx(whole.sums.sum(name).item(), rel=1e-12), name


def test_coord_weight_stands_in_for_its_rows_and_gets_their_gradient():
    hidden, weight, labels, centers = _case()
    rows = (weight[START : START + K] + 0.1).clone().requires_grad_()
    merged = weight.clone()
    merged[START : START + K] = rows.detach()
    merged.requires_grad_()
    a = _loss((hidden, weight, labels, centers), CoordObjective(), coord_weight=rows).loss
    b = _loss((hidden, merged, labels, centers), CoordObjective()).loss
    a.backward()
    b.backward()
    assert a.item() == pytest.approx(b.item(), rel=1e-13)
    torch.testing.assert_close(rows.grad, merged.grad[START : START + K], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(0, D)}, "weight is empty"),
        ({"weight": torch.zeros(V, D + 1)}, "width"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels must have shape"),
        ({"labels": torch.full((30,), V)}, "labels must lie in"),
        ({"centers": torch.full((30,), math.nan, dtype=torch.float64)}, "centers must be finite"),
    ],
)
def test_bad_input_names_both_sides(change, words):
    hidden, weight, labels, centers = _case()
    case = {"hidden": hidden, "weight": weight, "labels": labels, "centers": centers} | change
    with pytest.raises(ValueError, match=words):
        _loss(tuple(case[k] for k in ("hidden", "weight", "labels", "centers")), CoordObjective())


def test_unknown_impl_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, chunked, eager, triton"):
        _loss(_case(), CoordObjective(), impl="fast")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sigma", 0.0), ("temperature", 0.0), ("temperature", math.nan), ("gate", math.inf), ("truncate", -1), ("alpha", -1.0)],
)
def test_the_objective_refuses_what_cannot_be_meant(field, value):
    with pytest.raises(ValueError, match=f"objective.{field}"):
        CoordObjective(**{field: value})


def test_sums_with_different_names_do_not_add():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="different names"):
        LossSums.of({"a": (one, one)}) + LossSums.of({"b": (one, one)})
