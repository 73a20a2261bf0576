"""Files of other programs are read, or refused in lines for a person; never a traceback.

1,000 of each kind: ``python tests/hostile.py 1000``.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from coordexp.data.yaml_text import MAX_VALUES, parse_yaml
from coordexp.runs.charts import COORD_PANELS, MAX_POINTS, binned, draw_panels
from coordexp.runs.logs import RunLog
from coordexp.runs.options import ReportOptions
from coordexp.runs.report import write_report
from hostile import BOMB, MAKERS, attempt
from run_fixture import make_run


@pytest.mark.parametrize("kind", MAKERS)
def test_no_file_of_another_program_is_a_traceback(kind, tmp_path):
    found = [attempt(kind, seed, tmp_path / str(seed)) for seed in range(25 if kind == "yaml" else 60)]
    refused = [text for text in found if text is not None]
    assert 0 < len(refused) < len(found)
    # A damaged file is one line; an experiment has a line for each of its faults.
    assert all(kind == "yaml" or "\n" not in text for text in refused)
    assert max(len(line) for text in refused for line in text.splitlines()) < 6000 if kind == "yaml" else max(map(len, refused)) < 600


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, f"more than {MAX_VALUES:,} values"), ("a: &x [*x]", "within what it is an alias of"), ("[" * 50_000, "nested too deeply"),
        ("- " * 2000, "nested too deeply"),
        ("a: " + "9" * 5000, "4300"), ("a: !!int ''", "does not fit its tag"), ("a: [", "line 1"), ("a: \x00", "special characters"),
    ],
)  # fmt: skip
def test_yaml_that_would_harm_is_one_short_line(text, word):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=word) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.perf_counter() - begin < 5


def test_dates_of_yaml_stay_text_and_aliases_work():
    assert parse_yaml("a: 2026-11-24\nb: &x [1, 2]\nc: *x") == {"a": "2026-11-24", "b": [1, 2], "c": [1, 2]}
    assert parse_yaml("") is None


def test_a_long_line_is_drawn_with_its_spikes_ends_and_gaps():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 100_000)
    values[61_234], values[5_678] = 50.0, -40.0
    values[20_000:22_000] = np.nan
    steps, kept = binned(range(100_000), values.tolist())
    assert len(kept) <= MAX_POINTS
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert (np.nanmax(kept), np.nanmin(kept)) == (50.0, -40.0)
    assert np.isnan([v for s, v in zip(steps, kept, strict=True) if 20_500 < s < 21_500]).all()
    assert binned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    rows = [{"step": i, COORD_PANELS[0].key: v} for i, v in enumerate(values[:30_000].tolist())]
    charts, _ = draw_panels(RunLog(None, rows, []), COORD_PANELS[:1])
    assert len(charts[0].svg) < 30_000


def test_a_run_whose_files_hold_odd_values_still_has_a_report_that_names_them(tmp_path):
    run = make_run(tmp_path / "run", images=2, side=32, objects=1)
    (run / "config.yaml").write_text("train: {learning_rate: x, per_device_train_batch_size: 1}\n")
    (run / "histograms.jsonl").write_text('{"step": "x", "eval_coord_dist/pit": {"low": 0, "high": 1, "counts": [1, 2]}}\n')
    (run / "manifest.json").write_text((run / "manifest.json").read_text().replace('"data": 14.2', '"data": NaN'))
    page = write_report(run, ReportOptions(images=1)).read_text()
    for word in ("config.yaml: train: expected", "histograms.jsonl:1: expected a row of histograms"):
        assert word in page
