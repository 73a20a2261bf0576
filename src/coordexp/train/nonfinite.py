"""What happens when a loss or gradient is not finite: said in a file, agreed by all ranks, before the optimizer moves."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp.errors import CoordexpError


class NonFiniteError(CoordexpError, FloatingPointError):
    """A loss or gradient that is no number stopped the run."""


@dataclass
class StepWatch:
    """The micro-batches of one optimizer step on this rank: their samples and losses (on the device, read once a step)."""

    samples: list[list[str]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def add(self, samples: list[str], loss: Tensor) -> None:
        """One micro-batch."""
        self.samples.append(list(samples))
        self.losses.append(loss.detach())

    def bad(self) -> Tensor:
        """0-dim: how many losses are not finite."""
        return (~torch.isfinite(torch.stack(self.losses))).sum()

    def row(self) -> dict[str, Any]:
        """``samples`` of the micro-batches whose loss is not finite; of the whole step where only the gradient is not."""
        losses = [float(loss) for loss in self.losses]
        faulty = [names for names, value in zip(self.samples, losses, strict=True) if not _finite(value)]
        guilty = faulty or self.samples
        return {"samples": [name for names in guilty for name in names], "losses": losses}

    def clear(self) -> None:
        """Start the next step."""
        self.samples.clear()
        self.losses.clear()


def _finite(value: float) -> bool:
    return value - value == 0


def report(path: Path | None, *, step: int, grad_norm: float, rows: list[dict[str, Any]], skipped: bool) -> str:
    """Append one line to ``path`` (on the rank that writes) and return the same in words; ``rows`` are of all ranks."""
    losses = [value for row in rows for value in row["losses"]]
    # A rank without a faulty loss is to blame only where no rank has one.
    faulty = [row for row in rows if not all(map(_finite, row["losses"]))] or rows
    samples = [name for row in faulty for name in row["samples"]]
    if path is not None:
        line = {"step": step, "skipped": skipped, "grad_norm": grad_norm, "losses": losses, "samples": samples}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    bad = [value for value in losses if not _finite(value)]
    what = f"loss is {bad[0]}" if bad else f"gradient norm is {grad_norm}"
    named = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
    where = "" if path is None else f"; all in {path.name}"
    return f"{what} at step {step} (samples {named}{where})"
