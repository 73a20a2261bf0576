"""Grounding and pointing: the task follows from the records; accuracies by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.errors import ComparisonError
from coordexp.evaluate.grounding import inside
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.result import evaluate_files, headline

Row = dict[str, Any]
BOX = [10.0, 10.0, 20.0, 20.0]
TRIANGLE = [10.0, 10.0, 30.0, 10.0, 10.0, 30.0]


def record(i: int, *objects: Row, phrase: object = "the left one") -> Row:
    metadata = {} if phrase is None else {"phrase": phrase}
    return {"images": [f"{i}.png"], "width": 100, "height": 100, "objects": list(objects), "image_id": str(i), "metadata": metadata}


def answer(i: int, *objects: Row) -> Row:
    source = "token" if any("score" in item for item in objects) else None
    return {"image_id": str(i), "width": 100, "height": 100, "objects": list(objects), "score_source": source}


def box(*values: float, **more: Any) -> Row:
    return {"desc": "x", "bbox_2d": list(values), **more}


def evaluate(tmp_path: Path, records: list[Row], predictions: list[Row], bootstrap: int = 200) -> Row:
    for name, rows in (("r.jsonl", records), ("p.jsonl", predictions)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate_files(tmp_path / "p.jsonl", tmp_path / "r.jsonl", EvaluateOptions(bootstrap=bootstrap), out=tmp_path / "out")


def test_grounding_takes_one_box_an_image_and_counts_no_answer_as_zero(tmp_path: Path) -> None:
    records = [record(i, box(*BOX)) for i in range(4)]
    # IoU 1; 0.8 of a box that covers it; none; a wrong first box, whatever comes after it.
    predictions = [answer(0, box(*BOX)), answer(1, box(10, 10, 20, 18)), answer(2), answer(3, box(50, 50, 60, 60), box(*BOX))]
    results = evaluate(tmp_path, records, predictions)
    assert results["task"] == "grounding"
    assert results["notes"][0] == "grounding: every record has one object and metadata.phrase"
    found = {key.removeprefix("grounding."): value for key, value in results.items() if key.startswith("grounding.")}
    assert found == {
        "file.acc.50": 0.5,
        "file.acc.80": 0.5,
        "file.acc.90": 0.25,
        "file.mean_iou": pytest.approx(0.45),
        "answered": 0.75,
        "n": 4,
    }
    low, high = results["intervals.grounding.file.acc.50"]
    assert low <= 0.5 <= high
    assert dict(headline(results))["grounding Acc@.8 (file)"].startswith("0.500 [")
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_image.jsonl").read_text().splitlines()]
    assert [row["iou_file"] for row in rows] == [pytest.approx(v) for v in (1, 0.8, 0, 0)]


def test_of_several_scored_boxes_the_best_scored_one_is_the_answer(tmp_path: Path) -> None:
    predictions = [answer(0, box(50, 50, 60, 60, score=0.2), box(*BOX, score=0.7), box(60, 60, 70, 70, score=0.7))]
    assert evaluate(tmp_path, [record(0, box(*BOX))], predictions)["grounding.file.acc.90"] == 1


def test_phrases_that_mean_nothing_or_several_objects_are_judged_as_in_grefcoco(tmp_path: Path) -> None:
    other = [40.0, 40.0, 60.0, 60.0]
    records = [record(0, box(*BOX)), record(1), record(2), record(3, box(*BOX), box(*other)), record(4, box(*BOX), box(*other))]
    predictions = [answer(0, box(*BOX)), answer(1), answer(2, box(*BOX)), answer(3, box(*other), box(*BOX)), answer(4, box(*BOX))]
    results = evaluate(tmp_path, records, predictions)
    assert results["notes"][0] == "grounding: every record has any number of objects and metadata.phrase"
    # Accuracy is of the one phrase that means one object; exact: right boxes, all of them, and none beside them.
    assert (results["grounding.file.acc.50"], results["grounding.file.exact.50"]) == (1, 3 / 5)
    assert (results["grounding.no_target_acc"], results["grounding.target_acc"], results["grounding.answered"]) == (1 / 2, 1, 4 / 5)
    # Two phrases of five without an object: too many draws hold none.
    assert results["interval_notes"]["grounding.no_target_acc"].startswith("none: undefined in ")
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_image.jsonl").read_text().splitlines()]
    assert [row["iou_file"] for row in rows] == [1, None, None, None, None]
    assert [row["exact_file"] for row in rows] == [True, True, False, True, False]


def test_phrases_of_one_picture_are_drawn_together(tmp_path: Path) -> None:
    records = [record(i, box(*BOX)) | {"images": [f"{i // 7}.png"]} for i in range(140)]
    predictions = [answer(i, box(*(BOX if i // 7 % 2 else [50, 50, 60, 60]))) for i in range(140)]
    clustered = evaluate(tmp_path, records, predictions)
    apart = evaluate(tmp_path, [record(i, box(*BOX)) for i in range(140)], predictions)
    assert (clustered["counts"]["effective"], clustered["counts"]["photos"], apart["counts"]["photos"]) == (140, 20, 140)
    widths = [high - low for low, high in (r["intervals.grounding.file.acc.50"] for r in (clustered, apart))]
    assert widths[0] > 2 * widths[1]
    assert not [key for key in clustered if key.startswith(("coco", "tide", "lvis", "voc"))]


def test_readouts_and_polygons_are_grounded_too(tmp_path: Path) -> None:
    records = [record(0, {"desc": "x", "poly": TRIANGLE})]
    results = evaluate(tmp_path, records, [answer(0, box(50, 50, 60, 60, readouts={"median": [10, 10, 30, 30]}))])
    assert (results["grounding.file.acc.50"], results["grounding.median.mean_iou"]) == (0, 1)


def test_pointing_is_a_point_in_the_box_or_the_polygon(tmp_path: Path) -> None:
    triangle = {"desc": "x", "poly": TRIANGLE}
    records = [record(0, box(*BOX)), record(1, box(*BOX)), record(2, triangle), record(3, triangle), record(4, box(*BOX))]
    points = [[20, 20], [20.5, 20], [12, 12], [25, 25], None]
    predictions = [answer(i, *([] if p is None else [{"desc": "x", "point_2d": p}])) for i, p in enumerate(points)]
    results = evaluate(tmp_path, records, predictions)
    assert (results["task"], results["pointing.acc"], results["pointing.answered"], results["pointing.n"]) == ("pointing", 0.4, 0.8, 5)
    assert "intervals.pointing.acc" in results
    assert not [key for key in results if key.startswith(("detection", "coco", "grounding"))]
    rows = [json.loads(line) for line in (tmp_path / "out" / "per_image.jsonl").read_text().splitlines()]
    assert [row["hit"] for row in rows] == [True, False, True, False, False]
    assert "point on the object" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("records", "predictions", "message"),
    [
        (
            [record(0, box(*BOX)), record(1, box(*BOX), phrase=None)],
            [answer(0), answer(1)],
            r"r\.jsonl:2: metadata\.phrase: expected a text",
        ),
        ([record(0, box(*BOX), phrase=3)], [answer(0)], r"r\.jsonl:1: metadata\.phrase: expected a text"),
        (
            [record(0, box(*BOX), box(*BOX))],
            [answer(0, {"desc": "x", "point_2d": [1, 1]})],
            r"r\.jsonl:1: objects: expected the one object of metadata\.phrase for a point, got 2",
        ),
        ([record(0, box(*BOX, iscrowd=True))], [answer(0)], r"r\.jsonl:1: objects: expected single objects"),
        ([record(0, {"desc": "x", "point_2d": [1, 1]})], [answer(0, box(*BOX))], r"objects\[0\] is a point_2d"),
        (
            [record(0, box(*BOX)), record(1, box(*BOX))],
            [answer(0, box(*BOX)), answer(1, {"desc": "x", "point_2d": [1, 1]})],
            r"p\.jsonl:2: objects: expected points only or boxes only",
        ),
    ],
)
def test_mixed_records_are_refused_in_one_line(tmp_path: Path, records: list[Row], predictions: list[Row], message: str) -> None:
    with pytest.raises(ComparisonError, match=message) as caught:
        evaluate(tmp_path, records, predictions)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=3, max_size=3, unique=True), st.integers(0, 20), st.integers(0, 20)
)
def test_a_point_is_in_a_triangle_when_it_is_on_one_side_of_all_its_edges(corners: list[tuple[int, int]], x: int, y: int) -> None:
    def turn(a: tuple[int, int], b: tuple[int, int]) -> int:
        return (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])

    (ax, ay), (bx, by), (cx, cy) = corners
    if (bx - ax) * (cy - ay) == (by - ay) * (cx - ax):
        return
    turns = [turn(corners[k], corners[(k + 1) % 3]) for k in range(3)]
    expected = all(t >= 0 for t in turns) or all(t <= 0 for t in turns)
    values = tuple(float(v) for corner in corners for v in corner)
    assert inside((float(x), float(y)), values) == expected
