"""Detection metrics against brute force and against pycocotools."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats

from coordexp.boxes import iou_matrix
from coordexp.evaluate.bootstrap import Interval, Ratio, draws, intervals, wilson
from coordexp.evaluate.coco import coco_metrics
from coordexp.evaluate.detection import MatchCounts, count_matches, macro_metrics, micro_metrics
from coordexp.evaluate.matching import THRESHOLDS, match
from coordexp.evaluate.registry import COCO_KEYS
from coordexp.evaluate.samples import Sample, flatten


def make_sample(rng: np.random.Generator, name: str, *, labels: str = "abc", most: int = 5, scored: bool = True) -> Sample:
    n_true, n_extra = int(rng.integers(0, most)), int(rng.integers(0, 3))
    true = _boxes(rng, n_true)
    near = true[rng.random(n_true) < 0.8] if n_true else true
    near = near + rng.normal(0, 4, near.shape)
    pred = np.concatenate([near, near[:1] + 1, _boxes(rng, n_extra)])
    draw = [str(v) for v in rng.choice(list(labels), size=n_true + len(pred))]
    scores = rng.random(len(pred)) if scored else None
    return Sample(name, 200, 160, tuple(draw[:n_true]), true, tuple(draw[n_true:]), {"file": pred}, scores)


def _boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    low = rng.uniform(0, 100, (n, 2))
    return np.concatenate([low, low + rng.uniform(8, 60, (n, 2))], axis=1)


def brute_force(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    """Most pairs, then most IoU, over every one-to-one assignment."""
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    best = (0, 0.0)
    for columns in itertools.permutations(range(iou.shape[1]), iou.shape[0]):
        values = [v for v in (iou[i, j] for i, j in enumerate(columns)) if v >= threshold]
        best = max(best, (len(values), float(sum(values))))
    return best


def empty_sample(true: tuple[str, ...] = (), pred: tuple[str, ...] = ()) -> Sample:
    box = np.array([[0.0, 0.0, 50.0, 50.0]])
    return Sample("x", 100, 100, true, np.repeat(box, len(true), 0), pred, {"file": np.repeat(box, len(pred), 0)}, None)


@pytest.mark.parametrize("seed", range(60))
def test_match_takes_most_pairs_and_then_most_iou(seed: int) -> None:
    rng = np.random.default_rng(seed)
    iou = rng.random((int(rng.integers(0, 6)), int(rng.integers(0, 6))))
    for threshold in (0.2, 0.5, 0.8):
        rows, columns = match(iou, threshold)
        assert len(set(rows)) == len(set(columns)) == len(rows)
        values = iou[rows, columns]
        assert (values >= threshold).all()
        count, total = brute_force(iou, threshold)
        assert len(values) == count
        assert values.sum() == pytest.approx(total)


def test_match_prefers_two_pairs_to_one_better_pair() -> None:
    # Greedy by IoU takes (0, 0) and leaves row 1 without a partner.
    rows, columns = match(np.array([[0.9, 0.6], [0.8, 0.0]]), 0.5)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_match_counts_iou_equal_to_the_threshold() -> None:
    assert len(match(np.array([[0.5]]), 0.5)[0]) == 1
    with pytest.raises(ValueError, match="threshold"):
        match(np.array([[0.5]]), 0.0)


@pytest.mark.parametrize("class_aware", [False, True])
def test_counts_equal_brute_force_by_image_and_threshold(class_aware: bool) -> None:
    rng = np.random.default_rng(5)
    samples = [make_sample(rng, str(i), most=4) for i in range(25)]
    counts = count_matches(flatten(samples), class_aware=class_aware)
    for i, sample in enumerate(samples):
        iou = iou_matrix(sample.pred_boxes["file"], sample.true_boxes)
        if class_aware:
            for p, t in itertools.product(range(iou.shape[0]), range(iou.shape[1])):
                iou[p, t] *= sample.pred_labels[p] == sample.true_labels[t]
        assert [brute_force(iou, t)[0] for t in THRESHOLDS] == counts.tp[i].tolist()
        assert (set(counts.predicted[i].tolist()), counts.true[i]) == ({iou.shape[0]}, iou.shape[1])
    if class_aware:
        assert (sum(counts.class_tp.values()) == counts.tp.sum(axis=0)).all()
        assert sum(counts.class_true.values()) == counts.true.sum()
        assert (sum(counts.class_predicted.values()) == counts.predicted.sum(axis=0)).all()


def test_micro_metrics_are_ratios_of_pooled_counts_and_their_mean_over_thresholds() -> None:
    tp = np.array([[3, 2, 2, 2, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
    metrics = micro_metrics(MatchCounts(tp, np.array([[4], [1]]).repeat(10, axis=1), np.array([3, 2])))
    assert metrics["precision.50"] == 4 / 5
    assert metrics["recall.50"] == 4 / 5
    assert metrics["f1.75"] == 2 * 2 / 10
    assert metrics["f1.95"] == 0
    assert metrics["f1.mean"] == pytest.approx(np.mean(2 * tp.sum(axis=0) / 10))


@pytest.mark.parametrize(
    ("true", "pred", "f1", "precision", "recall"),
    [((), (), None, None, None), (("a",), (), 0, 0, 0), ((), ("a",), 0, 0, 0), (("a",), ("a",), 1, 1, 1), (("a",), ("b",), 0, 0, 0)],
)
def test_nothing_on_one_side_is_zero_and_nothing_at_all_is_none(
    true: tuple[str, ...], pred: tuple[str, ...], f1: float | None, precision: float | None, recall: float | None
) -> None:
    metrics = micro_metrics(count_matches(flatten([empty_sample(true, pred)]), class_aware=True))
    assert (metrics["f1.50"], metrics["precision.50"], metrics["recall.50"]) == (f1, precision, recall)
    assert metrics["f1.mean"] == f1


def test_macro_keeps_classes_without_predictions_and_no_invented_classes() -> None:
    samples = [empty_sample(("a",), ("a",)), empty_sample(("b",), ("invented",))]
    counts = count_matches(flatten(samples), class_aware=True)
    assert macro_metrics(counts) == {f"macro_f1.{key}": 0.5 for key in ("50", "75", "90", "95", "mean")}
    assert macro_metrics(count_matches(flatten([empty_sample((), ("a",))]), class_aware=True))["macro_f1.50"] is None


def pycocotools_stats(samples: list[Sample], constant: bool) -> np.ndarray:
    names = sorted({v for s in samples for v in (*s.true_labels, *s.crowd_labels, *s.pred_labels)})

    def entry(i: int, label: str, box: np.ndarray, crowd: int = 0) -> dict[str, object]:
        w, h = max(box[2] - box[0], 0.0), max(box[3] - box[1], 0.0)
        return {"image_id": i, "category_id": names.index(label) + 1, "bbox": [box[0], box[1], w, h], "area": w * h, "iscrowd": crowd}

    truth = [entry(i, v, b) for i, s in enumerate(samples) for v, b in zip(s.true_labels, s.true_boxes, strict=True)]
    truth += [entry(i, v, b, 1) for i, s in enumerate(samples) for v, b in zip(s.crowd_labels, s.crowd_boxes, strict=True)]
    found = [
        entry(i, v, b) | {"score": 1.0 if constant or s.scores is None else float(s.scores[k])}
        for i, s in enumerate(samples)
        for k, (v, b) in enumerate(zip(s.pred_labels, s.pred_boxes["file"], strict=True))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": [{"id": i, "width": s.width, "height": s.height} for i, s in enumerate(samples)],
            "categories": [{"id": n, "name": v} for n, v in enumerate(names, start=1)],
            "annotations": [a | {"id": n} for n, a in enumerate(truth, start=1)],
        }
        dataset.createIndex()
        run = COCOeval(dataset, dataset.loadRes(found), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return np.asarray(run.stats)


@pytest.mark.parametrize("mode", ["constant", "file"])
@pytest.mark.parametrize("seed", range(12))
def test_coco_metrics_equal_pycocotools(seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    samples = [make_sample(rng, str(i), labels="abcd") for i in range(int(rng.integers(2, 14)))]
    # An image with nothing, a class that is never predicted, one that is only predicted, and a reversed box.
    samples += [empty_sample(), empty_sample(("never predicted",)), make_sample(rng, "y", labels="e")]
    flipped = empty_sample((), ("a",))
    flipped.pred_boxes["file"] = flipped.pred_boxes["file"][:, [2, 3, 0, 1]]
    samples.append(Sample("z", 100, 100, (), flipped.true_boxes, ("a",), flipped.pred_boxes, np.array([0.5])))
    reference = pycocotools_stats(samples, mode == "constant")
    got = coco_metrics(flatten(samples), "constant" if mode == "constant" else "file")
    assert list(got) == list(COCO_KEYS)
    for value, expected in zip(got.values(), reference, strict=False):
        assert (-1 if value is None else value) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mode", ["constant", "file"])
@pytest.mark.parametrize("seed", range(8))
def test_coco_metrics_equal_pycocotools_with_ties_crowds_and_empty_images_together(seed: int, mode: str) -> None:
    rng = np.random.default_rng(100 + seed)
    samples = [(crowded if i % 2 else make_sample)(rng, str(i)) for i in range(20)] + [empty_sample(), empty_sample(("a",))]
    # Scores on a grid of a tenth: ties within and between images.
    samples = [s if s.scores is None else dataclasses.replace(s, scores=np.round(s.scores, 1)) for s in samples]
    reference = pycocotools_stats(samples, mode == "constant")
    got = coco_metrics(flatten(samples), "constant" if mode == "constant" else "file")
    for value, expected in zip(got.values(), reference, strict=False):
        assert (-1 if value is None else value) == pytest.approx(expected, abs=1e-9)


def test_coco_metrics_are_silent_and_defined_without_boxes(capfd: pytest.CaptureFixture[str]) -> None:
    assert set(coco_metrics(flatten([empty_sample()]), "constant").values()) == {None}
    assert coco_metrics(flatten([empty_sample((), ("a",))]), "constant")["ap"] is None
    assert coco_metrics(flatten([empty_sample(("a",))]), "constant")["ap"] == 0
    assert coco_metrics(flatten([empty_sample(("a",), ("a",))]), "constant")["ap"] == pytest.approx(1)
    assert capfd.readouterr() == ("", "")


def test_coco_file_mode_needs_scores() -> None:
    with pytest.raises(ValueError, match="without scores"):
        coco_metrics(flatten([empty_sample((), ("a",))]), "file")


def test_intervals_equal_resampling_the_images_one_by_one() -> None:
    rng = np.random.default_rng(3)
    denominator = rng.random((12, 3)) + 0.5
    numerator = denominator * rng.random((12, 3))
    got = intervals({"x": Ratio(numerator, denominator)}, resamples=300, seed=7)["x"].bounds
    error = intervals({"x": Ratio(numerator[:, :1], denominator[:, :1], rate=False)}, resamples=300, seed=7)["x"].bounds
    values, studentised = [], []
    value = (numerator.sum(axis=0) / denominator.sum(axis=0)).mean()

    def mean_and_error(x: np.ndarray, d: np.ndarray) -> tuple[float, float]:
        return x.sum() / d.sum(), np.sqrt(((x - x.sum() / d.sum() * d) ** 2).sum()) / d.sum()

    mean, own = mean_and_error(numerator[:, 0], denominator[:, 0])
    for block in draws(12, resamples=300, seed=7):
        assert (block.sum(axis=1) == 12).all()
        for draw in block.astype(int):
            chosen = np.repeat(np.arange(12), draw)
            values.append((numerator[chosen].sum(axis=0) / denominator[chosen].sum(axis=0)).mean())
            drawn, spread = mean_and_error(numerator[chosen, 0], denominator[chosen, 0])
            studentised.append((drawn - mean) / spread)
    assert len(values) == 300
    # A share: Wilson's interval of as many trials as give the variance of the draws, with Student's t of 11.
    trials = value * (1 - value) / (np.var(values, ddof=1) * 12 / 11)
    assert got == pytest.approx(wilson(value, trials, stats.t.ppf(0.975, 11)))
    # Another number: bootstrap-t.
    low, high = np.percentile(studentised, [2.5, 97.5])
    assert error == pytest.approx((mean - own * high, mean - own * low))


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        values = rng.normal(2.0, 1.0, (60, 1))
        bounds = intervals({"x": Ratio(values, np.ones((60, 1)), rate=False)}, resamples=200, seed=trial)["x"].bounds
        assert bounds is not None
        hits += bounds[0] <= 2.0 <= bounds[1]
    assert 0.88 <= hits / 200 <= 0.99


def test_intervals_are_none_where_most_resamples_are_undefined() -> None:
    one = np.zeros((5, 1))
    one[0] = 1
    found = intervals({"rare": Ratio(one, one), "sure": Ratio(one, one + 1)}, resamples=100, seed=0)
    assert found["rare"].bounds is None
    assert found["rare"].note is not None
    assert found["rare"].note.startswith("none: undefined in ")
    assert found["sure"].bounds is not None
    assert intervals({"single": Ratio(one[:1], one[:1])}, resamples=10, seed=0) == {"single": Interval(None, "none: 1 photo")}
    with pytest.raises(ValueError, match="same photos"):
        intervals({"a": Ratio(one, one), "b": Ratio(one[:2], one[:2])}, resamples=10, seed=0)


def crowded(rng: np.random.Generator, name: str) -> Sample:
    """Random boxes, some of them predicted inside large crowd regions."""
    sample = make_sample(rng, name)
    low = rng.uniform(0, 90, (2, 2))
    crowd = np.concatenate([low, low + rng.uniform(40, 90, (2, 2))], axis=1)
    return dataclasses.replace(sample, crowd_labels=tuple(rng.choice(list("abc"), 2)), crowd_boxes=crowd)


def test_coco_metrics_with_crowds_equal_pycocotools() -> None:
    rng = np.random.default_rng(8)
    samples = [crowded(rng, str(i)) for i in range(25)]
    samples = [s if s.scores is not None else dataclasses.replace(s, scores=np.zeros(len(s.pred_labels))) for s in samples]
    names = sorted({label for s in samples for label in (*s.true_labels, *s.crowd_labels, *s.pred_labels)})

    def entry(i: int, label: str, box: Any, crowd: int) -> dict[str, Any]:
        w, h = box[2] - box[0], box[3] - box[1]
        return {"image_id": i, "category_id": names.index(label) + 1, "bbox": [box[0], box[1], w, h], "area": w * h, "iscrowd": crowd}

    truth = [entry(i, v, b, 0) for i, s in enumerate(samples) for v, b in zip(s.true_labels, s.true_boxes, strict=True)]
    truth += [entry(i, v, b, 1) for i, s in enumerate(samples) for v, b in zip(s.crowd_labels, s.crowd_boxes, strict=True)]
    found = [
        {**entry(i, v, b, 0), "score": float(score)}
        for i, s in enumerate(samples)
        for v, b, score in zip(s.pred_labels, s.pred_boxes["file"], s.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO()
        oracle.dataset = {
            "images": [{"id": i} for i in range(len(samples))],
            "categories": [{"id": k + 1, "name": n} for k, n in enumerate(names)],
            "annotations": [{**a, "id": k + 1} for k, a in enumerate(truth)],
        }
        oracle.createIndex()
        evaluation = COCOeval(oracle, oracle.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = coco_metrics(flatten(samples), "file")
    plain = coco_metrics(flatten([dataclasses.replace(s, crowd_labels=(), crowd_boxes=np.zeros((0, 4))) for s in samples]), "file")
    assert metrics["ap"] == pytest.approx(evaluation.stats[0], abs=1e-12)
    assert metrics["ap50"] == pytest.approx(evaluation.stats[1], abs=1e-12)
    assert metrics["ar100"] == pytest.approx(evaluation.stats[8], abs=1e-12)
    assert metrics["ap"] != plain["ap"]


def test_a_box_without_a_match_inside_a_crowd_is_ignored_by_share_of_its_own_area_and_class() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [45, 0, 55, 10]], dtype=float)
    crowd = np.array([[0, 0, 50, 50]], dtype=float)
    sample = Sample("x", 100, 100, ("a",), boxes[:1], ("a", "a", "a"), {"file": boxes}, None, ("a",), crowd)
    counts = count_matches(flatten([sample]), class_aware=True)
    # The first is matched, the second wholly inside, the third half: ignored at .5 alone.
    assert counts.predicted[0].tolist() == [1] + [2] * 9
    assert counts.class_predicted["a"].tolist() == [1] + [2] * 9
    assert counts.tp[0].tolist() == [1] * 10
    assert micro_metrics(counts)["precision.50"] == 1
    other = dataclasses.replace(sample, crowd_labels=("b",))
    assert count_matches(flatten([other]), class_aware=True).predicted[0].tolist() == [3] * 10
    assert count_matches(flatten([other]), class_aware=False).predicted[0].tolist() == [1] + [2] * 9
