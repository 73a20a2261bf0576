"""The benchmark of kills, at its smallest: two runs killed at random moments end like the one left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_killed_runs_end_bitwise_equal(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    words = ["--kills", "2", "--steps", "12", "--most", "1", "--work", tmp_path]
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 end bitwise equal" in done.stdout
