import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from page import Page
from PIL import Image

from coordexp.errors import DataError
from coordexp.runs import tables
from coordexp.runs.charts import LOSS_PANELS, draw_panels
from coordexp.runs.describe import duration
from coordexp.runs.logs import RunLog
from coordexp.runs.options import ReportOptions
from coordexp.runs.pictures import encode
from coordexp.runs.report import write_report
from run_fixture import make_run

# Panels of loss, distributions, errors and speed that the made-up log has values for, and 7 larger figures.
FIGURES = 4 + 4 + 4 + 4 + 7


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def report(run_dir: Path) -> str:
    path = write_report(run_dir, ReportOptions())
    assert path == run_dir / "report.html"
    return path.read_text()


def changed(run_dir: Path, target: Path, *, remove: tuple[str, ...] = (), write: dict[str, str] | None = None, images: int = 12) -> str:
    """The report of a copy of the run with some parts taken away or replaced."""
    shutil.copytree(run_dir, target)
    for name in remove:
        shutil.rmtree(target / name) if (target / name).is_dir() else (target / name).unlink()
    for name, text in (write or {}).items():
        (target / name).write_text(text)
    text = write_report(target, ReportOptions(images=images)).read_text()
    Page(text)
    return text


def test_report_is_one_file_that_asks_for_nothing(report: str) -> None:
    page = Page(report)
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (name, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", report))
    assert "@import" not in report
    assert not re.search(r"https?://", report)
    assert page.of("script") == []


def test_report_shows_headline_with_intervals_and_best_readout(report: str) -> None:
    text = " ".join(Page(report).text.split())
    assert "F1 .50, agnostic 0.742 0.701–0.783 any name; median, best of 6 readouts" in text
    assert "F1 .50, aware 0.463" in text
    assert "Localisation error 28.3 bins 26.6–30.0" in text
    assert "COCO AP 0.231 0.201–0.261" in text
    assert "Parse rate 98.5 % 97.3–99.7 %" in text


def test_pictures_are_the_first_of_the_file_with_true_and_predicted_boxes(run_dir: Path, report: str) -> None:
    page = Page(report)
    records = [json.loads(line) for line in (run_dir / "data/test.jsonl").read_text().splitlines()][:12]
    predictions = [json.loads(line) for line in (run_dir / "predictions.jsonl").read_text().splitlines()][:12]
    images = page.of("img")
    assert len(images) == 12
    assert all(record["image_id"] in str(image["alt"]) for record, image in zip(records, images, strict=True))
    drawn = [a["class"] for a in page.of("polygon")]
    assert drawn.count("true line") == sum(len(r["objects"]) for r in records)
    assert drawn.count("predicted line") == sum(len(p["objects"]) for p in predictions)
    assert drawn.count("curve") == 4 * drawn.count("predicted line")
    lines = [a for a in page.of("polygon") if str(a["class"]).endswith("line")]
    assert {bool(a.get("stroke-dasharray")) for a in lines if a["class"] == "true line"} == {False}
    assert {bool(a.get("stroke-dasharray")) for a in lines if a["class"] == "predicted line"} == {True}
    x1, y1, x2, y2 = records[0]["objects"][0]["bbox_2d"]
    assert f"{x1:.2f},{y1:.2f} {x2:.2f},{y1:.2f} {x2:.2f},{y2:.2f} {x1:.2f},{y2:.2f}" in report
    assert "none was picked by hand" in report
    first = str(images[0]["src"])
    decoded = Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2])))
    original = Image.open(run_dir / "data" / records[0]["images"][0])
    assert decoded.tobytes() == original.tobytes()
    assert images[0]["class"] == "pixelated"


def test_report_is_accessible_in_structure(report: str) -> None:
    page = Page(report)
    assert all(image.get("alt") for image in page.of("img"))
    assert page.of("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    assert all(a["scope"] for a in page.of("th"))
    assert sum(a.get("role") == "img" and bool(a.get("aria-label")) for a in page.of("div")) == FIGURES
    assert "prefers-color-scheme: dark" in report
    assert "@media print" in report


def test_charts_take_their_colours_from_the_page(report: str) -> None:
    svgs = [svg for svg in re.findall(r"<svg .*?</svg>", report, flags=re.S) if "clipPath" in svg]
    assert len(svgs) == FIGURES
    for svg in svgs:
        assert "var(--" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)
        assert "<style" not in svg


