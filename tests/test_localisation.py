"""Edge errors of matched boxes, and the health counts."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.codec import CoordCodec
from coordexp.evaluate.bootstrap import points
from coordexp.evaluate.health import health_numbers, health_ratios, repeats
from coordexp.evaluate.localisation import EdgeErrors, edge_errors, localisation_metrics, matched, matched_pairs
from coordexp.evaluate.predictions import PredictedObject, Prediction
from coordexp.evaluate.samples import Sample, flatten

CODEC = CoordCodec()


def scene(shift: list[float], window: list[float] | None = None) -> Sample:
    true = np.array([[10.0, 20.0, 60.0, 90.0], [100.0, 50.0, 180.0, 95.0]])
    boxes = {"file": true[::-1] + np.array(shift), "window": true[::-1] + np.array(window or shift)}
    return Sample("a", 200, 100, ("a", "b"), true, ("a", "a"), boxes, None)


def errors_of(samples: list[Sample], readout: str) -> EdgeErrors:
    flat = flatten(samples)
    return edge_errors(flat, matched(flat), readout, CODEC)


def test_no_images_have_no_pairs():
    assert matched_pairs([]) == []


def test_errors_are_predicted_minus_true_in_pixels_and_bins_of_each_side() -> None:
    samples = [scene([1.0, -2.0, 3.0, 4.0])]
    errors = errors_of(samples, "file")
    np.testing.assert_allclose(errors.px, np.tile([1.0, -2.0, 3.0, 4.0], (2, 1)))
    np.testing.assert_allclose(errors.bins, errors.px / [200, 100, 200, 100] * 999)
    assert errors.image.tolist() == [0, 0]


def test_metrics_by_slot_pool_all_images_and_keep_the_sign_of_the_bias() -> None:
    samples = [scene([1.0, 0, 0, 0]), scene([0.0, 0, 0, 0]), scene([5.0, 0, 0, 0])]
    metrics = localisation_metrics(errors_of(samples, "file"))
    assert metrics["x1.mean_px"] == pytest.approx(2)
    assert metrics["x1.median_px"] == pytest.approx(1)
    assert metrics["x1.p90_px"] == pytest.approx(np.percentile([1, 1, 0, 0, 5, 5], 90))
    assert metrics["x1.mean_bins"] == pytest.approx(2 / 200 * 999)
    assert metrics["y2.mean_px"] == pytest.approx(0)
    assert metrics["all.mean_px"] == pytest.approx(0.5)
    assert metrics["all.signed_bias_bins"] == pytest.approx(0.5 / 200 * 999)
    mirrored = [scene([-1.0, 0, 0, 0])]
    bias = localisation_metrics(errors_of(mirrored, "file"))["all.signed_bias_bins"]
    assert bias is not None
    assert bias < 0


def test_all_readouts_are_measured_on_the_pairs_of_the_file_boxes() -> None:
    # The window readout is far off, yet stays paired, because pairs come from bbox_2d.
    samples = [scene([1.0, 0, 0, 0], window=[90.0, 90.0, 90.0, 90.0])]
    errors = errors_of(samples, "window")
    np.testing.assert_allclose(errors.px, 90)


def test_pairs_are_class_agnostic_and_need_half_overlap() -> None:
    samples = [scene([0.0, 0, 0, 0]), scene([60.0, 0, 60.0, 0])]
    assert [len(predicted) for predicted, _ in matched_pairs(samples)] == [2, 0]


def test_metrics_without_a_pair_are_none() -> None:
    samples = [scene([70.0, 0, 70.0, 0])]
    metrics = localisation_metrics(errors_of(samples, "file"))
    assert {value for key, value in metrics.items() if not key.endswith(".n")} == {None}
    assert {value for key, value in metrics.items() if key.endswith(".n")} == {0}


def row(**changes: object) -> Prediction:
    fields: dict[str, object] = {
        "image_id": "a",
        "width": 10,
        "height": 10,
        "objects": (),
        "score_source": None,
        "problems": None,
        "error": None,
        "states_error": False,
        "num_tokens": None,
        "truncated": None,
        "source": "p:1",
    }
    return Prediction(**(fields | changes))  # type: ignore[arg-type]


def boxes_of(row_: Prediction) -> Sample:
    boxes = np.array([item.box for item in row_.objects], dtype=np.float64).reshape(-1, 4)
    return Sample(row_.image_id, 10, 10, (), np.zeros((0, 4)), tuple(o.desc for o in row_.objects), {"file": boxes}, None)


def thing(desc: str, *box: float) -> PredictedObject:
    x1, y1, x2, y2 = box
    return PredictedObject(desc, (x1, y1, x2, y2), None, {})


def test_duplicates_need_the_same_description_and_nearly_the_same_box() -> None:
    objects = (thing("a", 0, 0, 9, 9), thing("a", 0, 0, 9, 9), thing("b", 0, 0, 9, 9), thing("a", 0, 0, 9, 9), thing("a", 0, 0, 9, 5))
    again, longest = repeats(flatten([boxes_of(row(objects=objects)), boxes_of(row()), boxes_of(row(objects=objects[:1]))]))
    assert again.tolist() == [2, 0, 0]
    assert longest.tolist() == [3, 0, 1]


def health_metrics(rows: list[Prediction]) -> dict[str, float | int | None]:
    flat = flatten([boxes_of(r) for r in rows])
    again, longest = repeats(flat)
    found = {**points(health_ratios(rows, flat.by_image(flat.pred_image), again)), **health_numbers(rows, flat)}
    return found | {"max_repeat": int(longest.max())}


def test_health_counts_rows_and_boxes() -> None:
    rows = [
        row(problems={}, objects=(thing("a", 0, 0, 5, 5), thing("a", 0, 0, 5, 5)), num_tokens=10, truncated=False),
        row(problems={"truncated": 1, "bad_object": 2}, num_tokens=30, truncated=True),
        row(problems={"bad_object": 1}, objects=(thing("b", 0, 0, 5, 5),)),
        row(problems={}, error="image cannot be read", states_error=True),
    ]
    assert health_metrics(rows) == {
        "parse_rate": 0.25,
        "empty_rate": 0.5,
        "truncation_rate": 0.5,
        "arity_rate": 0.0,
        "duplicate_rate": 1 / 3,
        "max_repeat": 2,
        "boxes_per_image": 0.75,
        "true_boxes_per_image": 0.0,
        "tokens_per_image": 20.0,
        "problems.bad_object": 3,
        "problems.truncated": 1,
    }


def test_health_is_none_where_no_row_says() -> None:
    rows = [row(), row()]
    metrics = health_metrics(rows)
    assert [metrics[key] for key in ("parse_rate", "truncation_rate", "tokens_per_image", "duplicate_rate")] == [None] * 4
    assert metrics["empty_rate"] == 1
