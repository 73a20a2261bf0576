"""Matching and F1 of whole files, in arrays, against plain loops; AP bootstrap against the engine; LVIS by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from test_detection import brute_force, crowded, empty_sample, make_sample

from coordexp.boxes import iou_matrix
from coordexp.codec import CoordCodec
from coordexp.evaluate.buckets import bucket_metrics
from coordexp.evaluate.coco import coco_metrics, coco_table, lvis_metrics, tide_metrics
from coordexp.evaluate.detection import count_matches, macro_metrics, macro_ratio, micro_metrics
from coordexp.evaluate.matching import THRESHOLDS, candidates, match, match_all
from coordexp.evaluate.ranking import ap_intervals, mean_ap, rank, rank_voc
from coordexp.evaluate.registry import BIN_SIZES, COCO_SIZES, CROWDING
from coordexp.evaluate.samples import Federated, Sample, flatten

NO_BOXES = np.zeros((0, 4))


def tangled(rng: np.random.Generator, name: str) -> Sample:
    """Boxes that overlap so much that most images need the assignment solver."""
    low = rng.uniform(0, 30, (int(rng.integers(0, 6)), 2))
    true = np.concatenate([low, low + rng.uniform(30, 50, low.shape)], axis=1)
    low = rng.uniform(0, 30, (int(rng.integers(0, 6)), 2))
    pred = np.concatenate([low, low + rng.uniform(30, 50, low.shape)], axis=1)
    labels = [tuple(rng.choice(list("ab"), len(boxes))) for boxes in (true, pred)]
    return Sample(name, 100, 100, labels[0], true, labels[1], {"file": pred}, rng.random(len(pred)))


def random_samples(seed: int, n: int = 40) -> list[Sample]:
    rng = np.random.default_rng(seed)
    kinds = (tangled, make_sample, crowded)
    return [kinds[int(rng.integers(0, 3))](rng, str(i)) for i in range(n)] + [
        empty_sample(),
        empty_sample(("a",)),
        empty_sample((), ("b",)),
    ]


@pytest.mark.parametrize("seed", range(8))
def test_matching_all_images_at_once_equals_matching_one_by_one(seed: int) -> None:
    samples = random_samples(seed)
    flat = flatten(samples)
    found = candidates(flat)
    for threshold in THRESHOLDS:
        pred, true = match_all(found, flat, threshold)
        assert len(set(pred.tolist())) == len(set(true.tolist())) == len(pred)
        assert (flat.pred_image[pred] == flat.true_image[true]).all()
        for i, sample in enumerate(samples):
            iou = iou_matrix(sample.pred_boxes["file"], sample.true_boxes)
            rows, columns = match(iou, threshold)
            own = flat.pred_image[pred] == i
            start = np.searchsorted(flat.pred_image, i), np.searchsorted(flat.true_image, i)
            values = iou[pred[own] - start[0], true[own] - start[1]]
            assert len(values) == len(rows)
            assert values.sum() == pytest.approx(iou[rows, columns].sum())


def test_candidates_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = flatten(random_samples(3), "file")
    whole = candidates(flat)
    monkeypatch.setattr("coordexp.evaluate.matching._BLOCK", 7)
    parts = candidates(flat)
    for name in ("pred", "true", "iou"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def slow_f1(samples: list[Sample], class_aware: bool) -> dict[str, list[float]]:
    """F1, precision, recall by threshold and macro F1, from brute-force matching of every image; no crowds."""
    tables: dict[str, list[float]] = {"f1": [], "precision": [], "recall": [], "macro": []}
    classes = {label for s in samples for label in s.true_labels}
    for threshold in THRESHOLDS:
        tp = dict.fromkeys(classes, 0)
        total = 0
        for s in samples:
            if class_aware:
                for label in classes:
                    rows = [i for i, v in enumerate(s.pred_labels) if v == label]
                    columns = [i for i, v in enumerate(s.true_labels) if v == label]
                    hits = brute_force(iou_matrix(s.pred_boxes["file"], s.true_boxes)[np.ix_(rows, columns)], threshold)[0]
                    tp[label] += hits
                    total += hits
            else:
                total += brute_force(iou_matrix(s.pred_boxes["file"], s.true_boxes), threshold)[0]
        predicted, true = sum(len(s.pred_labels) for s in samples), sum(len(s.true_labels) for s in samples)
        tables["f1"].append(2 * total / (predicted + true))
        tables["precision"].append(total / predicted)
        tables["recall"].append(total / true)
        by_class = []
        for label in sorted(classes):
            boxes = sum(s.pred_labels.count(label) + s.true_labels.count(label) for s in samples)
            by_class.append(2 * tp[label] / boxes)
        tables["macro"].append(sum(by_class) / len(by_class))
    return tables


@pytest.mark.parametrize("class_aware", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_f1_tables_equal_a_slow_reference(seed: int, class_aware: bool) -> None:
    rng = np.random.default_rng(seed)
    samples = [(tangled if i % 2 else make_sample)(rng, str(i)) for i in range(16)]
    samples += [empty_sample(("never predicted",)), empty_sample((), ("invented",)), empty_sample()]
    counts = count_matches(flatten(samples), class_aware=class_aware)
    metrics, slow = micro_metrics(counts), slow_f1(samples, class_aware)
    for name in ("f1", "precision", "recall"):
        for key, index in (("50", 0), ("75", 5), ("90", 8), ("95", 9)):
            assert metrics[f"{name}.{key}"] == pytest.approx(slow[name][index], abs=1e-12)
        assert metrics[f"{name}.mean"] == pytest.approx(sum(slow[name]) / 10, abs=1e-12)
    if class_aware:
        macro = macro_metrics(counts)
        assert macro["macro_f1.50"] == pytest.approx(slow["macro"][0], abs=1e-12)
        assert macro["macro_f1.mean"] == pytest.approx(sum(slow["macro"]) / 10, abs=1e-12)
        ratio = macro_ratio(counts, flatten(samples))
        assert ratio is not None
        assert (ratio.numerator.sum(axis=0) / ratio.denominator.sum(axis=0)).mean() == pytest.approx(macro["macro_f1.50"])


def test_no_prediction_gives_zeros_and_an_image_without_truth_counts() -> None:
    counts = count_matches(flatten([empty_sample(("a", "a")), empty_sample()]), class_aware=True)
    assert set((micro_metrics(counts) | macro_metrics(counts)).values()) == {0.0}
    assert coco_metrics(flatten([empty_sample(("a",))]), "constant")["ap"] == 0
    with_extra = count_matches(flatten([empty_sample(("a",), ("a",)), empty_sample((), ("a",))]), class_aware=True)
    assert micro_metrics(with_extra)["precision.50"] == 0.5


def scored(samples: list[Sample]) -> list[Sample]:
    """The same with scores on a grid of a tenth: ties within and between images."""
    whole = [s if s.scores is not None else dataclasses.replace(s, scores=np.ones(len(s.pred_labels))) for s in samples]
    return [dataclasses.replace(s, image_id=str(i), scores=np.round(s.scores, 1)) for i, s in enumerate(whole) if s.scores is not None]


@pytest.mark.parametrize("mode", ["constant", "file"])
@pytest.mark.parametrize("seed", range(6))
def test_the_ranking_behind_ap_intervals_gives_the_engines_ap_of_all_photos_and_of_any_part(seed: int, mode: str) -> None:
    rng = np.random.default_rng(seed)
    samples = scored(random_samples(seed))
    flat = flatten(samples)
    ranked = rank(flat, constant=mode == "constant")
    assert mean_ap(ranked) == pytest.approx({key: coco_metrics(flat, mode)[key] for key in ("ap", "ap50", "ap75")}, abs=1e-12)
    for _ in range(4):
        chosen = rng.choice(len(samples), 25, replace=False)
        engine = coco_metrics(flatten([samples[i] for i in sorted(chosen)]), mode)
        assert mean_ap(ranked, chosen) == pytest.approx({key: engine[key] for key in ("ap", "ap50", "ap75")}, abs=1e-12)
    ends = ap_intervals(ranked, resamples=40, seed=0)["ap"].bounds
    assert ends is not None
    assert ends[0] < mean_ap(ranked)["ap"] < ends[1]


def _split(sample: Sample, hard: np.ndarray) -> Sample:
    """The difficult objects of a sample as its crowds, which is where difficult objects stand."""
    labels = [tuple(itertools.compress(sample.true_labels, which)) for which in (~hard, hard)]
    boxes = [sample.true_boxes[which] for which in (~hard, hard)]
    return dataclasses.replace(sample, true_labels=labels[0], true_boxes=boxes[0], crowd_labels=labels[1], crowd_boxes=boxes[1])


def slow_voc(samples: list[Sample], difficult: list[np.ndarray], label: str, points: int | None) -> float:
    """The devkit's loop over one class: detections from the best score down, each at the true box it overlaps most."""
    free = [np.ones(len(s.true_labels), dtype=bool) for s in samples]
    found = sorted(((-s.scores[k], i, k) for i, s in enumerate(samples) for k, v in enumerate(s.pred_labels) if v == label))
    right, wrong, curve = 0, 0, []
    wanted = sum(v == label and not d for s, ds in zip(samples, difficult, strict=True) for v, d in zip(s.true_labels, ds, strict=True))
    for _, i, k in found:
        own = [t for t, v in enumerate(samples[i].true_labels) if v == label]
        ious = iou_matrix(samples[i].pred_boxes["file"][k : k + 1], samples[i].true_boxes[own])[0] if own else np.zeros(0)
        best = own[int(ious.argmax())] if own and ious.max() >= 0.5 else None
        if best is not None and difficult[i][best]:
            continue
        if best is not None and free[i][best]:
            free[i][best] = False
            right += 1
        else:
            wrong += 1
        curve.append((right / wanted, right / (right + wrong)))
    if points is not None:
        return float(np.mean([max((p for r, p in curve if r >= least), default=0.0) for least in np.linspace(0, 1, points)]))
    area, last = 0.0, 0.0
    for k, (recall, _) in enumerate(curve):
        area += (recall - last) * max(p for _, p in curve[k:])
        last = recall
    return area


