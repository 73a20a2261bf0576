"""The one drawing module: what pictures on disk and the report's SVG share."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import coordexp
from coordexp.data.drawing import BLACK, WHITE, class_color, contrast, edge_curve, ink, letters, make_marks, paint, text_size
from coordexp.data.rows import RecordObject

SIZE = (400.0, 300.0)
boxes = st.tuples(st.floats(0, 300), st.floats(0, 200), st.floats(20, 100), st.floats(20, 100)).map(
    lambda v: (v[0], v[1], min(v[0] + v[2], 400), min(v[1] + v[3], 300))
)


def thing(desc: str, box: tuple[float, ...], *, crowd: bool = False) -> RecordObject:
    return RecordObject(desc, "bbox_2d", box, crowd)


@given(st.text(max_size=30))
def test_labels_have_contrast_whatever_the_class(desc: str) -> None:
    color = class_color(desc)
    assert contrast(ink(color), color) >= 4.5
    assert color == class_color(desc)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast(BLACK, WHITE) == pytest.approx(21)
    assert contrast((119, 119, 119), WHITE) == pytest.approx(4.478, abs=0.001)  # the well-known grey that just fails


def test_letters_go_on_after_z() -> None:
    assert [letters(i) for i in (0, 25, 26, 27, 51, 52, 701, 702)] == ["A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA"]


def test_truth_and_prediction_differ_in_line_rim_and_tag_and_share_the_colour_of_the_class() -> None:
    box = (10.0, 10.0, 60.0, 60.0)
    true, crowd, predicted = make_marks(
        [thing("cat", box), thing("cats", box, crowd=True)], [thing("cat", box)], SIZE, scale=1, font_size=12, names=True
    )
    assert (true.line, crowd.line, predicted.line) == ("solid", "dotted", "dashed")
    assert (true.label, crowd.label, predicted.label) == ("1 cat", "2 cats (crowd)", "A cat")
    assert true.color == predicted.color == class_color("cat")
    assert (true.rim, predicted.rim) == (WHITE, BLACK)


@given(st.lists(boxes, min_size=1, max_size=8), st.lists(boxes, max_size=8), st.booleans())
def test_labels_stay_in_the_picture_and_each_fits_its_text(
    true: list[tuple[float, ...]], predicted: list[tuple[float, ...]], names: bool
) -> None:
    marks = make_marks([thing("a b", b) for b in true], [thing("c", b) for b in predicted], SIZE, scale=1, font_size=10, names=names)
    for mark in marks:
        x1, y1, x2, y2 = mark.spot
        assert 0 <= x1 < x2 <= SIZE[0]
        assert 0 <= y1 < y2 <= SIZE[1]
        assert (x2 - x1, y2 - y1) == pytest.approx(text_size(mark.label, 10))
        assert mark.label in (mark.tag, f"{mark.tag} {mark.desc}")


def test_labels_of_one_box_predicted_often_do_not_cover_each_other() -> None:
    box = (150.0, 100.0, 250.0, 200.0)
    for names in (True, False):
        marks = make_marks([thing("dog", box)] * 3, [thing("dog", box)] * 3, SIZE, scale=1, font_size=10, names=names)
        for a, b in itertools.combinations([mark.spot for mark in marks], 2):
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_painted_prediction_is_dashed_and_truth_is_not() -> None:
    color = class_color("a")
    for group, whole in (("objects", True), ("predicted", False)):
        given_ = {"objects": (), "predicted": (), group: [thing("a", (50, 50, 350, 350))]}
        picture = np.asarray(paint(Image.new("RGB", (400, 400), "grey"), given_["objects"], given_["predicted"]))
        edge = (picture[300:640, 100] == color).all(axis=1)  # the left edge, away from the labels; the picture is twice as large
        assert edge.all() == whole
        assert edge.mean() > 0.3


def gaussian(center: float, sigma: float, side: float) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(1000) / 999 * side
    p = np.exp(-0.5 * ((x - center) / sigma) ** 2)
    return x, p / p.sum()


@pytest.mark.parametrize(
    ("box", "outward"),
    [
        # slots x1 and x2 go up from the top or down from the bottom; y1 and y2 left or right, wherever there is more room
        ((100, 200, 200, 280), {0: -1, 2: -1, 1: 1, 3: 1}),
        ((300, 10, 390, 60), {0: 1, 2: 1, 1: -1, 3: -1}),
    ],
)
def test_edge_curves_stand_outside_on_their_edge_over_their_own_distribution(box: tuple[float, ...], outward: dict[int, int]) -> None:
    for slot, sign in outward.items():
        axis = slot % 2
        positions, probs = gaussian(box[slot], 6.0, SIZE[axis])
        points = np.array(edge_curve(positions, probs, slot, box, SIZE, 20.0))
        along, across = points[:, axis], points[:, 1 - axis]
        base = box[(1 - axis) if sign < 0 else (3 - axis)]
        assert across[0] == across[-1] == base
        heights = sign * (across - base)
        assert heights.min() == 0
        assert heights.max() == pytest.approx(20)
        assert along[heights.argmax()] == pytest.approx(box[slot], abs=SIZE[axis] / 200)
        # exp(-x²/2s²) = .06 at 2.37 s
        assert along.max() - along.min() == pytest.approx(2 * 2.37 * 6, abs=3 * SIZE[axis] / 200)


def test_no_probability_is_no_curve() -> None:
    assert edge_curve(np.zeros(0), np.zeros(0), 0, (1, 1, 5, 5), SIZE, 10) == []


def test_the_drawing_module_is_the_only_one_that_chooses_colours_and_places() -> None:
    root = Path(coordexp.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        if path.name not in ("drawing.py", "synthetic.py"):
            assert "ImageDraw" not in text, path
            assert "colorsys" not in text, path
