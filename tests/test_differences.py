"""Intervals, corrections and detectable differences between arms, against simulation and slow definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coordexp.evaluate.bootstrap import Ratio, point, resampled, wilson
from coordexp.runs.differences import Difference, Measured, difference, holm, interval_of


def runs(*seeds):
    """One run a seed."""
    return tuple((seed, 0) for seed in seeds)


def _arm(rng, hard, seed_effects, *, resamples, shift=0.0):
    """An arm whose images have 1 to 4 objects, found with the image's own chance, moved by what the seed adds."""
    objects = 1 + (np.arange(len(hard)) % 4)
    ratios = []
    for effect in seed_effects:
        found = rng.binomial(objects, np.clip(hard + effect + shift, 0.01, 0.99))
        ratios.append(Ratio(found[:, None].astype(float), objects[:, None].astype(float)))
    draws = [resampled({"recall": ratio}, len(hard), resamples=resamples, seed=7)["recall"] for ratio in ratios]
    return Measured(runs(*range(len(ratios))), tuple(point(ratio) for ratio in ratios), np.stack(draws), len(hard), len(hard))


def _contains_zero(seeds, spread, *, images, simulations, resamples):
    rng, inside = np.random.default_rng(seeds * 100 + images), 0
    for _ in range(simulations):
        hard = rng.uniform(0.2, 0.9, images)
        arms = [_arm(rng, hard, rng.normal(0, spread, seeds), resamples=resamples) for _ in range(2)]
        low, high = difference(*arms).interval
        inside += low <= 0 <= high
    return inside / simulations


def test_the_bootstrap_interval_of_two_identical_arms_contains_0_in_95_percent_of_cases():
    share = _contains_zero(1, 0.0, images=150, simulations=800, resamples=800)
    assert 0.93 <= share <= 0.97  # 2.6 standard errors of 800 cases


def test_with_seeds_that_differ_it_still_does_and_an_interval_over_photos_alone_does_not():
    for seeds, spread in ((2, 0.1), (3, 0.05), (5, 0.1)):
        assert _contains_zero(seeds, spread, images=150, simulations=400, resamples=200) >= 0.935
    rng, inside = np.random.default_rng(5), 0
    for _ in range(200):
        hard = rng.uniform(0.2, 0.9, 150)
        low, high = difference(*(_arm(rng, hard, rng.normal(0, 0.05, 3), resamples=400) for _ in range(2))).image_interval
        inside += low <= 0 <= high
    assert inside / 200 < 0.85


def test_pairing_takes_the_difficulty_of_the_images_out():
    rng = np.random.default_rng(2)
    hard = rng.choice([0.02, 0.98], 300)
    a, b = _arm(rng, hard, [0.0], resamples=1000), _arm(rng, hard, [0.0], resamples=1000)
    paired = difference(b, a).interval
    apart = np.percentile(b.draws[0] - a.draws[0][::-1], [2.5, 97.5])
    assert paired[1] - paired[0] < 0.6 * (apart[1] - apart[0])


def test_the_detectable_difference_is_found_in_four_of_five_cases():
    rng = np.random.default_rng(11)
    hard = np.full(150, 0.5)
    pairs = [(_arm(rng, hard, [0.0], resamples=300), _arm(rng, hard, [0.0], resamples=300)) for _ in range(40)]
    effect = float(np.mean([difference(b, a).detectable for a, b in pairs]))
    found = 0
    for _ in range(600):
        a, b = _arm(rng, hard, [0.0], resamples=300), _arm(rng, hard, [0.0], resamples=300, shift=effect)
        low, high = difference(b, a).interval
        found += low > 0 or high < 0
    assert 0.74 <= found / 600 <= 0.86


def test_a_metric_of_one_number_a_run_has_the_paired_t_interval_over_seeds():
    a, b = Measured(runs(0, 1, 2, 3), (1.0, 1.4, 0.9, 1.2)), Measured(runs(0, 1, 2, 3), (1.3, 1.5, 1.4, 1.4))
    got = difference(b, a)
    reference = stats.ttest_rel(b.values, a.values)
    assert got.p == pytest.approx(reference.pvalue, rel=1e-12)
    assert got.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-12)
    assert got.seed_sd == pytest.approx(np.std(np.subtract(b.values, a.values), ddof=1))
    assert got.image_interval is None


def test_seeds_are_paired_by_what_they_are_and_only_those_that_both_arms_have_count():
    draws = np.random.default_rng(0).normal(size=(3, 400))
    a = Measured(runs(0, 1, 2), (1.0, 2.0, 3.0), draws, 50)
    b = Measured(runs(2, 0), (3.5, 1.2), draws[[2, 0]] + 0.5, 50)
    got = difference(b, a)
    assert got.by_seed == pytest.approx((0.2, 0.5))
    assert got.value == pytest.approx(0.35)
    assert got.image_interval == pytest.approx((0.5, 0.5))


