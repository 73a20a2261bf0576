"""What the objective costs on top of a language-model head; appends to ``results/loss.csv`` and ``results/loss_terms.csv``.

    python benchmarks/bench_loss.py [--rows 2048 --coords 700 --dim 256 --device cpu ...]

What ``coordexp bench loss`` measures, and other fused losses beside it.
"""

from __future__ import annotations

import argparse
import dataclasses

from rivals import at_hand
from rounds import RESULTS

from coordexp.bench.loss import LossBench, measure, note_table, table_lines
from coordexp.bench.measure import append_csv


def main() -> None:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(LossBench):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=7 if field.name == "rounds" else field.default)
    bench = LossBench(**vars(parser.parse_args()))
    table = measure(bench, rivals=at_hand(bench.device))
    print("\n".join(table_lines(table)))
    append_csv(table, RESULTS / "loss.csv")
    append_csv(note_table(bench), RESULTS / "loss_terms.csv")


if __name__ == "__main__":
    main()
