"""Histograms of coordinate diagnostics: to ``histograms.jsonl`` and, where it runs, to TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import TensorBoardCallback

from coordexp.losses.sums import LossSums
from coordexp.train.registry import HISTOGRAMS, Histogram


def write_histograms(sums: LossSums, *, step: int, prefix: str, path: Path | None, callbacks: Iterable[Any]) -> None:
    """One row ``{step, <prefix>coord_dist/<name>: {low, high, counts}}``; nothing where nothing was counted."""
    counted = {f"{prefix}coord_dist/{name}": (HISTOGRAMS[name], counts) for name, counts in sums.histograms.items() if counts.sum() > 0}
    if not counted:
        return
    if path is not None:
        row = {key: {"low": h.low, "high": h.high, "counts": [int(c) for c in counts.tolist()]} for key, (h, counts) in counted.items()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for key, (h, counts) in counted.items():
                callback.tb_writer.add_histogram_raw(key, **_raw(h, counts), global_step=step)


def _raw(h: Histogram, counts: Tensor) -> dict[str, Any]:
    edges = torch.linspace(h.low, h.high, h.bins + 1, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2).to(counts.device)
    return {
        "min": h.low, "max": h.high, "num": counts.sum().item(), "sum": (counts * middle).sum().item(),
        "sum_squares": (counts * middle.square()).sum().item(), "bucket_limits": edges[1:].tolist(), "bucket_counts": counts.tolist(),
    }  # fmt: skip