def test_other_seeds_are_compared_unpaired_by_welch():
    a, b = Measured(runs(0, 1, 2), (1.0, 1.4, 0.9)), Measured(runs(3, 4, 5, 6), (1.3, 1.9, 1.4, 1.2))
    got, reference = difference(b, a), stats.ttest_ind(b.values, a.values, equal_var=False)
    assert got.by_seed == ()
    assert got.p == pytest.approx(reference.pvalue, rel=1e-12)
    assert got.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-12)


def test_images_and_seeds_add_in_quadrature_and_p_is_the_level_that_reaches_0():
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 80)
    a, b = _arm(rng, hard, [0.0, 0.1, -0.05], resamples=2000), _arm(rng, hard, [0.05, 0.0, 0.0], resamples=2000)
    got = difference(b, a)
    of_images = np.var(b.draws.mean(axis=0) - a.draws.mean(axis=0), ddof=1)
    of_seeds = np.var(np.subtract(b.values, a.values), ddof=1) / 3

    def half(level):
        return math.sqrt(stats.t.ppf(level, 79) ** 2 * of_images + stats.t.ppf(level, 2) ** 2 * of_seeds)

    assert got.interval == pytest.approx((got.value - half(0.975), got.value + half(0.975)), rel=1e-12)
    assert half(1 - got.p / 2) == pytest.approx(abs(got.value), rel=1e-6)
    assert got.detectable == pytest.approx(half(0.975) + half(0.8), rel=1e-12)


def test_one_seed_and_no_images_says_nothing():
    got = difference(Measured(runs(0), (1.0,)), Measured(runs(0), (2.0,)))
    assert (got.value, got.interval, got.p, got.detectable, got.seed_sd) == (-1.0, None, None, None, None)
    assert interval_of(Measured(runs(0), (1.0,))) is None


def test_without_any_variation_a_share_may_still_differ_by_three_in_n_and_an_error_is_unknown():
    values = Measured(runs(0, 1), (0.5, 0.5), np.full((2, 50), 0.5), 20, 20)
    got = difference(values, values)
    bound = 1 - 0.05 ** (1 / 20)
    assert (1 - bound) ** 20 == pytest.approx(0.05)  # what is met at least in 95 of 100 sets of 20 photos
    assert got.interval == pytest.approx((-bound, bound))
    assert (got.value, got.p, got.detectable) == (0.0, 1.0, None)
    other = replace(values, values=(1.0, 1.0), draws=np.ones((2, 50)))
    assert difference(other, values).interval == pytest.approx((0.5 - bound, 0.5 + bound))
    assert difference(other, values).p == stats.binomtest(20, 20).pvalue
    assert interval_of(other) == pytest.approx(wilson(1.0, 20))
    error = replace(values, trials=None)
    assert (difference(error, error).interval, difference(error, error).p, interval_of(error)) == (None, None, None)


def test_repeats_of_one_seed_are_paired_in_their_order():
    a = Measured(((0, 0), (0, 1), (0, 2)), (0.2, 0.4, 0.9))
    b = Measured(((0, 1), (0, 0), (0, 2)), (0.5, 0.3, 1.0))
    assert difference(b, a).by_seed == pytest.approx((0.1, 0.1, 0.1))


def test_a_metric_that_most_resamples_leave_undefined_has_no_interval():
    draws = np.full((1, 100), np.nan)
    draws[0, :20] = 1.0
    got = difference(Measured(runs(0), (1.0,), draws, 5), Measured(runs(0), (1.0,), draws, 5))
    assert (got.interval, got.p) == (None, None)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12))
def test_holm_is_the_step_down_definition(values):
    made = holm([Difference(0.0, (), None, None, None, p, None) for p in values])
    known = sorted(p for p in values if p is not None)
    for d, p in zip(made, values, strict=True):
        if p is None:
            assert d.p_holm is None
            continue
        # The smallest level at which the step-down procedure rejects this hypothesis.
        slow = max(min(1.0, (len(known) - j) * q) for j, q in enumerate(known) if q <= p)
        ties = [min(1.0, (len(known) - j) * q) for j, q in enumerate(known) if q < p or (q == p and j == known.index(p))]
        assert d.p_holm == pytest.approx(max(ties)) or d.p_holm == pytest.approx(slow)
        assert d.shown == (d.p_holm < 0.05)