def test_an_empty_folder_becomes_a_report_of_what_is_missing(tmp_path: Path) -> None:
    text = write_report(tmp_path, ReportOptions()).read_text()
    Page(text)
    for sentence in ("has no results", "manifest.json is missing", "no readable test records", "no log with loss terms", "no config.yaml"):
        assert sentence in text


def test_damaged_parts_are_named_and_do_not_stop_the_report(run_dir: Path, tmp_path: Path) -> None:
    broken = {
        "results.json": "[]",
        "logging.jsonl": '{"step": 1, "loss": 2}\nx\n{"step": 2}\n',
        "predictions.jsonl": '{"image_id": "a", "width": 9, "height": 9, "score_source": null, "objects": 3}\n',
        "manifest.json": "{",
        "config.yaml": "a: [",
        "data/test.jsonl": "nothing\n",
    }
    text = changed(run_dir, tmp_path / "run", write=broken)
    for sentence in (
        "results.json: expected a JSON object",
        "logging.jsonl:2:",
        "predictions.jsonl:1: objects",
        "manifest.json: expected JSON",
        "config.yaml: not valid YAML",
    ):
        assert sentence in text
    assert str(tmp_path) not in text


def test_log_without_evaluation_rows_and_with_nan_still_draws(run_dir: Path, tmp_path: Path) -> None:
    rows = '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 2.0}\n'
    text = changed(run_dir, tmp_path / "run", write={"logging.jsonl": rows})
    assert "The log has no evaluation rows." in text
    assert "1 value that is not finite" in text
    assert "Not in this log: Text cross-entropy" in text


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", images=2, status="interrupted"), ReportOptions(title="My title")).read_text()
    assert "was interrupted" in text
    assert "Last stage: <b>train</b>" in text
    assert "My title" in text


def test_text_of_the_data_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=1)
    path = run / "predictions.jsonl"
    row = json.loads(path.read_text())
    row["objects"] = [{"desc": "<script>alert(1)</script>", "bbox_2d": [1.0, 1.0, 9.0, 9.0]}]
    path.write_text(json.dumps(row) + "\n")
    (run / "config.yaml").write_text("name: </pre><script>x</script>\n")
    assert "<script" not in write_report(run, ReportOptions()).read_text()


def test_large_noisy_images_stay_within_the_size_budget(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images=12, side=900, objects=12)
    target = write_report(run, ReportOptions(images=12), out=tmp_path / "elsewhere" / "r.html")
    assert target.stat().st_size < 2_000_000
    text = target.read_text()
    assert text.count("<img ") == 12
    assert "With more than" in text
    # The 12th record: every name with its number, on the colour that its boxes have.
    page = Page(text)
    assert "True, 12" in page.text
    assert [a["class"] for a in page.of("svg") if a.get("class") == "crowded"]


def test_at_least_eight_pictures_are_shown(run_dir: Path, tmp_path: Path) -> None:
    assert changed(run_dir, tmp_path / "run", images=1).count("<img ") == 8


def test_missing_run_directory_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a run directory"):
        write_report(tmp_path / "none", ReportOptions())


