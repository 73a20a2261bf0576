"""Every section of the report: what it shows where the run has it, what it says where not, and the figures behind it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page import Page

from coordexp.data.records import read_records
from coordexp.errors import DataError
from coordexp.evaluate.bootstrap import wilson
from coordexp.evaluate.predictions import Prediction, read_predictions
from coordexp.runs import figures
from coordexp.runs.failures import name_confusion, parse_failures
from coordexp.runs.logs import RunLog, read_log
from coordexp.runs.options import ReportOptions
from coordexp.runs.report import write_report
from coordexp.runs.tables import Metrics
from run_fixture import make_run

HOSTILE = '</figure><script>alert("1")</script><img src=x onerror=alert(2)>&\'"'


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("sections") / "run", images=9)


@pytest.fixture(scope="module")
def sections(run_dir: Path) -> dict[str, str]:
    return split(write_report(run_dir, ReportOptions()).read_text())


Reports = Callable[[tuple[str, ...]], str]


@pytest.fixture(scope="module")
def reports(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """The report without some files, made once for each choice of them."""
    return cache(lambda files: without(run_dir, tmp_path_factory.mktemp("without") / "run", *files))


def split(text: str) -> dict[str, str]:
    """Source of each section by the id of its heading."""
    return dict(re.findall(r'<section aria-labelledby="h-(\w+)">(.*?)</section>', text, flags=re.S))


def without(run_dir: Path, target: Path, *names: str) -> str:
    shutil.copytree(run_dir, target)
    for name in names:
        shutil.rmtree(target / name) if (target / name).is_dir() else (target / name).unlink()
    text = write_report(target, ReportOptions()).read_text()
    Page(text)
    return text


def edit(path: Path, change: Any) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SECTIONS = [
    # section, what it shows, the files that carry it, what it says without them
    ("headline", "F1 .50, agnostic", ("results.json",), "so there are no headline numbers"),
    ("audit", "31 rules were applied", ("logging.jsonl",), "no log that can be audited"),
    ("pictures", 'class="curve"', ("predictions.jsonl.distributions",), "No distributions were saved"),
    ("pictures", "<img ", ("data",), "no readable test records"),
    ("pictures", "<img ", ("data/img",), "image files of the test records are not there"),
    ("loss", "What the loss is made of", ("logging.jsonl",), "no log with loss terms"),
    ("loss", "Evaluation over training", ("logging.jsonl",), "no log with loss terms"),
    ("distribution", "KL to the soft target", ("logging.jsonl",), "no log with coordinate distributions"),
    ("calibration", "PIT histogram", ("histograms.jsonl",), "no histograms.jsonl"),
    ("calibration", "Coverage of central", ("histograms.jsonl", "results.json", "logging.jsonl"), "calibration cannot be shown"),
    ("calibration", "How far off the edges are", ("results.json",), "no calibration of predicted boxes"),
    ("coord", "Error by size of the true box", ("logging.jsonl",), "no log with coordinate errors"),
    ("answers", "answers were read without a problem", ("predictions.jsonl",), "do not say what the parser could not read"),
    ("speed", "tokens/s", ("logging.jsonl",), "no log with speeds"),
    ("provenance", "sigma: 8.0", ("config.yaml",), "no config.yaml"),
]


@pytest.mark.parametrize(("name", "shown", "files", "sentence"), SECTIONS)
def test_each_section_appears_with_data_and_says_so_without(
    reports: Reports, sections: dict[str, str], name: str, shown: str, files: tuple[str, ...], sentence: str
) -> None:
    assert shown in sections[name]
    assert sentence not in sections[name]
    assert sentence in split(reports(files))[name]


def test_what_is_missing_is_listed_with_links_to_the_sections(run_dir: Path, sections: dict[str, str], tmp_path: Path) -> None:
    assert "Not in this report" not in sections.get("notes", "")
    page = Page(
        without(run_dir, tmp_path / "run", "results.json", "histograms.jsonl", "predictions.jsonl", "predictions.jsonl.distributions")
    )
    links = {str(a["href"]) for a in page.of("a")}
    ids = {f"#{a['id']}" for _, a in page.elements if a.get("id")}
    assert {"#h-headline", "#h-calibration", "#h-answers", "#h-pictures"} <= links
    assert links <= ids


def test_report_of_a_run_that_stopped_at_once_still_says_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=2, status="failed")
    for path in run.iterdir():
        if path.name not in ("config.yaml", "manifest.json", "logging.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    header = (run / "logging.jsonl").read_text().splitlines()[0]
    (run / "logging.jsonl").write_text(header + '\n{"step": 1, "lo')
    text = write_report(run, ReportOptions()).read_text()
    Page(text)
    assert "stopped with an error" in text
    assert "no training or evaluation rows" in text
    assert "is torn" in text
    assert len(split(text)) == 11


def test_distributions_of_another_grid_are_not_drawn_and_it_is_said(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest | {"convention": "norm1000"}))
    text = write_report(tmp_path / "run", ReportOptions()).read_text()
    assert 'class="curve"' not in text
    assert "distributions over 1000 bins do not fit the convention norm1000" in text


def test_an_audit_file_of_another_log_is_not_shown(run_dir: Path, tmp_path: Path) -> None:
    old = {
        "rules": [{"code": "CX999", "title": "An old finding", "outcome": "finding", "severity": "severe", "evidence": [], "advice": ""}]
    }
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run/audit.json").write_text(json.dumps(old))
    text = write_report(tmp_path / "run", ReportOptions()).read_text()
    assert "An old finding" not in text
    assert "audit.json differs from the audit of the log as it stands" in text


def test_findings_of_the_log_are_shown_and_linked_to_their_rule(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    edit(tmp_path / "run/logging.jsonl", lambda row: row.update(loss=float("nan")) if row.get("step") == 300 and "loss" in row else None)
    text = write_report(tmp_path / "run", ReportOptions()).read_text()
    section = split(text)["audit"]
    assert '<a href="#cx010">CX010</a> · severe' in section
    assert '<article class="rule severe" id="cx010">' in section
    assert "docs/audit-rules.md#cx010" in section


def test_hostile_text_in_every_place_is_shown_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=2)

    def poison(row: dict[str, Any]) -> None:
        for item in row["objects"]:
            item["desc"] = HOSTILE
        row["image_id"] += HOSTILE
        if "problems" in row:
            row.update(problems={HOSTILE: 1})
        else:
            row["metadata"] = {"phrase": HOSTILE}

    edit(run / "data/test.jsonl", poison)
    edit(run / "predictions.jsonl", poison)
    shutil.rmtree(run / "predictions.jsonl.distributions")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest.update(name=HOSTILE, notes=[HOSTILE], command=[HOSTILE], stages={HOSTILE: 2.0})
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "config.yaml").write_text(f"question: {json.dumps(HOSTILE)}\n")
    results = json.loads((run / "results.json").read_text())
    results.update(notes=[HOSTILE], counts={HOSTILE: 1, "effective": 200})
    (run / "results.json").write_text(json.dumps(results))
    text = write_report(run, ReportOptions()).read_text()
    page = Page(text)
    assert page.of("script") == []
    assert not any("onerror" in a for _, a in page.elements)
    assert {str(a["src"])[:5] for a in page.of("img")} == {"data:"}
    # Title, note, command, names on true and predicted boxes, a problem's kind ...
    assert page.text.count('alert("1")') >= 12
    assert page.text.count("“" + HOSTILE + "”") == 2


def test_the_demo_sized_report_is_small(sections: dict[str, str], run_dir: Path) -> None:
    assert (run_dir / "report.html").stat().st_size < 3_000_000


def test_loss_bands_are_the_contributions_and_absent_terms_have_none(run_dir: Path) -> None:
    log = read_log(run_dir)
    plot = figures.loss_plot(log)
    assert plot is not None
    last = log.train[-1]
    total = sum(last[f"contrib/{term}"] for term in ("text_ce", "soft_ce", "gate"))
    expected = [f"{term} {last[f'contrib/{term}'] / total:.0%}".replace("%", " %") for term in ("text_ce", "soft_ce", "gate")]
    assert [label for label, _ in plot.legend] == [*expected, "evaluation, total"]
    assert figures.loss_plot(RunLog(None, [{"step": s, "loss": 1.0} for s in range(9)], [])) is None


def test_rows_whose_contributions_are_no_numbers_are_left_out_of_the_bands_and_counted(run_dir: Path) -> None:
    log = read_log(run_dir / "logging.jsonl")
    key = next(key for key in log.train[0] if key.startswith("contrib/"))
    broken = replace(log, train=[row | {key: math.nan} if i in (3, 7) else row for i, row in enumerate(log.train)])
    plot, sound = figures.loss_plot(broken), figures.loss_plot(log)
    assert plot is not None
    assert sound is not None
    assert plot.caption == sound.caption + " Rows with a part that is no finite number are left out: 2."
    assert plot.description == sound.description


def test_ratio_is_evaluation_over_training_and_needs_three_evaluations() -> None:
    train = [{"step": s, "loss": 2.0} for s in range(1, 101)]
    evaluation = [{"step": s, "eval_loss": 3.0} for s in (25, 50, 75, 100)]
    plot = figures.ratio_plot(RunLog(None, train, evaluation))
    assert plot is not None
    assert plot.description == "Ratio of evaluation to training, last: total loss 1.5."
    assert figures.ratio_plot(RunLog(None, train, evaluation[:2])) is None


def test_error_curve_reads_its_quantiles_from_the_histogram(run_dir: Path) -> None:
    rows = figures.read_histograms(run_dir / "histograms.jsonl")
    counts = rows[-1]["eval_coord_dist/abs_err"]["counts"]
    errors = np.repeat(np.arange(2000) * 0.5 + 0.5, counts)  # upper edges of the cells
    expected = [float(np.quantile(errors, q, method="inverted_cdf")) for q in (0.5, 0.9)]
    plot = figures.error_curve(rows)
    assert plot is not None
    assert plot.description == f"Half of the edges lie within {expected[0]:.3g} bins of the truth, 90 % within {expected[1]:.3g}."
    assert "step 600" in plot.caption


def test_histograms_that_are_torn_or_damaged_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "histograms.jsonl"
    good = '{"step": 1, "coord_dist/pit": {"low": 0, "high": 1, "counts": [1, 2]}}\n'
    path.write_text(good + '{"step": 2, "coord')
    assert len(figures.read_histograms(path)) == 1
    for bad in ("[]\n", '{"step": 2, "x": 3}\n', '{"step": 2, "x": {"low": 0, "high": 1, "counts": ["a"]}}\n'):
        path.write_text(good + bad)
        with pytest.raises(DataError, match=r"histograms\.jsonl:2: expected a row of histograms"):
            figures.read_histograms(path)


def test_size_figure_takes_the_finer_division_that_has_boxes() -> None:
    results: dict[str, Any] = {"detection.median.aware.f1.50": 0.5, "localisation.median.all.mean_bins": 3.0}
    for kind, names in (("size", ("small", "medium")), ("bins", ("8-16", "16-32", "128+"))):
        for name in names:
            results |= {f"localisation.median.{kind}.{name}.n": 5, f"localisation.median.{kind}.{name}.mean_px": 2.0}
    plot = figures.size_plot(Metrics(results))
    assert plot is not None
    assert plot.description.startswith(
        "mean error of an edge, px for 8 to 16 bins, 5 boxes, 16 to 32 bins, 5 boxes, 128 and more bins, 5 boxes"
    )
    assert figures.size_plot(Metrics({"detection.median.aware.f1.50": 0.5})) is None


def answers(run_dir: Path, problems: dict[int, dict[str, int]]) -> tuple[list[Any], dict[str, Prediction]]:
    records = list(read_records(run_dir / "data/test.jsonl").records)
    rows = read_predictions(run_dir / "predictions.jsonl")
    changed = [replace(row, problems=problems.get(i, {})) for i, row in enumerate(rows)]
    return records, {row.image_id: row for row in changed}


def test_failures_count_kinds_and_images_by_true_objects(run_dir: Path) -> None:
    records, predictions = answers(run_dir, {0: {"truncated": 1}, 1: {"bad_object": 2, "truncated": 1}, 4: {"bad_object": 1}})
    found = parse_failures(records, predictions)
    assert found is not None
    sizes = Counter(str(len(record.objects)) for record in records)
    assert found.columns == tuple(sorted(sizes.items()))
    assert (found.clean, found.answers) == (6, 9)
    rows = {row.kind: row for row in found.rows}
    assert (rows["bad object"].count, rows["bad object"].images) == (3, 2)
    assert (rows["truncated"].count, rows["truncated"].images) == (2, 2)
    for kind, images in (("bad object", (1, 4)), ("truncated", (0, 1))):
        expected = Counter(str(len(records[i].objects)) for i in images)
        assert [n for n, _ in rows[kind].cells] == [expected[label] for label, _ in found.columns]
    silent = {key: replace(p, problems=None, states_error=False) for key, p in predictions.items()}
    assert parse_failures(records, silent) is None


def test_confused_names_are_those_of_boxes_in_place(run_dir: Path) -> None:
    records, predictions = answers(run_dir, {})
    found = name_confusion(records, predictions)
    assert found is not None
    pairs: Counter[tuple[str, str]] = Counter()
    for record in records:
        for item in predictions[record.image_id].objects:
            best = max(record.objects, key=lambda true: _iou(true.values, item.box))
            if _iou(best.values, item.box) >= 0.5:
                pairs[best.desc, item.desc] += 1
    assert found.matched == pairs.total()
    assert found.right == sum(n for (t, p), n in pairs.items() if t == p)
    assert {(t, p): n for t, p, n, _ in found.wrong} == {key: n for key, n in pairs.items() if key[0] != key[1]}
    assert name_confusion([], {}) is None


def _iou(a: Any, b: Any) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return float(shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared))


def test_wilson_interval_inverts_the_score_test() -> None:
    for rate, total in ((1.0, 200), (0.5, 30), (0.0, 8), (0.985, 200)):
        for bound in wilson(rate, total):
            if 1e-6 < bound < 1 - 1e-6:
                assert abs(rate - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / total), rel=1e-6)
    assert wilson(1.0, 200)[0] == pytest.approx(0.98116, abs=1e-5)
