"""Calibrated scores: against scikit-learn on verdicts of a slow matcher, and through the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from command import call
from coordexp.decode.scores import (
    Calibration,
    calibrated,
    distribution_score,
    fit_calibration,
    load_calibration,
    open_calibration,
    token_score,
)
from coordexp.errors import ComparisonError, ConfigError, DataError
from tiny import fitted_folder, workspace


def _overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _area(a):
    return (a[2] - a[0]) * (a[3] - a[1])


def _iou(a, b):
    return _overlap(a, b) / (_area(a) + _area(b) - _overlap(a, b))


def _verdicts(row, record, threshold):
    """(score, right) of an image's boxes, box by box; nothing for one in a crowd."""
    left = [o for o in record["objects"] if not o.get("iscrowd")]
    found = []
    for item in sorted(row["objects"], key=lambda o: -o["score"]):
        best = max((o for o in left if o["desc"] == item["desc"]), key=lambda o: _iou(item["bbox_2d"], o["bbox_2d"]), default=None)
        if best is not None and _iou(item["bbox_2d"], best["bbox_2d"]) >= threshold:
            left.remove(best)
            found.append((item["score"], 1.0))
        elif not any(
            o.get("iscrowd") and o["desc"] == item["desc"] and _overlap(item["bbox_2d"], o["bbox_2d"]) >= threshold * _area(item["bbox_2d"])
            for o in record["objects"]
        ):
            found.append((item["score"], 0.0))
    return found


def _case(seed, images=30):
    """Predictions near the truth, more often right where the score is high; crowds, empty images and strays among them."""
    random = np.random.default_rng(seed)
    rows, records = [], []
    for n in range(images):
        corner = random.uniform(0, 60, (random.integers(0, 5), 2))
        true = np.hstack([corner, corner + random.uniform(10, 40, corner.shape)])
        names = random.choice(["cat", "dog"], len(true))
        truth = [{"desc": str(d), "bbox_2d": b.tolist()} for d, b in zip(names, true, strict=True)]
        for item in truth:
            if random.random() < 0.2:
                item["iscrowd"] = True
        records.append({"images": [f"{n}.png"], "width": 100, "height": 100, "image_id": str(n), "objects": truth})
        objects = []
        for box, name in [*zip(true, names, strict=True), *zip(true[:2], names[:2], strict=True)]:
            score = float(random.random())
            moved = box + random.normal(0, 14 * (1 - score), 4)
            if moved[2] > moved[0] + 1 and moved[3] > moved[1] + 1:
                objects.append({"desc": str(name) if random.random() < 0.9 else "bird", "bbox_2d": moved.tolist(), "score": score})
        rows.append({"image_id": str(n), "width": 100, "height": 100, "objects": objects, "score_source": "token"})
    return rows, records


def _write(folder, rows, records):
    paths = folder / "p.jsonl", folder / "r.jsonl"
    for path, items in zip(paths, (rows, records), strict=True):
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


