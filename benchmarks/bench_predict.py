"""Boxes/s of constrained decoding against plain ``generate``; appends to ``results/predict.csv``.

    python benchmarks/bench_predict.py runs/demo/checkpoints/final runs/demo/data/test.jsonl

The same as ``coordexp bench predict CHECKPOINT DATA --out benchmarks/results/predict.csv``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.bench.measure import append_csv
from coordexp.bench.predict import PredictBench, measure

RESULTS = Path(__file__).parent / "results" / "predict.csv"


def main() -> None:
    """Measure and append one row per variant to the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu")
    for name, value in (("rounds", 7), ("limit", 100), ("batch-size", 50), ("max-new-tokens", 150)):
        parser.add_argument(f"--{name}", type=int, default=value)
    rows = measure(PredictBench(**vars(parser.parse_args())))
    for row in rows:
        print(f"{row['variant']:<14} {row['p50_boxes_s']:>9} boxes/s   {row['ratio_to_generate']} x generate")
    append_csv(rows, RESULTS)


if __name__ == "__main__":
    main()