@pytest.mark.parametrize("seed", range(3))
def test_voc_average_precision_equals_the_devkits_loop_with_difficult_objects(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [dataclasses.replace(s, scores=rng.permutation(1000)[: len(s.pred_labels)] / 1000) for s in scored(random_samples(seed))]
    samples = [dataclasses.replace(s, scores=s.scores + i * 1e-6) for i, s in enumerate(samples)]
    marks = [rng.random(len(s.true_labels)) < 0.3 for s in samples]
    flat = flatten([_split(s, hard) for s, hard in zip(samples, marks, strict=True)])
    ranked = rank_voc(dataclasses.replace(flat, difficult=np.ones(len(flat.crowd_image), dtype=bool)), constant=False)
    wanted = sorted({flat.labels[k] for k in flat.true_label.tolist()})
    slow = {key: np.mean([slow_voc(samples, marks, label, points) for label in wanted]) for key, points in (("ap07", 11), ("ap12", None))}
    assert mean_ap(ranked) == pytest.approx(slow, abs=1e-12)


def test_at_most_a_hundred_boxes_of_a_class_count_in_the_ranking() -> None:
    box = np.array([[0.0, 0.0, 50.0, 50.0]])
    far = np.repeat(np.array([[60.0, 60.0, 90.0, 90.0]]), 100, axis=0)
    sample = Sample("x", 100, 100, ("a",), box, ("a",) * 101, {"file": np.concatenate([far, box])}, np.linspace(1, 0.5, 101))
    flat = flatten([sample])
    ranked = rank(flat, constant=False)
    assert mean_ap(ranked)["ap"] == coco_metrics(flat, "file")["ap"] == 0


def test_classes_go_through_the_engine_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = flatten(scored(random_samples(2)))
    whole = coco_table(flat, "file")
    for name, most in (("_CATEGORIES", 1), ("_BOXES", 40)):
        with monkeypatch.context() as patch:
            patch.setattr(f"coordexp.evaluate.coco.{name}", most)
            assert coco_table(flat, "file") == whole
    assert coco_metrics(flatten([empty_sample()]), "constant")["ap"] is None


def test_official_areas_decide_small_medium_and_large() -> None:
    box = np.array([[0.0, 0.0, 40.0, 40.0]])
    flat = flatten([Sample("x", 100, 100, ("a",), box, ("a",), {"file": box}, None)])
    assert (coco_metrics(flat, "constant")["aps"], coco_metrics(flat, "constant")["apm"]) == (None, pytest.approx(1))
    masked = dataclasses.replace(flat, area=np.array([900.0]))
    assert (coco_metrics(masked, "constant")["aps"], coco_metrics(masked, "constant")["apm"]) == (pytest.approx(1), None)


def test_buckets_split_the_boxes_and_each_says_its_n() -> None:
    samples = random_samples(5)
    flat = flatten(samples)
    for class_aware in (False, True):
        counts = count_matches(flatten(samples), class_aware=class_aware)
        metrics = bucket_metrics(counts, flat, CoordCodec())
        true = int(counts.true.sum())
        assert sum(int(metrics[f"size.{b[0]}.n"] or 0) for b in COCO_SIZES) == true
        assert sum(int(metrics[f"bins.{b[0]}.n"] or 0) for b in BIN_SIZES) == true
        assert sum(int(metrics[f"crowding.{b[0]}.n"] or 0) for b in CROWDING) == true
        assert sum(int(metrics[f"crowding.{b[0]}.images"] or 0) for b in CROWDING) == len(samples)
        hits = sum((metrics[f"size.{b[0]}.recall.50"] or 0) * (metrics[f"size.{b[0]}.n"] or 0) for b in COCO_SIZES)
        assert hits == pytest.approx(counts.tp[:, 0].sum())


def test_a_matched_box_belongs_to_the_size_of_its_true_box() -> None:
    true = np.array([[0.0, 0.0, 31.0, 31.0], [50.0, 50.0, 60.0, 60.0]])
    pred = np.array([[0.0, 0.0, 33.0, 33.0], [0.0, 50.0, 10.0, 60.0]])
    sample = Sample("x", 999, 999, ("a", "a"), true, ("a", "a"), {"file": pred}, None)
    counts = count_matches(flatten([sample]), class_aware=True)
    metrics = bucket_metrics(counts, flatten([sample]), CoordCodec())
    assert (metrics["size.small.f1.50"], metrics["size.small.n"]) == (0.5, 2)
    assert (metrics["size.medium.f1.50"], metrics["size.medium.n"]) == (None, 0)
    # 31 pixels of 999 are 31 bins.
    assert (metrics["bins.16-32.f1.50"], metrics["bins.16-32.n"], metrics["bins.8-16.recall.50"]) == (1, 1, 0)
    assert metrics["crowding.1-5.images"] == 1


def test_tide_names_each_kind_of_error() -> None:
    box = np.array([[0.0, 0.0, 40.0, 40.0]])
    near = np.array([[20.0, 0.0, 60.0, 40.0]])
    far = np.array([[60.0, 60.0, 90.0, 90.0]])

    def kinds(pred: np.ndarray, labels: tuple[str, ...]) -> dict[str, int]:
        samples = [
            Sample("x", 100, 100, ("a",), box, labels, {"file": pred}, None),
            Sample("y", 100, 100, ("b",), far, ("b",), {"file": far}, None),
        ]
        found = tide_metrics(flatten(samples), "constant")
        return {k.removeprefix("count."): int(v) for k, v in found.items() if k.startswith("count.") and v}

    assert kinds(box, ("a",)) == {}
    assert kinds(box, ("b",)) == {"cls": 1}
    assert kinds(near, ("a",)) == {"loc": 1}
    assert kinds(near, ("b",)) == {"both": 1, "miss": 1}
    assert kinds(np.concatenate([box, box]), ("a", "a")) == {"dupe": 1}
    assert kinds(far, ("a",)) == {"bkg": 1, "miss": 1}


def lvis_sample(name: str, true: str, pred: str, *, negative: str = "", open_: str = "", frequency: dict[str, str] | None = None) -> Sample:
    """True boxes of the letters of ``true``; predicted ones of ``pred`` at the same places, those beyond somewhere else."""
    places = np.array([[60.0 * k, 0.0, 60.0 * k + 50, 50.0] for k in range(8)])
    return Sample(
        name,
        500,
        100,
        tuple(true),
        places[: len(true)].reshape(-1, 4),
        tuple(pred),
        {"file": places[: len(pred)].reshape(-1, 4)},
        np.linspace(1, 0.5, len(pred)),
        federated=Federated(frozenset(negative), frozenset(open_), frequency or {}),
    )


FREQUENCY = {"a": "f", "b": "c", "c": "r"}


@pytest.mark.parametrize(
    ("samples", "expected", "f1"),
    [
        # Found exactly: 1 for its frequency, nothing for the others.
        ([lvis_sample("1", "a", "a", frequency=FREQUENCY)], {"ap": 1, "apf": 1, "apc": None, "apr": None}, 1),
        # A box of a category that is neither labelled here nor known to be absent does not count, ...
        ([lvis_sample("1", "a", "ab"), lvis_sample("2", "b", "b")], {"ap": 1}, 1),
        # ... but one that is known to be absent is false (ranked last, it leaves AP alone).
        ([lvis_sample("2", "b", "b"), lvis_sample("1", "a", "ab", negative="b")], {"ap": 1}, 4 / 5),
        # Not labelled in full: an unmatched box is ignored.
        ([lvis_sample("1", "a", "aa", open_="a")], {"ap": 1}, 1),
        ([lvis_sample("1", "a", "aa")], {"ap": 1}, 2 / 3),
        # The mean is over categories with a true box; the missed one gives 0.
        ([lvis_sample("1", "ac", "a", frequency=FREQUENCY)], {"ap": 0.5, "apf": 1, "apr": 0}, 2 / 3),
    ],
)
def test_lvis_rules_by_hand(samples: list[Sample], expected: dict[str, float | None], f1: float) -> None:
    metrics = lvis_metrics(flatten(samples), "file")
    assert {key: metrics[key] for key in expected} == {key: None if v is None else pytest.approx(v) for key, v in expected.items()}
    assert micro_metrics(count_matches(flatten(samples), class_aware=True))["f1.50"] == pytest.approx(f1)


def test_lvis_a_false_box_of_an_absent_category_that_outranks_the_true_one_halves_precision() -> None:
    false = lvis_sample("1", "a", "ab", negative="b")
    late = dataclasses.replace(lvis_sample("2", "b", "b"), scores=np.array([0.1]))
    assert lvis_metrics(flatten([false, late]), "file")["ap"] == pytest.approx((1 + 0.5) / 2)
    unjudged = dataclasses.replace(false, federated=Federated(frozenset(), frozenset()))
    assert lvis_metrics(flatten([unjudged, late]), "file")["ap"] == pytest.approx(1)
    assert coco_metrics(flatten([unjudged, late]), "file")["ap"] == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_lvis_equals_its_definition_as_coco_with_the_boxes_removed_that_are_not_judged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples, reduced = [], []
    for i in range(20):
        sample = dataclasses.replace(make_sample(rng, str(i)), crowd_labels=(), crowd_boxes=NO_BOXES)
        assert sample.scores is not None
        absent = frozenset("abc") - set(sample.true_labels)
        negative = frozenset(label for label in absent if rng.random() < 0.5)
        samples.append(dataclasses.replace(sample, federated=Federated(negative, frozenset())))
        judged = [label in negative or label in sample.true_labels for label in sample.pred_labels]
        labels = tuple(itertools.compress(sample.pred_labels, judged))
        boxes = {"file": sample.pred_boxes["file"][np.array(judged, dtype=bool)]}
        reduced.append(
            dataclasses.replace(sample, pred_labels=labels, pred_boxes=boxes, scores=sample.scores[np.array(judged, dtype=bool)])
        )
    found, expected = lvis_metrics(flatten(samples), "file"), coco_metrics(flatten(reduced), "file")
    for key in ("ap", "ap50", "ap75", "aps", "apm", "apl"):
        assert found[key] == (None if expected[key] is None else pytest.approx(expected[key], abs=1e-9))
    flat = flatten(samples)
    ranked = rank(flat, constant=False, lvis=True)
    assert mean_ap(ranked)["ap"] == pytest.approx(found["ap"], abs=1e-12)
