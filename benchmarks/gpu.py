"""Everything that waits for a GPU, in one command: the tests marked ``gpu``, then the loss at the sizes of real heads.

    pip install -e ".[dev]" liger-kernel cut-cross-entropy
    python benchmarks/gpu.py                        # appends to benchmarks/results/gpu.csv
    python benchmarks/gpu.py --device cpu --tiny    # only to see that it runs: small shapes, kernels in the interpreter

Forward and backward in bfloat16, 16,384 supervised rows of which 6,000 are coordinates, heads of Qwen3-VL 2B, 4B and 8B;
interleaved rounds, medians, peak memory above the inputs. Rivals that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ("tests/test_triton.py", "tests/test_fused.py", "tests/test_gpu.py")
DIMS = {"2b": 2048, "4b": 2560, "8b": 4096}  # widths of the heads; all have 152,704 rows with coordinates, padded
OURS = ("three_products", "ours_ce_only", "ours_full", "ours_full_tau_0.9", "ours_full_frozen_head", "ours_full_rows_only")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", nargs="+", choices=sorted(DIMS), default=sorted(DIMS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="8 rows and a vocabulary of 2,030, for a machine without a GPU")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True, help="run the tests first, stop if one fails")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.csv")
    return parser.parse_args()


def main() -> None:
    """Tests, then one table a size."""
    options = arguments()
    if options.device == "cpu":
        if not options.tiny:
            sys.exit("error: --device cpu needs --tiny: the kernels run in triton's interpreter there, a few rows a second")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    if options.tests:
        done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *TESTS], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)
    for size in options.sizes:
        measure_size(size, options)


def measure_size(size: str, options: argparse.Namespace) -> None:
    """Measure one head, print its table, append it."""
    from rivals import OFFERS, at_hand

    from coordexp.bench.loss import LossBench, measure, table_lines
    from coordexp.bench.measure import append_csv

    shape: dict[str, Any] = {"rows": 16_384, "coords": 6_000, "vocab": 152_704, "dim": DIMS[size], "dtype": "bfloat16"}
    if options.tiny:
        shape = {"rows": 8, "coords": 3, "vocab": 2030, "dim": DIMS[size] // 128, "dtype": "float32"}
    print(f"\n{size}: {', '.join(f'{name} {value}' for name, value in shape.items())}")
    bench = LossBench(**shape, rounds=options.rounds, device=options.device, impl="triton")
    rivals = at_hand(options.device)
    rows = measure(bench, rivals=rivals, only={*OURS, *rivals}, memory=options.memory)
    print("\n".join(table_lines(rows)))
    packages = ["triton", *(offer.package for offer in OFFERS.values() if offer.package)]
    versions = {package: installed(package) for package in packages}
    append_csv([{"size": size, **row, **versions} for row in rows], options.out)


def installed(package: str) -> str:
    """Its version; nothing where it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
