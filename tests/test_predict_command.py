"""``coordexp predict`` and ``coordexp bench predict``: several processes, a finished file, mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from command import call
from coordexp.bench.measure import append_csv
from coordexp.evaluate.distributions import read_distributions
from predicting import TRAIN, rows, whole
from tiny import fitted_folder, records


def test_two_processes_write_what_one_writes(tmp_path):
    words = [fitted_folder(), TRAIN, "--limit", 5, "--batch-size", 2, "--max-new-tokens", 130, "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coordexp", "predict"]
    out = tmp_path / "p.jsonl"
    done = subprocess.run(
        [*command, *map(str, words), "--save-distributions", "--out", str(out)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # One process says what both did.
    assert done.stdout.count(" on 5 images") == 1
    expected = rows(whole()[0])
    for row, other in zip(rows(out), expected, strict=True):
        assert [item["desc"] for item in row["objects"]] == [item["desc"] for item in other["objects"]]
        for item, same in zip(row["objects"], other["objects"], strict=True):
            assert item["readouts"]["argmax"] == same["readouts"]["argmax"]
            assert item["bbox_2d"] == pytest.approx(same["bbox_2d"], abs=1e-3)
        assert {k: row[k] for k in row if k != "objects"} == {k: other[k] for k in other if k != "objects"}
    assert [item.image_id for item in read_distributions(tmp_path / "p.jsonl.distributions")] == [row["image_id"] for row in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.distributions", "p.jsonl.settings.json"]


def test_a_finished_file_is_named_as_such_and_not_touched(tmp_path, monkeypatch, capsys):
    words = ["predict", fitted_folder(), TRAIN, "--limit", 2, "--max-new-tokens", 130, "--out", tmp_path / "p.jsonl"]
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    assert " objects on 2 images, " in out
    before = (tmp_path / "p.jsonl").stat()
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    assert "is finished: 2 images" in out
    assert "nothing was done" in out
    assert (tmp_path / "p.jsonl").stat() == before
    code, _, err = call(monkeypatch, capsys, *words, "--readout", "median")
    assert (code, err.count("\n")) == (2, 1)
    assert "readout: 'auto' there, 'median' here" in err
    assert (tmp_path / "p.jsonl").stat() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--readout", "best"], "argmax, expectation"), (["--score", "best"], "none, constant, token"),
        (["--calibrate-data", "x.jsonl"], "--calibrate PREDICTIONS"), (["--calibrate", "x", "--score", "none"], "--score none"),
        (["--calibrate", "x.jsonl"], "expected a calibration or a prediction file"), (["--device", "tpu"], "auto, cpu or cuda"),
        (["--max-new-tokens", "2"], "max_new_tokens"), (["--temperature", "inf"], "--temperature"), (["--out", "."], "name of a file"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in words else ["--out", "p.jsonl"]
    code, _, err = call(monkeypatch, capsys, "predict", fitted_folder(), TRAIN, "--limit", 2, *out, *words)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_bench_measures_three_variants_and_appends_to_its_file(tmp_path, monkeypatch, capsys):
    words = ["bench", "predict", fitted_folder(), TRAIN, "--limit", 2, "--batch-size", 2, "--rounds", 2, "--max-new-tokens", 120]
    code, out, err = call(monkeypatch, capsys, *words, "--out", tmp_path / "b.csv")
    assert (code, err) == (0, "")
    lines = (tmp_path / "b.csv").read_text().splitlines()
    table = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["variant"] for row in table] == ["generate", "unconstrained", "constrained"]
    append_csv(table, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().splitlines() == [*lines, *lines[1:]]
    # The model knows both answers, so all three write the same boxes.
    assert {row["boxes"] for row in table} == {str(sum(len(r.objects) for r in records("train")[:2]))}
    assert {row["parse_rate"] for row in table} == {"1.0000"}
    assert int(table[2]["passes"]) < int(table[1]["passes"]) <= int(table[0]["passes"])
    assert "x generate" in out
