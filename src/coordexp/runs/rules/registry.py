"""All rules, in the order of their codes, and the page that explains them (``python -m coordexp.runs.rules.registry``)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from coordexp.data.staging import atomic_text
from coordexp.runs.rules import calibration, coordinates, learning, outcome, scale, stability
from coordexp.runs.rules.base import DOCS, Rule

RULES: Final[tuple[Rule, ...]] = (*scale.RULES, *stability.RULES, *coordinates.RULES, *calibration.RULES, *outcome.RULES, *learning.RULES)

_PREAMBLE: Final = """\
# Audit rules

`coordexp audit PATH` reads a run directory, an ms-swift `logging.jsonl`, a `trainer_state.json`, LLaMA-Factory's `trainer_log.jsonl`,
TensorBoard event files or a CSV export with a column of steps (W&B, Lightning). It answers with one outcome a rule: `finding`, `passed`,
or `not_applicable` (the log does not hold what the rule needs; the reason is given). The exit code is 1 on a severe finding and 2 on a
user's mistake.

Rules compare medians of windows with robust errors (from the median absolute difference of neighbouring rows), never single
rows, and ask for a minimum number of rows. A finding says how sure it is: `certain` is arithmetic, `likely` a statistical test
with a wide margin, `possible` has another innocent explanation. A finding may be milder than its rule where the text says so.

This page is written from the registry by `python -m coordexp.runs.rules.registry`; a test keeps the two equal.

| code | rule | severity |
|---|---|---|
"""


# Lengths of logs, in training rows, for which the rate of detection was measured.
LENGTHS: Final = (16, 30, 60, 120, 500)
RATES: Final = "benchmarks/results/audit_rates.csv"

_RATES_TEXT: Final = """
## How often faults are found

Share of logs in which the rule finds the planted fault, by the log's length in training rows (a tenth as many evaluations), from
`python benchmarks/bench_audit_rules.py`. A rule that needs more rows than there are answers `not_applicable`, which counts as not found.
Of 2,002 healthy logs (six epochs without token accuracy, fp16, warm restarts, tiny losses, foreign keys only ...) none has a severe
finding: `benchmarks/results/audit_twins.csv`.

"""


def read_rates(path: Path) -> list[dict[str, str]]:
    """Rows of the measured rates: ``code``, ``fault`` and one share a length."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _rates_table(rates: Sequence[Mapping[str, str]]) -> str:
    head = f"| rule | fault | {' | '.join(f'{n} rows' for n in LENGTHS)} |\n|---|---|{'---|' * len(LENGTHS)}\n"
    return head + "".join(
        f"| [{row['code']}](#{row['code'].lower()}) | {row['fault']} | {' | '.join(f'{float(row[str(n)]):.0%}' for n in LENGTHS)} |\n"
        for row in rates
    )


def rules_page(rates: Sequence[Mapping[str, str]]) -> str:
    """The page as Markdown, with the measured ``rates`` (see :func:`read_rates`)."""
    table = "".join(f"| [{r.code}](#{r.code.lower()}) | {r.title} | {r.severity} |\n" for r in RULES)
    sections = "".join(
        f"\n## {r.code}\n\n**{r.title}** ({r.severity})\n\n- Reads: {r.reads}.\n- Finding: {r.test}\n- What to change: {r.advice}\n"
        for r in RULES
    )
    return _PREAMBLE + table + _RATES_TEXT + _rates_table(rates) + sections


if __name__ == "__main__":
    with atomic_text(Path(DOCS)) as page:
        page.write(rules_page(read_rates(Path(RATES))))