def test_best_is_marked_per_column_and_ties_share_the_mark() -> None:
    results = {f"detection.{r}.aware.f1.50": v for r, v in (("argmax", 0.4), ("median", 0.5), ("auto", 0.5), ("file", 0.9))}
    results |= {f"localisation.{r}.all.mean_bins": v for r, v in (("argmax", 3.0), ("median", 5.0))}
    table = tables.readout_table(tables.Metrics(results))
    assert table is not None
    marks = {name: [cell.best for cell in cells] for name, cells in table.rows}
    assert [name for name, row in marks.items() if row[0]] == ["median", "auto"]
    assert [name for name, row in marks.items() if row[4]] == ["argmax"]
    assert not any(row[1] for row in marks.values())


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.71249, "ratio", "0.712"),
        (0.985, "percent", "98.5 %"),
        (12.34, "bins", "12.3"),
        (2.006, "px", "2.01"),
        (None, "ratio", "–"),
        (float("nan"), "px", "–"),
    ],
)
def test_numbers_have_one_format_per_kind(value: float | None, kind: str, text: str) -> None:
    assert tables.number(value, kind) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (3599.7, "1 h 00 min"), (3725, "1 h 02 min")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_charts_are_the_same_every_time_and_describe_themselves() -> None:
    log = RunLog(None, [{"step": s, "loss": 4.0 / s} for s in (1, 2, 4)], [{"step": 4, "eval_loss": 1.5}])
    (first,), absent = draw_panels(log, LOSS_PANELS[:2])
    (second,), _ = draw_panels(log, LOSS_PANELS[:2])
    assert first.svg == second.svg
    assert (
        first.description
        == "Total loss (weighted sum) over steps: training from 4 at step 1 to 1 at step 4; evaluation from 1.5 at step 4 to 1.5 at step 4."
    )
    assert [panel.key for panel in absent] == ["base_ce/loss"]


def test_small_values_keep_their_digits_on_the_axis() -> None:
    (chart,), _ = draw_panels(RunLog(None, [{"step": s, "loss": 0.002 * s} for s in (1, 2, 3, 4)], []), LOSS_PANELS[:1])
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)
    assert {"0.0025", "0.0050", "0.0075"} <= set(labels)


def test_small_images_are_kept_pixel_for_pixel_and_large_ones_are_bounded() -> None:
    assert encode(Image.new("RGB", (96, 96), "red"), 10_000).startswith("data:image/png;base64,")
    uri = encode(Image.effect_noise((1200, 900), 80).convert("RGB"), 60_000)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.format == "JPEG"
    assert max(image.size) <= 560


def test_report_loads_neither_torch_nor_transformers(run_dir: Path) -> None:
    code = "import sys; import coordexp.runs.report; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_new_headline_numbers_have_short_tables_that_are_left_out_without_values() -> None:
    base = {"detection.file.aware.f1.50": 0.5, "coco.file.ap": 0.3}
    more = {
        "lvis.file.ap": 0.2,
        "lvis.file.apr": None,
        "tide.file.dap.loc": 0.125,
        "calibration.all.coverage_80": 0.75,
        "buckets.aware.size.small.f1.50": 0.25,
        "buckets.aware.size.small.n": 1200,
        "buckets.aware.size.large.n": 0,
        "grounding.file.acc.50": 0.625,
        "intervals.grounding.file.acc.50": [0.6, 0.65],
    }
    plain, full = (tables.metric_tables(tables.Metrics(results)) for results in (base, base | more))
    assert len(full) == len(plain) + 5
    rows = {(table.caption, name): [cell.text for cell in cells] for table in full for name, cells in table.rows}
    assert rows["LVIS average precision", "scores of the file"][0] == "0.200"
    assert rows["AP .50 lost to each kind of error (TIDE)", "scores of the file"] == ["0.125"]
    assert rows["By object size, class-aware", "small"] == ["0.250", "1200"]
    assert rows["Coordinate calibration: true edges inside the model's central intervals, matched boxes", "all"] == ["0.750"]
    assert rows["Grounding of the referred object", "as predicted (file)"][0] == "0.625"
    assert sum(len(table.rows) for table in full) == sum(len(table.rows) for table in plain) + 5
    labels = {tile.label: tile for tile in tables.tiles(tables.Metrics(base | more))}
    assert (labels["Grounding Acc .50"].value, labels["Grounding Acc .50"].interval) == ("0.625", "0.600–0.650")
    assert labels["LVIS AP"].value == "0.200"
    pointing = [tile.label for tile in tables.tiles(tables.Metrics({"pointing.acc": 0.5, "health.parse_rate": 1.0}))]
    assert pointing[0] == "Pointing"
    assert "F1 .50, aware" not in pointing
