"""Interleaved timing, and the circumstances that a number is worth nothing without."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coordexp.runs.manifest import git_state

Progress = Callable[[int, int], None]


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, device: str = "cpu", progress: Progress | None = None
) -> dict[str, list[float]]:
    """Seconds per call, ``rounds`` of each: every round runs all calls once, so that a busy moment hits them alike.

    One more round, the first, warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            synchronize(device)
            begin = time.perf_counter()
            call()
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - begin)
        if progress is not None:
            progress(number + 1, rounds + 1)
    return seconds


def synchronize(device: str) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Percentiles 20, 50 and 80."""
    if len(values) < 2:
        return (values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def circumstances(device: str, *packages: str) -> dict[str, Any]:
    """Date, commit, hardware, threads and versions, for the columns of a results file."""
    git = git_state()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": "" if git is None else f"{git['commit'][:7]}{'+changes' if git['dirty'] else ''}",
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": f"{platform.machine()} {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", *packages)},
    }


def append_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Add rows to a results file; the header is written once.

    Raises:
        ValueError: the file has other columns.
    """
    header = list(rows[0])
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != header:
            raise ValueError(f"{path} has other columns ({', '.join(found)}): write to another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=header)
        if new:
            writer.writeheader()
        writer.writerows(rows)
