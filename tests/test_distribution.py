"""Readouts and statistics against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp import distribution as d


def _random(m=40, k=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(m, k, generator=generator, dtype=torch.float64), -1)


def _slow(p):
    rows = []
    for row in p.tolist():
        k = range(len(row))
        mode = max(k, key=lambda i: (row[i], -i))
        cdf, total = 0.0, None
        for i in k:
            if total is None and cdf + row[i] >= 0.5 * sum(row):
                total = i - 0.5 + (0.5 * sum(row) - cdf) / row[i]
            cdf += row[i]
        best = sorted(k, key=lambda i: -row[i])[:10]
        near = [i for i in k if abs(i - mode) <= 16]
        rows.append(
            {
                "argmax": mode,
                "expectation": sum(i * row[i] for i in k),
                "median": total,
                "topk_mean": sum(i * row[i] for i in best) / sum(row[i] for i in best),
                "window": sum(i * row[i] for i in near) / sum(row[i] for i in near),
            }
        )
    return rows


@pytest.mark.parametrize("name", ["argmax", "expectation", "median", "topk_mean", "window"])
def test_readout_equals_a_plain_loop(name):
    p = _random()
    expected = torch.tensor([float(row[name]) for row in _slow(p)], dtype=torch.float64)
    torch.testing.assert_close(d.READOUTS[name](p), expected, rtol=0, atol=1e-10)


def _normal(center, width, k=200):
    bins = torch.arange(k, dtype=torch.float64)
    return torch.softmax(-0.5 * ((bins - center) / width) ** 2, -1)[None]


def test_auto_is_the_window_for_one_mode_and_the_median_for_several():
    one, two = _normal(50.3, 4), 0.6 * _normal(50, 4) + 0.4 * _normal(140, 4)
    assert d.modes(torch.cat([one, two])).tolist() == [1, 2]
    assert d.auto(one).item() == d.window(one).item()
    assert d.auto(two).item() == d.median(two).item()


def test_continuous_readouts_recover_a_centre_between_bins():
    for name in ("expectation", "median", "window", "topk_mean"):
        assert d.READOUTS[name](_normal(50.3, 3)).item() == pytest.approx(50.3, abs=0.02 if name != "topk_mean" else 0.3)


def test_stray_mass_moves_the_expectation_but_neither_median_nor_window():
    p = 0.95 * _normal(50, 2) + 0.05 * _normal(190, 1)
    assert d.expectation(p).item() > 56
    assert abs(d.median(p).item() - 50) < 0.3
    assert abs(d.window(p).item() - 50) < 1e-6
    assert d.tail_mass(p).item() == pytest.approx(0.05, abs=1e-6)


def test_statistics_of_a_known_distribution():
    p = torch.tensor([[0.25, 0.25, 0.5, 0.0]], dtype=torch.float64)
    assert d.entropy(p).item() == pytest.approx(1.5 * math.log(2))
    assert d.std(p).item() == pytest.approx(math.sqrt(0.6875))
    assert d.pit(p, torch.tensor([1.0], dtype=torch.float64)).item() == pytest.approx(0.25 + 0.5 * 0.25)


def test_pit_is_uniform_when_truth_is_drawn_from_the_distribution():
    generator = torch.Generator().manual_seed(0)
    p = _random(m=4000, k=30, seed=1)
    k = torch.multinomial(p, 1, generator=generator).squeeze(-1)
    truth = k + torch.rand(4000, generator=generator, dtype=torch.float64) - 0.5
    values = d.pit(p, truth).sort().values
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (values - uniform).abs().max() < 1.63 / math.sqrt(4000)  # Kolmogorov-Smirnov, 1 %


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"\[M, K\]"):
        d.expectation(torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", [*d.READOUTS.values(), d.modes, d.entropy, d.std, d.tail_mass, lambda p: d.pit(p, torch.zeros(40))])
def test_types_that_cannot_tell_the_bins_apart_are_refused(call, dtype):
    assert torch.arange(1000).to(torch.bfloat16).unique().numel() == 507
    with pytest.raises(ValueError, match=r"must be float32 or float64, got torch\.(bfloat16|float16): convert the logits"):
        call(_random().to(dtype))
    call(_random().float())
