"""Rounds of a benchmark, each in a process of its own, and their line in a results file."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def parser(doc: str | None, *, count: int) -> argparse.ArgumentParser:
    """With ``--rounds``, and ``--measure`` for the process of a round."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=count)
    made.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return made


def tell(seconds: float, **more: Any) -> None:
    """What a round prints last: seconds by the clock, those of the processor, peak memory in MB, and ``more``."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"s": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024, **more}))


def rounds(script: str, words: Sequence[object], count: int) -> list[dict[str, Any]]:
    """``python SCRIPT --measure WORDS``, ``count`` times."""
    command = [sys.executable, script, "--measure", *map(str, words)]
    done = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]


def save(name: str, what: Mapping[str, Any], found: Sequence[Mapping[str, Any]], *packages: str) -> None:
    """Add the row of ``found`` to ``results/NAME.csv``: what was measured, percentiles, circumstances."""
    # Loads torch, whose memory must not count in the rounds.
    from coordexp.bench.measure import append_csv, circumstances, spread

    p20, p50, p80 = spread([one["s"] for one in found])
    row = {
        **what, "n": len(found), "p20_s": f"{p20:.2f}", "p50_s": f"{p50:.2f}", "p80_s": f"{p80:.2f}",
        "cpu_p50_s": f"{statistics.median(one['cpu'] for one in found):.2f}", "peak_mb": f"{max(one['peak_mb'] for one in found):.0f}",
        **circumstances("cpu", *packages),
    }  # fmt: skip
    append_csv([row], RESULTS / f"{name}.csv")
    print(json.dumps(row))
