"""How often the audit finds planted faults, by fault and length of the log, and how often it accuses healthy logs.

    python benchmarks/bench_audit_rules.py [--seeds 50] [--twins 2000]

Writes results/audit_rates.csv (a row a fault, a column a length) and results/audit_twins.csv (a row a kind of healthy log). The bar: no
healthy log with a severe finding. ``python -m coordexp.runs.rules.registry`` puts the first into docs/audit-rules.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from coordexp.runs.audit import judge, load  # noqa: E402
from coordexp.runs.logs import RunLog  # noqa: E402
from coordexp.runs.rules.base import Subject  # noqa: E402
from coordexp.runs.rules.registry import LENGTHS, RULES  # noqa: E402
from planted import TWINS, healthy, twin, write_run  # noqa: E402
from plants import PLANTS, Plant  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def rate(plant: Plant, rows: int, seeds: int) -> float:
    """Share of the seeds whose fault the plant's own rule finds, in a log of ``rows`` training rows and a tenth of evaluations."""
    rule = next(rule for rule in RULES if rule.code == plant.code)
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            faulty = plant.fault(healthy(replace(plant.shape, rows=rows, evals=rows // 10), seed))
            beside = plant.beside_fault or plant.beside or {}
            found += rule.check(load(write_run(Path(folder), faulty, **beside))).outcome == "finding"
    return found / seeds


def accusations(kind: str, count: int) -> Counter[str]:
    """Of ``count`` healthy logs of a kind: those with a severe finding, and those with a finding of each rule."""
    tally: Counter[str] = Counter()
    for seed in range(count):
        rows, arguments = twin(kind, seed)
        is_eval = [any(key.startswith("eval_") for key in row) for row in rows]
        train, held_out = ([row for row, e in zip(rows, is_eval, strict=True) if e == wanted] for wanted in (False, True))
        judged = judge(Subject.of(RunLog(None, train, held_out, (), "run"), arguments=arguments))
        found = [j for j in judged if j.verdict.outcome == "finding"]
        tally["severe"] += any(j.severity == "severe" for j in found)
        tally.update(j.rule.code for j in found)
    return tally


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """The rows as ``results/NAME.csv``."""
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Both tables."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--seeds", type=int, default=50)
    words.add_argument("--twins", type=int, default=2000)
    asked = words.parse_args()
    each = -(-asked.twins // len(TWINS))
    tallies = {kind: accusations(kind, each) for kind in TWINS}
    codes = sorted({code for tally in tallies.values() for code in tally} - {"severe"})
    write("audit_twins", [{"twin": k, "logs": each, "severe": t["severe"], **{c: t[c] for c in codes}} for k, t in tallies.items()])
    rates = []
    for name, plant in sorted(PLANTS.items(), key=lambda item: item[1].code):
        rates.append({"code": plant.code, "fault": name, **{str(n): f"{rate(plant, n, asked.seeds):.2f}" for n in LENGTHS}})
    write("audit_rates", rates)
    print(f"{each * len(TWINS)} healthy logs, {sum(t['severe'] for t in tallies.values())} with a severe finding")


if __name__ == "__main__":
    main()
