"""``benchmarks/gpu.py``: one command for a machine with a GPU, seen to run in the interpreter."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from coordexp.bench.loss import LossBench, peak_mb

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def _run(*words):
    return subprocess.run([sys.executable, SCRIPT, "--device", "cpu", *map(str, words)], capture_output=True, text=True)


def test_it_measures_ours_and_the_rivals_at_hand_and_names_the_others(tmp_path):
    done = _run("--tiny", "--sizes", "2b", "--rounds", 1, "--no-tests", "--no-memory", "--out", tmp_path / "gpu.csv")
    assert done.returncode == 0, done.stderr
    for name in ("liger_ce_only", "cce_exact"):
        assert f"skipped: {name}" in done.stdout
    with (tmp_path / "gpu.csv").open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert {"three_products", "ours_ce_only", "ours_full", "ours_full_frozen_head", "torch_linear_cross_entropy"} <= set(rows)
    assert {name: row["to_products"] for name, row in rows.items()}["three_products"] == "1.000"
    for row in rows.values():
        assert (row["size"], row["dtype"], row["peak_mb"], row["to_textbook"]) == ("2b", "float32", "", "")
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["commit"]
        assert row["torch"]
        assert row["triton"]


def test_a_cpu_is_refused_at_full_size():
    done = _run("--no-tests")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--device cpu needs --tiny" in done.stderr


def test_it_runs_every_file_with_tests_for_a_gpu():
    mark = re.compile(r"^(pytestmark = .*|@)pytest\.mark\.gpu", re.M)
    marked = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if mark.search(path.read_text())}
    listed = re.search(r"^TESTS = \((.*)\)$", SCRIPT.read_text(), re.M)
    assert set(re.findall(r'"(.+?)"', listed[1])) == marked


def test_peak_memory_of_a_variant_holds_its_gradients():
    bench = LossBench(rows=64, coords=8, vocab=20_000, dim=64, bins=1000)
    gradients = 20_000 * 64 * 4 / 2**20
    assert gradients < peak_mb(bench, "three_products", {}) < 40 * gradients
