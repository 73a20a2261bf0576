"""Boxes: IoU against a pixel count, validity messages."""

from __future__ import annotations

import numpy as np
import pytest

from coordexp.boxes import area, as_boxes, bounding_box, box_problem, iou_matrix


def test_iou_equals_a_count_of_pixels_on_integer_boxes():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 20, (30, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 15, (30, 2))], axis=1)

    def mask(box):
        grid = np.zeros((40, 40), bool)
        grid[box[1] : box[3], box[0] : box[2]] = True
        return grid

    masks = [mask(b) for b in boxes]
    expected = [[(a & b).sum() / (a | b).sum() for b in masks] for a in masks]
    np.testing.assert_allclose(iou_matrix(boxes, boxes), expected, atol=1e-12)


def test_empty_inputs_keep_their_shape_and_wrong_shapes_are_refused():
    assert iou_matrix([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert area([]).shape == (0,)
    assert iou_matrix([[0, 0, 0, 0]], [[0, 0, 0, 0]]).tolist() == [[0.0]]
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        as_boxes([[1, 2, 3]])


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([0, 0, 1], "expected 4 numbers"),
        ([0, 0, float("nan"), 1], "finite"),
        ([5, 0, 5, 1], "x2 > x1"),
        ([5, 0, 2, 1], "x2 > x1"),
        ([-1, 0, 2, 1], "inside the 10x10 image"),
        ([0, 0, 11, 1], "inside the 10x10 image"),
    ],
)
def test_a_bad_box_is_named(box, words):
    assert words in box_problem(box, 10, 10)


def test_a_good_box_has_no_problem_and_a_polygon_a_bounding_box():
    assert box_problem([0, 0, 10, 10], 10, 10) is None
    assert bounding_box([3, 9, 1, 4, 5, 6]) == (1, 4, 5, 9)
