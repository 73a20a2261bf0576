"""What the objective costs on top of a language-model head; appends to ``results/loss.csv`` and ``results/loss_terms.csv``.

    python benchmarks/bench_loss.py [--rows 2048 --coords 700 --dim 256 --device cpu ...]

The same as ``coordexp bench loss --out benchmarks/results/loss.csv``; ``--help`` lists the options.
"""

from __future__ import annotations

import sys
from pathlib import Path

from coordexp.cli.main import main

RESULTS = Path(__file__).parent / "results" / "loss.csv"

if __name__ == "__main__":
    sys.argv = ["coordexp", "bench", "loss", "--out", str(RESULTS), *sys.argv[1:]]
    main()
