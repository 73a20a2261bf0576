"""predictions.jsonl to results.json: reading, joining, keys, intervals, and what a person is shown."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordexp import distribution
from coordexp.errors import ComparisonError, ConfigError, DataError
from coordexp.evaluate.bootstrap import wilson
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.registry import READOUT_NAMES
from coordexp.evaluate.result import best_readout, evaluate_files, headline, write_results

OPTIONS = EvaluateOptions(bootstrap=200)
Row = dict[str, Any]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_rows(n: int = 12, *, scores: bool = False, readouts: bool = True) -> tuple[list[Row], list[Row]]:
    """Records, and predictions whose ``bbox_2d`` is off by 8 px and ``median`` by 1 px; the first image is empty."""
    rng = np.random.default_rng(0)
    records, predictions = [], []
    for i in range(n):
        truth, found = [], []
        for k in range(0 if i == 0 else 2):
            x, y = rng.uniform(0, 40), 50.0 * k
            box = [x, y, x + 40, y + 40]
            truth.append({"desc": "ab"[k], "bbox_2d": box})
            item: Row = {"desc": "a", "bbox_2d": [v + 8 for v in box]}
            if readouts:
                item["readouts"] = {"median": [v + 1 for v in box], "argmax": [v + 8 for v in box]}
            if scores:
                item["score"] = float(rng.random())
            found.append(item)
        records.append({"images": [f"img/{i}.png"], "width": 100, "height": 100, "objects": truth, "image_id": f"im-{i}", "metadata": {}})
        predictions.append(
            {
                "image_id": f"im-{i}",
                "width": 100,
                "height": 100,
                "objects": found,
                "score_source": "probability" if scores else None,
                "problems": {},
                "error": None,
                "num_tokens": 20,
                "truncated": False,
            }
        )
    return records, predictions


@pytest.fixture
def files(tmp_path: Path) -> Callable[[list[Row], list[Row]], tuple[Path, Path]]:
    def make(records: list[Row], predictions: list[Row]) -> tuple[Path, Path]:
        return write(tmp_path / "predictions.jsonl", predictions), write(tmp_path / "test.jsonl", records)

    return make


Files = Callable[[list[Row], list[Row]], tuple[Path, Path]]


def test_readout_names_are_those_of_the_distribution_module() -> None:
    assert tuple(distribution.READOUTS) == READOUT_NAMES


def test_evaluate_loads_no_torch() -> None:
    code = "import sys, coordexp.evaluate.result; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_results_hold_the_contract_keys_and_numbers(files: Files, tmp_path: Path) -> None:
    records, predictions = make_rows()
    paths = files(records, predictions[::-1])
    out = tmp_path / "run"
    results = evaluate_files(*paths, OPTIONS, out=out)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert sorted(p.name for p in out.iterdir()) == ["per_image.jsonl", "results.json", "table.md"]
    for readout in ("file", "median", "argmax"):
        for mode in ("aware", "agnostic"):
            for name in ("f1", "precision", "recall"):
                assert {f"detection.{readout}.{mode}.{name}.{t}" for t in ("50", "75", "90", "95", "mean")} <= results.keys()
        assert f"detection.{readout}.aware.macro_f1.mean" in results
        assert f"detection.{readout}.agnostic.macro_f1.mean" not in results
    assert {f"coco.constant.{k}" for k in ("ap", "ap50", "ap75", "ar1", "ar10", "ar100")} <= results.keys()
    # Only boxes are known here.
    assert {f"coco.constant.box_area.{k}" for k in ("aps", "apm", "apl")} <= results.keys()
    assert {"voc.constant.ap07", "voc.constant.ap12", "detection.file.aware.f1_rex_omni.mean"} <= results.keys()
    assert not [key for key in results if key.startswith("coco.file")]
    # A shift of 8 px leaves an IoU of 32^2 / (2 40^2 - 32^2) = 0.47; one of 1 px leaves 0.906.
    assert results["detection.file.agnostic.f1.50"] == 0
    assert results["detection.median.agnostic.f1.90"] == 1
    assert results["detection.median.agnostic.f1.95"] == 0
    assert results["detection.median.agnostic.f1.mean"] == pytest.approx(0.9)
    assert results["detection.median.aware.f1.50"] == pytest.approx(0.5)
    assert results["detection.median.aware.macro_f1.50"] == pytest.approx((2 / 3 + 0) / 2)
    assert results["localisation.matched"] == 0
    assert results["localisation.median.all.mean_bins"] is None
    assert "intervals.localisation.median.all.mean_bins" not in results
    assert results["health.parse_rate"] == 1
    assert results["health.empty_rate"] == pytest.approx(1 / 12)
    boxes = {"true_boxes": 22, "crowd_regions": 0, "difficult": 0, "predicted_boxes": 22}
    assert results["counts"] == {"original": 12, "effective": 12, "photos": 12, "failed": 0, **boxes, "classes": 2}
    nested = ("counts", "provenance", "per_class", "notes", "task", "interval_notes")
    flat = {key: value for key, value in results.items() if key not in nested}
    assert all(value is None or isinstance(value, int | float | list) for value in flat.values())


def test_provenance_says_what_was_evaluated_with_what(files: Files) -> None:
    paths = files(*make_rows(3))
    provenance = evaluate_files(*paths, OPTIONS, out=None)["provenance"]
    assert provenance["predictions_sha256"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert provenance["records_sha256"] == hashlib.sha256(paths[1].read_bytes()).hexdigest()
    assert provenance["options"] == {
        "bootstrap": 200,
        "seed": 0,
        "match": "exact",
        "match_model": None,
        "match_similarity": 0.7,
        "expect": {},
    }
    assert {"coordexp", "python", "numpy", "scipy", "hotcoco"} <= provenance["versions"].keys()
    assert str(paths[0].parent) not in json.dumps(provenance)


def test_intervals_surround_the_number_are_seeded_and_can_be_left_out(files: Files) -> None:
    records, predictions = make_rows(30, readouts=False)
    for i, row in enumerate(predictions):
        row["objects"] = [{"desc": o["desc"], "bbox_2d": [v - 8 + (i % 4) for v in o["bbox_2d"]]} for o in row["objects"]][: 1 + i % 2]
    paths = files(records, predictions)
    first, again = (evaluate_files(*paths, OPTIONS, out=None) for _ in range(2))
    other = evaluate_files(*paths, EvaluateOptions(bootstrap=200, seed=1), out=None)
    plain = evaluate_files(*paths, EvaluateOptions(bootstrap=0), out=None)
    keys = [f"detection.file.{m}.{t}" for m in ("aware", "agnostic") for t in ("f1.50", "f1.mean", "precision.50", "recall.50")]
    keys += ["detection.file.aware.macro_f1.50", "coco.constant.ap", "coco.constant.ap50", "coco.constant.ap75"]
    keys += ["voc.constant.ap07", "voc.constant.ap12", "health.boxes_per_image"]
    keys += [f"health.{name}_rate" for name in ("parse", "empty", "truncation", "arity", "duplicate")]
    keys += [f"localisation.file.all.{k}" for k in ("mean_bins", "mean_px", "signed_bias_bins")]
    assert sorted(key for key in first if key.startswith("intervals.")) == sorted(f"intervals.{key}" for key in keys)
    for key in keys:
        low, high = first[f"intervals.{key}"]
        assert low <= first[key] <= high
    assert first["intervals.coco.constant.ap"][0] < first["intervals.coco.constant.ap"][1]
    assert first == again
    assert first["intervals.detection.file.agnostic.f1.50"] != other["intervals.detection.file.agnostic.f1.50"]
    assert not [key for key in plain if key.startswith("intervals.")]


def test_a_statistic_under_unit_weights_is_the_reported_number(files: Files) -> None:
    # One picture copied: no draw differs from another. A share still has an interval, of 6 trials; an error has none.
    records, predictions = make_rows(2)
    for name in ("median", "argmax"):
        for item in predictions[1]["objects"]:
            item["bbox_2d"] = item["readouts"][name] = [v - 5 for v in item["bbox_2d"]]
    copies = [[row[1] | {"image_id": f"c{i}"} for i in range(6)] for row in (records, predictions)]
    for i, row in enumerate(copies[0]):
        row["images"] = [f"img/{i}.png"]
    results = evaluate_files(*files(*copies), OPTIONS, out=None)
    bounds = {key.removeprefix("intervals."): value for key, value in results.items() if key.startswith("intervals.")}
    assert bounds["detection.file.aware.f1.50"] == pytest.approx(wilson(0.5, 6))
    assert bounds["detection.file.agnostic.f1.50"] == pytest.approx(wilson(1.0, 6))
    assert results["interval_notes"]["detection.file.agnostic.f1.50"] == "Wilson's, of 6 trials: no variation between photos"
    assert "localisation.file.all.mean_bins" not in bounds
    assert results["interval_notes"]["localisation.file.all.mean_bins"] == "none: no variation between photos"
    assert any("10 of " in note and "numbers have no interval" in note for note in results["notes"])
    # The same records of one picture are one photo, of which nothing can be drawn.
    alone = evaluate_files(*files([row | {"images": ["img/0.png"]} for row in copies[0]], copies[1]), OPTIONS, out=None)
    assert (alone["counts"]["original"], alone["counts"]["photos"]) == (6, 1)
    assert not [key for key in alone if key.startswith("intervals.")]


def test_the_page_about_comparing_recomputes_an_interval_from_per_image_rows(files: Files, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    records, predictions = make_rows(60, readouts=False)
    for i, (truth, row) in enumerate(zip(records, predictions, strict=True)):
        truth["images"] = [f"img/{i // 3}.png"]  # three records a photo, that of the first without a box
        shift = rng.choice([1, 12], p=[0.7, 0.3])
        row["objects"] = [{"desc": o["desc"], "bbox_2d": [v - 8 + shift for v in o["bbox_2d"]]} for o in row["objects"]]
    results = evaluate_files(*files(records, predictions), OPTIONS, out=tmp_path / "out")
    page = (Path(__file__).parents[1] / "docs" / "comparing.md").read_text(encoding="utf-8")
    code = re.search(r"## An interval by hand.*?```python\n(.*?)```", page, flags=re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    key = "detection.file.agnostic.recall.50"
    assert scope["recall_interval"](tmp_path / "out", 200) == pytest.approx((results[key], *results[f"intervals.{key}"]), rel=1e-9)


def test_scores_in_the_file_add_the_file_mode(files: Files) -> None:
    results = evaluate_files(*files(*make_rows(5, scores=True)), OPTIONS, out=None)
    assert {"coco.file.ap", "coco.file.ar100", "coco.constant.ap"} <= results.keys()
    assert results["provenance"]["score_source"] == "probability"


def test_failed_rows_count_as_images_without_boxes(files: Files) -> None:
    records, predictions = make_rows(4)
    predictions[3] |= {"objects": [], "error": "image cannot be read"}
    results = evaluate_files(*files(records, predictions), OPTIONS, out=None)
    assert results["counts"]["failed"] == 1
    assert results["detection.median.agnostic.recall.50"] == pytest.approx(4 / 6)
    assert results["health.parse_rate"] == 0.75


def test_polygons_of_the_truth_are_evaluated_by_their_box_and_points_are_refused(files: Files) -> None:
    records, predictions = make_rows(2)
    box = records[1]["objects"][0]["bbox_2d"]
    records[1]["objects"] = [{"desc": "a", "poly": [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]}]
    predictions[1]["objects"] = [{"desc": "a", "bbox_2d": box}]
    assert evaluate_files(*files(records, predictions), OPTIONS, out=None)["detection.file.aware.f1.95"] == 1
    records[1]["objects"] = [{"desc": "a", "point_2d": [5.0, 5.0]}]
    with pytest.raises(ComparisonError, match=r"objects\[0\] is a point_2d"):
        evaluate_files(*files(records, predictions), OPTIONS, out=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, p: (r, p[:-2]), r"2 of 4 records have no prediction in predictions\.jsonl, first 'im-2'"),
        (lambda r, p: (r[1:], p), r"1 of 4 predictions have no record in test\.jsonl, first 'im-0' \(predictions\.jsonl:1\)"),
        (lambda r, p: (r, [p[0] | {"width": 50}, *p[1:]]), r"image 'im-0' is 50x100 in the predictions and 100x100 in the records"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(files: Files, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ComparisonError, match=message) as caught:
        evaluate_files(*files(*change(*make_rows(4))), OPTIONS, out=None)
    assert "\n" not in str(caught.value)


def test_an_unknown_convention_is_refused(files: Files) -> None:
    with pytest.raises(ConfigError, match="unknown coordinate convention"):
        evaluate_files(*files(*make_rows(2)), OPTIONS, out=None, convention="norm1")


GOOD: Row = {"image_id": "a", "width": 10, "height": 10, "objects": [{"desc": "x", "bbox_2d": [0, 0, 5, 5.5]}], "score_source": None}


def with_object(**changes: Any) -> Row:
    return GOOD | {"objects": [GOOD["objects"][0] | changes]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ([], "predictions.jsonl:2: line: expected one JSON object, got []"),
        ({k: v for k, v in GOOD.items() if k != "objects"}, "predictions.jsonl:2: objects: expected the field to be present"),
        (GOOD, "predictions.jsonl:2: image_id: expected one row per image, got 'a' again (first at predictions.jsonl:1)"),
        (GOOD | {"image_id": 3}, "predictions.jsonl:2: image_id: expected a string that is not empty, got 3"),
        (GOOD | {"width": 0}, "predictions.jsonl:2: width: expected an integer of at least 1, got 0"),
        (GOOD | {"height": True}, "predictions.jsonl:2: height: expected an integer of at least 1, got True"),
        (GOOD | {"objects": {}}, "predictions.jsonl:2: objects: expected a list, got {}"),
        (GOOD | {"objects": [1]}, "predictions.jsonl:2: objects[0]: expected a JSON object, got 1"),
        (GOOD | {"objects": [{"desc": "x"}]}, "predictions.jsonl:2: objects[0].bbox_2d: expected the field to be present"),
        (with_object(desc=None), "predictions.jsonl:2: objects[0].desc: expected a string, got None"),
        (with_object(bbox_2d=[1, 2, 3]), "predictions.jsonl:2: objects[0].bbox_2d: expected 4 numbers [x1, y1, x2, y2], got [1, 2, 3]"),
        (with_object(bbox_2d=[1, 2, 3, float("nan")]), "predictions.jsonl:2: objects[0].bbox_2d: expected a finite number, got nan"),
        (with_object(bbox_2d=[1, 2, 3, 10**400]), "predictions.jsonl:2: objects[0].bbox_2d: expected a finite number, got 1000"),
        (with_object(score="1"), "predictions.jsonl:2: objects[0].score: expected a finite number, got '1'"),
        (with_object(readouts={"mode": [1, 2, 3, 4]}), "predictions.jsonl:2: objects[0].readouts: expected names among argmax"),
        (with_object(readouts={"median": [1]}), "predictions.jsonl:2: objects[0].readouts.median: expected 4 numbers"),
        (GOOD | {"problems": {"bad": -1}}, "predictions.jsonl:2: problems.bad: expected an integer of at least 0, got -1"),
        (GOOD | {"truncated": 1}, "predictions.jsonl:2: truncated: expected true or false, got 1"),
        (with_object(score=0.5) | {"image_id": "b"}, "predictions.jsonl:2: objects[0].score: expected no score, as at predictions.jsonl:1"),
        (with_object(readouts={"auto": [0, 0, 1, 1]}) | {"image_id": "b"}, "predictions.jsonl:2: objects[0].readouts: expected [], as at"),
    ],
)
def test_bad_predictions_are_named_by_line_and_field(tmp_path: Path, second: Any, message: str) -> None:
    path = write(tmp_path / "predictions.jsonl", [GOOD, second])
    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_scores_of_two_sources_are_refused(tmp_path: Path) -> None:
    rows = [with_object(score=0.5) | {"image_id": name, "score_source": name} for name in "ab"]
    with pytest.raises(DataError, match="score_source: expected 'a'"):
        read_predictions(write(tmp_path / "p.jsonl", rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "got an empty file"), (b'{"image_id": "a"', "p.jsonl:1: line: "), (b"\xff\n", "p.jsonl:1: line: ")],
)
def test_empty_truncated_and_binary_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_predictions(path)
    with pytest.raises(DataError, match="cannot read the predictions file"):
        read_predictions(tmp_path / "absent.jsonl")


def test_optional_fields_are_optional_and_boxes_stand_as_they_are(tmp_path: Path) -> None:
    reversed_box = [9.0, 9.0, -1.0, 12.0]
    (row,) = read_predictions(write(tmp_path / "p.jsonl", [with_object(bbox_2d=reversed_box) | {"note": 1}]))
    assert row.objects[0].box == tuple(reversed_box)
    assert (row.problems, row.error, row.num_tokens, row.truncated, row.states_error) == (None, None, None, None, False)


def test_best_readout_is_by_agnostic_f1_and_headline_names_it(files: Files) -> None:
    results = evaluate_files(*files(*make_rows()), OPTIONS, out=None)
    assert best_readout(results) == "median"
    rows = dict(headline(results))
    assert rows["images"] == "12 of 12"
    assert rows["F1@.5 class-agnostic (median)"] == "1.000 [0.741, 1.000]"
    assert rows["F1@.5 class-aware (median)"].startswith("0.500 [")
    assert rows["edge error of matched boxes, bins (median)"] == "undefined"
    assert "COCO AP, scores of the file" not in rows
    tied = {key: 0.0 if key.endswith("agnostic.f1.50") else value for key, value in results.items()}
    assert best_readout(tied) == "file"


def test_results_never_hold_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_results({"x": float("nan")}, tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []
