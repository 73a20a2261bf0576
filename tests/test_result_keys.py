"""The registry of result keys: every metric of real evaluations of each task is in it, and its keys come from nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_coordinate_calibration import gaussian, save

from coordexp.evaluate import registry
from coordexp.evaluate.distributions import distributions_folder
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.registry import HEADLINES, READOUT_NAMES, READOUTS, SHEETS, by_key, key_problem
from coordexp.evaluate.result import evaluate_files


def _results(folder, task, scored=True, areas=False):
    """Results with everything a task can have: scores, all readouts, LVIS metadata and distributions of boxes."""
    rng = np.random.default_rng(3)
    records, predictions, slots = [], [], []
    for i in range(30):
        side = float(rng.uniform(12, 70))
        x, y = rng.uniform(0, 100 - side, 2)
        box = [x, y, x + side, y + side]
        metadata = {"phrase": "it"} if task != "detection" else {"neg_categories": ["dog"], "category_frequency": {"cat": "r", "cow": "f"}}
        records.append(
            {"images": [f"{i}.png"], "width": 100, "height": 100, "image_id": str(i), "metadata": metadata,
             "objects": [{"desc": ("cat", "cow")[i % 2], "bbox_2d": box}]}
        )  # fmt: skip
        moved = [float(v) for v in np.clip(np.array(box) + rng.normal(0, 1, 4), 0, 100)]
        found = {"desc": ("cat", "cow")[i % 3 == 0], "bbox_2d": moved, "score": 0.5, "readouts": dict.fromkeys(READOUT_NAMES, moved)}
        if not scored:
            del found["score"]
        if areas:
            records[-1]["objects"][0]["area"] = 0.7 * side * side
        if task == "grounding" and i == 29:
            records[-1]["objects"] = []
        if task == "pointing":
            point = [x + side / 2, y + side / 2]
            found = {"desc": "cat", "point_2d": point, "readouts": dict.fromkeys(READOUT_NAMES, point)}
        slots += [(str(i), 0, s, gaussian(moved[s] * 9.99, 5)) for s in range(4)]
        source = "token" if scored and task != "pointing" else None
        predictions.append(
            {"image_id": str(i), "width": 100, "height": 100, "objects": [found], "score_source": source,
             "problems": {}, "error": None, "num_tokens": 9, "truncated": False}
        )  # fmt: skip
    folder.mkdir()
    for name, rows in (("r.jsonl", records), ("p.jsonl", predictions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if task != "pointing":
        save(distributions_folder(folder / "p.jsonl"), slots)
    return evaluate_files(folder / "p.jsonl", folder / "r.jsonl", EvaluateOptions(bootstrap=0), out=None)


def _best(key):
    """A key with its readout replaced, so that the registry's ``best`` is compared too."""
    head, _, rest = key.partition(".")
    readout, _, end = rest.partition(".")
    return f"{head}.best.{end}" if readout in READOUTS and head in ("detection", "localisation", "grounding") else key


def test_the_registry_is_what_evaluations_write(tmp_path):
    written = set()
    kinds = [("detection", 1, 0), ("detection", 0, 0), ("detection", 1, 1), ("grounding", 1, 0), ("pointing", 1, 0)]
    for number, (task, scored, areas) in enumerate(kinds):
        results = _results(tmp_path / str(number), task, scored, areas)
        assert results["task"] == task
        written |= {key for key, value in results.items() if "." in key and (value is None or isinstance(value, int | float))}
    written = {key for key in written if not key.startswith("health.problems.")}
    assert written | {_best(key) for key in written} == set(by_key())
    assert len(written) > 500


def test_the_page_about_metrics_is_written_from_the_registry():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert registry.written_into(page) == page, "run: python -m coordexp.evaluate.registry docs/metrics.md"


def test_every_number_shown_anywhere_is_in_the_registry():
    sheets = {f"{row.format('file')}.{column}" for sheet in SHEETS for _, row in sheet.rows for _, column in sheet.columns}
    # A sheet crosses its rows with its columns: macro F1 has no aspect of its own, but every row and every column has numbers.
    for sheet in SHEETS:
        for of in (sheet.rows, sheet.columns):
            for _, part in of:
                assert any(part.format("file") in key for key in sheets & set(by_key())), part
    assert {shown.key.format("file") for shown in HEADLINES} <= set(by_key())


@pytest.mark.parametrize("key", ["detection.best.agnostic.f1.50", "health.parse_rate", "calibration.all.coverage_80"])
def test_a_legal_key_has_no_problem_and_one_letter_less_has(key):
    assert key_problem(key) is None
    assert f"did you mean {key}?" in key_problem(key[:4] + key[5:])
    assert EvaluateOptions(expect={key: 0.5}).expect == {key: 0.5}
    with pytest.raises(ValueError, match=r"evaluate\.expect\..*: expected a finite lower bound"):
        EvaluateOptions(expect={key: float("nan")})
