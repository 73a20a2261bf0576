"""What the objective costs on top of a language-model head: forward and backward, interleaved medians.

    python benchmarks/bench_loss.py --rows 2048 --coords 700 --vocab 152670 --dim 256

Compares three bare matrix products (the lower bound), the objective with cross-entropy only, and the full one.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import CoordObjective

RESULTS = Path(__file__).parent / "results" / "loss.csv"


def variants(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Callables that each run one forward and backward on the same inputs."""
    torch.manual_seed(0)
    start = args.vocab - 1000
    hidden = torch.randn(args.rows, args.dim, requires_grad=True)
    weight = (torch.randn(args.vocab, args.dim) / args.dim**0.5).requires_grad_()
    labels = torch.randint(0, start, (args.rows,))
    labels[torch.randperm(args.rows)[: args.coords]] = torch.randint(start, args.vocab, (args.coords,))

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.T
            _ = logits @ weight
            _ = logits.T @ hidden

    def loss(objective: CoordObjective, impl: str) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            linear_coord_loss(hidden, weight, labels, coord_start=start, num_bins=1000, objective=objective, impl=impl).loss.backward()

        return run

    ce_only = CoordObjective.plain_ce()
    full = CoordObjective(ce=0.5, w1=0.1, crps=0.1)
    table = {"three_products": products}
    for impl in args.impl:
        table |= {f"{impl}_ce_only": loss(ce_only, impl), f"{impl}_full": loss(full, impl)}
    return table


def main() -> None:
    """Measure and append one row per variant to the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rows", 2048), ("coords", 700), ("vocab", 152_670), ("dim", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--impl", nargs="+", default=["eager"])
    args = parser.parse_args()
    table = variants(args)
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for round_number in range(args.rounds + 1):
        for name, call in table.items():
            begin = time.perf_counter()
            call()
            if round_number:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    base = statistics.median(seconds["three_products"])
    rows = []
    for name, values in seconds.items():
        p20, p50, p80 = (statistics.quantiles(values, n=10, method="inclusive")[i] for i in (1, 4, 7))
        print(f"{name:<20} {p50:8.3f} s   {p50 / base:5.2f} x three products")
        rows.append(
            {
                "date": datetime.date.today().isoformat(), "commit": commit, "variant": name, "rows": args.rows,
                "coords": args.coords, "vocab": args.vocab, "dim": args.dim, "n": len(values),
                "p20_s": f"{p20:.4f}", "p50_s": f"{p50:.4f}", "p80_s": f"{p80:.4f}",
                "ratio_to_products": f"{p50 / base:.3f}", "device": f"{platform.machine()} {os.cpu_count()} cores",
                "torch": torch.__version__,
            }
        )  # fmt: skip
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
