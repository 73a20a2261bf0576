"""The probe of predictions: sound models are not accused, every mix-up of conventions that can be seen is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from boxfiles import files
from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.doctor.mixups import Line, Pair, distance, fit_line, judge, p_value, pairs
from coordexp.doctor.predictions import READINGS, check_convention, check_predictions
from coordexp.evaluate.samples import Sample

# What a pair does to a box must not be taken from the code under test: the codec itself is asked.
CODECS = {name: CoordCodec(convention.bins, name) for name, convention in CONVENTIONS.items()}
BIG = [(e, d) for e in CODECS for d in CODECS if (e == "paligemma") != (d == "paligemma")]
# Slopes within a thousandth of 1 and half bins: seen with many boxes and little noise only.
SMALL = [
    ("norm999", "norm1000"), ("norm999", "floor1000"), ("norm1000", "norm999"), ("floor1000", "norm999"),
    ("floor1000", "norm1000"), ("floor1000", "floor1000"),
]  # fmt: skip
INVISIBLE = [("norm999", "norm999"), ("norm1000", "norm1000"), ("norm1000", "floor1000"), ("paligemma", "paligemma")]


def world(seed, images=50, per=4, noise=10.0, encode="norm999", decode="norm999", kind="plain"):
    """Samples in shares of the side: a model that learned ``encode`` up to ``noise`` bins an edge, read by ``decode``."""
    rng = np.random.default_rng([seed, 11])
    made = []
    for i in range(images):
        size = rng.uniform(0.06, 0.4, (per, 2))
        low = rng.uniform(0, 1, (per, 2)) * (1 - size)
        # One in ten touches the border, where a model can err to one side only.
        low = np.where(rng.random((per, 2)) < 0.1, np.where(rng.random((per, 2)) < 0.5, 0, 1 - size), low)
        true = np.concatenate([low, low + size], axis=1)
        learned = CODECS[encode].quantize(true, 1.0)
        error = rng.normal(0, noise, (per, 4)) if kind != "tails" else rng.standard_t(3, (per, 4)) * noise / np.sqrt(3)
        if kind == "inflated":
            error += 5 * np.array([-1, -1, 1, 1])
        if kind == "shrunk":
            # The mean of a posterior: what noise hides is filled in from the prior.
            error += (noise / 280) ** 2 * (500 - learned)
        written = np.clip(np.round(learned + error), 0, CODECS[encode].num_bins - 1)
        found = np.asarray(CODECS[decode].to_pixel(written, 1.0))
        if kind == "crowded":
            found = np.concatenate([found, rng.uniform(0, 0.5, (3, 4)) + np.array([0, 0, 0.5, 0.5])])
        made.append(Sample(str(i), 640, 480, ("a",) * per, true, ("a",) * len(found), {"file": found}, None))
    return made


def named(check):
    return {(pair["encode"], pair["decode"]) for pair in check.details["explains"]}


@pytest.mark.parametrize(("encode", "decode"), BIG)
def test_a_mixed_up_scale_is_found_at_200_boxes_and_ten_bins_of_noise(encode, decode):
    for seed in (1, 2):
        check = check_convention(world(seed, encode=encode, decode=decode))
        assert check.outcome == "fail"
        assert (encode, decode) in named(check)
        assert named(check) <= set(BIG)


@pytest.mark.parametrize(("encode", "decode"), SMALL)
def test_half_bins_and_thousandths_are_found_with_many_boxes_and_little_noise(encode, decode):
    check = check_convention(world(3, images=400, noise=2.0, encode=encode, decode=decode))
    assert check.outcome == ("warning" if (encode, decode) in SMALL[-2:] else "fail")
    assert (encode, decode) in named(check)
    assert len(named(check)) <= 2


@pytest.mark.parametrize(("encode", "decode"), INVISIBLE)
def test_pairs_that_read_alike_are_not_accused(encode, decode):
    check = check_convention(world(4, images=200, noise=2.0, encode=encode, decode=decode))
    assert check.outcome == "ok"


@pytest.mark.parametrize("kind", ["plain", "tails", "inflated", "shrunk", "crowded"])
def test_sound_models_pass_with_matching(kind):
    assert {check_convention(world(seed, kind=kind, per=6)).outcome for seed in range(100, 105)} == {"ok"}


def test_false_alarms_are_rarer_than_one_in_a_hundred():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(600):
        images, per = int(rng.integers(25, 80)), int(rng.integers(3, 9))
        size = rng.uniform(0.03, 0.4, (images * per, 2))
        low = rng.uniform(0, 1, size.shape) * (1 - size)
        true = np.concatenate([low, low + size], axis=1)
        noise, shrink = 10 ** rng.uniform(-3.5, -1.7), rng.random() < 0.5
        image = np.repeat(np.arange(images), per)
        # A part of the error is the image's: a resized picture, a wrong turn of the model.
        error = noise * (rng.standard_t(4, true.shape) + 0.5 * rng.normal(size=(images, 1))[image])
        found = true + error + (shrink * noise**2 / 0.08) * (0.5 - true)
        line = fit_line(found, true, image)
        verdict = judge(line) if line is not None else None
        if verdict is not None:
            p.append(verdict.healthy)
            assert not verdict.clear
    assert len(p) > 500
    # The p values mean what they say, or are too large (shrinkage is free).
    assert np.mean(np.array(p) < 0.05) < 0.08
    assert np.mean(np.array(p) < 0.01) < 0.02


def test_the_line_and_its_errors_agree_with_repeated_simulation():
    slopes, levels, claims = [], [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        low = rng.uniform(0.1, 0.6, (240, 2))
        true = np.concatenate([low, low + 0.2], axis=1)
        found = 1.01 * true - 0.003 + rng.normal(0, 0.01, true.shape)
        line = fit_line(found, true, np.repeat(np.arange(40), 6))
        slopes.append(line.slope)
        levels.append(line.intercept)
        claims.append([line.details()["slope_se"], line.details()["intercept_se_bins"] / 999])
    claimed = np.mean(claims, axis=0)
    for values, truth, error in ((slopes, 1.01, claimed[0]), (levels, -0.003, claimed[1])):
        assert abs(np.mean(values) - truth) < 4 * error / np.sqrt(150)
        assert np.std(values) == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("images", [20, 50, 1000])
def test_p_value_is_hotellings(images):
    for squared in (0.1, 3.0, 40.0):
        n = images - 1
        expected = stats.f.sf(squared * (n - 1) / (2 * n), 2, n - 1)
        assert p_value(squared, images) == pytest.approx(expected, rel=1e-9)


def test_distance_is_the_least_over_all_free_shrinkage():
    rng = np.random.default_rng(5)
    for _ in range(40):
        root = rng.normal(size=(2, 2)) * 0.002
        line = Line(*rng.normal([0, 1], 0.003), 0.5, root @ root.T + 1e-8 * np.eye(2), 0.01, 0.2, 200, 50)
        slope, offset = rng.choice([1.0, 0.999, 1.024]), rng.choice([0.0, -0.0005])
        free = 1.5 * 2 * 0.01**2 / 0.2**2
        best = np.inf
        for amount in np.linspace(0, free, 401):
            gap = np.array([line.level - (slope - 1) * 0.5 - offset, line.slope - slope + amount])
            best = min(best, gap @ np.linalg.solve(line.covariance, gap))
        assert distance(line, slope, offset) == pytest.approx(best, rel=5e-3, abs=1e-5)


def test_every_pair_predicts_what_the_codec_does():
    u = np.linspace(0.1, 0.9, 100_000)
    for pair in pairs():
        read = np.asarray(CODECS[pair.decode].to_pixel(CODECS[pair.encode].quantize(u, 1.0), 1.0))
        slope, intercept = np.polyfit(u, read, 1)
        assert slope == pytest.approx(pair.slope, abs=5e-5)
        assert intercept == pytest.approx(pair.offset, abs=5e-5)
        assert np.mean(read - u) * 999 == pytest.approx(pair.error_bins(0.5), abs=2e-2)


def test_a_shift_that_is_no_convention_is_a_warning_that_names_none():
    samples = [dataclasses.replace(s, pred_boxes={"file": s.pred_boxes["file"] + 0.02}) for s in world(6)]
    check = check_convention(samples)
    assert (check.outcome, named(check)) == ("warning", set())


def test_a_line_on_one_axis_only_is_no_convention():
    samples = []
    for s in world(7, noise=4.0):
        boxes = s.pred_boxes["file"].copy()
        boxes[:, [0, 2]] *= 1023 / 999
        samples.append(dataclasses.replace(s, pred_boxes={"file": boxes}))
    assert named(check_convention(samples)) == set()


def test_the_sentence_names_labels_and_reader():
    seen = check_convention(world(3, images=400, noise=2.0, encode="paligemma", decode="norm999")).seen
    assert "explained by labels of paligemma read as norm999 (chance" in seen


def test_few_boxes_are_not_judged():
    assert check_convention(world(8, images=10)).outcome == "skipped"
    assert Pair("a", "b", 1.0, -0.5 / 999).error_bins(0.3) == pytest.approx(-0.5)


# The way back of every wrong reading.
WRONG = {
    "norm1": lambda b, s: b / s,
    "norm1000": lambda b, s: b / s * 1000,
    "norm1023": lambda b, s: b / s * 1023,
    "doubly scaled": lambda b, s: b / 1000 * s,
    "swapped": lambda b, s: b[:, [1, 0, 3, 2]],
    "swapped sides": lambda b, s: (b / s)[:, [1, 0, 3, 2]] * s,
    "xywh": lambda b, s: np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1),
    "cxcywh": lambda b, s: np.concatenate([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], axis=1),
}


@pytest.mark.parametrize("name", READINGS)
def test_predictions_in_other_units_or_layouts_are_named(tmp_path, name):
    records, predictions = files(tmp_path, WRONG[name])
    reading, convention = check_predictions(predictions, records)
    assert (reading.outcome, convention.outcome) == ("fail", "skipped")
    assert reading.details["closest"] == name
    assert reading.details["matched_if"][name] >= 70


def test_sound_predictions_are_read_as_they_are(tmp_path):
    records, predictions = files(tmp_path, lambda b, s: b)
    assert [check.outcome for check in check_predictions(predictions, records)] == ["ok", "ok"]


def test_predictions_that_hardly_meet_anything_are_a_warning(tmp_path):
    places = np.random.default_rng(3)
    records, predictions = files(tmp_path, lambda b, s: places.uniform(0, 0.4, b.shape) * s + np.array([0, 0, 0.02, 0.02]) * s)
    assert check_predictions(predictions, records)[0].outcome == "warning"


def test_a_broken_records_file_leaves_predictions_unjudged(tmp_path):
    records, predictions = files(tmp_path, lambda b, s: b)
    records.write_text(records.read_text().replace('"bbox_2d": [', '"bbox_2d": [-5000, ', 1))
    assert {check.outcome for check in check_predictions(predictions, records)} == {"skipped"}