@pytest.mark.parametrize("threshold", [0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_calibration_is_scikit_learns_isotonic_fit_to_the_verdicts_of_a_slow_matcher(tmp_path, seed, threshold):
    rows, records = _case(seed)
    pairs = [pair for row, record in zip(rows, records, strict=True) for pair in _verdicts(row, record, threshold)]
    assert {right for _, right in pairs} == {0.0, 1.0}
    assert len(pairs) < sum(len(row["objects"]) for row in rows)
    reference = IsotonicRegression(out_of_bounds="clip").fit(*zip(*pairs, strict=True))
    made = fit_calibration(*_write(tmp_path, rows, records), iou=threshold)
    grid = [-1.0, *np.linspace(0, 1, 301), 2.0]
    np.testing.assert_allclose([made(score) for score in grid], reference.predict(grid), atol=1e-12)
    assert (made.boxes, made.iou, made.score_source) == (len(pairs), threshold, "token")


def test_a_calibration_survives_the_disk_and_marks_the_rows_it_was_used_on(tmp_path):
    rows, records = _case(0)
    made = fit_calibration(*_write(tmp_path, rows, records))
    made.save(tmp_path / "c.json")
    assert load_calibration(tmp_path / "c.json") == made
    assert open_calibration(tmp_path / "c.json", None, "token") == made
    row = calibrated(rows[0], made)
    assert row["score_source"] == "token+isotonic"
    assert [o["score"] for o in row["objects"]] == [made(o["score"]) for o in rows[0]["objects"]]
    assert [o["bbox_2d"] for o in row["objects"]] == [o["bbox_2d"] for o in rows[0]["objects"]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows, records: records.pop(), ComparisonError, "is not in r.jsonl"),
        (lambda rows, records: [o.pop("score") for r in rows for o in r["objects"]], ComparisonError, "have no scores"),
        (lambda rows, records: [r.update(score_source="token+isotonic") for r in rows], ComparisonError, "calibrated already"),
        (lambda rows, records: [r.update(objects=[]) for r in rows], DataError, "no box to calibrate on"),
        (lambda rows, records: [r.update(width=99) for r in rows], ComparisonError, "another size"),
        (lambda rows, records: [r["objects"].append({"desc": "x", "point_2d": [1, 1]}) for r in records], ComparisonError, "point_2d"),
    ],
    ids=["unknown image", "no scores", "calibrated twice", "no boxes", "another size", "points"],
)
def test_files_that_cannot_be_calibrated_on_are_refused(tmp_path, change, error, message):
    rows, records = _case(1)
    change(rows, records)
    with pytest.raises(error, match=message):
        fit_calibration(*_write(tmp_path, rows, records))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"x": []},
        {"x": [0.5, 0.1]},
        {"y": [0.9, 0.1]},
        {"y": [0.1, 1.5]},
        {"y": None},
        {"x": [0.1, float("nan")]},
        {"iou": "a"},
    ],
    ids=str,
)
def test_a_damaged_calibration_is_refused(tmp_path, change):
    Calibration("token", (0.1, 0.9), (0.2, 0.8), 0.5, 10).save(tmp_path / "c.json")
    assert load_calibration(tmp_path / "c.json").boxes == 10
    content = json.loads((tmp_path / "c.json").read_text()) | change
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"c\.json"):
        load_calibration(tmp_path / "c.json")


def test_a_calibration_of_other_scores_and_predictions_without_records_are_refused(tmp_path):
    Calibration("token", (0.1, 0.9), (0.2, 0.8), 0.5, 10).save(tmp_path / "c.json")
    with pytest.raises(ComparisonError, match="use one --score for both"):
        open_calibration(tmp_path / "c.json", None, "distribution")
    (tmp_path / "p.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="--calibrate-data"):
        open_calibration(tmp_path / "p.jsonl", None, "token")


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 1), max_size=6), st.lists(st.floats(1e-6, 1), min_size=4, max_size=4), st.integers(0, 2**31))
def test_scores_are_their_formulas_written_as_products(desc, coords, seed):
    import torch

    logs = [[float(np.log(v)) for v in values] for values in (desc, coords)]
    assert token_score(*logs) == pytest.approx(np.prod([*desc, *coords]) ** (1 / (len(desc) + 4)))
    p = np.random.default_rng(seed).dirichlet(np.full(60, 0.2), 4)
    positions = np.random.default_rng(seed).uniform(0, 59, 4)
    mass = [sum(p[j, k] for k in range(60) if abs(k - positions[j]) <= 5) for j in range(4)]
    found = distribution_score(logs[0], torch.from_numpy(p), torch.from_numpy(positions), half_width=5)
    assert found == pytest.approx(np.prod(mass) * np.prod(desc), rel=1e-9)


def test_predict_fits_saves_and_uses_a_calibration(tmp_path, monkeypatch, capsys):
    data = workspace() / "data" / "train.jsonl"
    held, out, again = tmp_path / "held.jsonl", tmp_path / "p.jsonl", tmp_path / "again.jsonl"
    words = ["predict", fitted_folder(), data, "--limit", 4, "--max-new-tokens", 130]
    assert call(monkeypatch, capsys, *words, "--out", held)[0] == 0
    code, _, err = call(monkeypatch, capsys, *words, "--out", out, "--calibrate", held, "--calibrate-data", data)
    assert code == 0, err
    made = load_calibration(tmp_path / "p.jsonl.calibration.json")
    pairs = [(json.loads(a), json.loads(b)) for a, b in zip(held.read_text().splitlines(), out.read_text().splitlines(), strict=True)]
    assert sum(len(row["objects"]) for row, _ in pairs) >= 4
    for before, after in pairs:
        assert after == calibrated(before, made)
    code, _, err = call(monkeypatch, capsys, *words, "--out", again, "--calibrate", tmp_path / "p.jsonl.calibration.json")
    assert code == 0, err
    assert again.read_bytes() == out.read_bytes()
    code, _, err = call(monkeypatch, capsys, *words, "--out", out)
    assert code == 2
    assert "calibration: " in err
