"""All rules, in the order of their codes, and the page that explains them (``python -m coordexp.runs.rules.registry``)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from coordexp.data.staging import atomic_text
from coordexp.runs.rules import calibration, coordinates, outcome, scale, stability
from coordexp.runs.rules.base import DOCS, Rule

RULES: Final[tuple[Rule, ...]] = (*scale.RULES, *stability.RULES, *coordinates.RULES, *calibration.RULES, *outcome.RULES)

_PREAMBLE: Final = """\
# Audit rules

`coordexp audit PATH` reads a run directory, an ms-swift `logging.jsonl`, a `trainer_state.json` or TensorBoard event files and
answers with one outcome a rule: `finding`, `passed`, or `not_applicable` (the log does not hold what the rule needs; the reason is
given). The exit code is 1 on a severe finding and 2 on a user's mistake.

Rules compare medians of windows with robust errors (from the median absolute difference of neighbouring rows), never single
rows, and ask for a minimum number of rows. A finding says how sure it is: `certain` is arithmetic, `likely` a statistical test
with a wide margin, `possible` has another innocent explanation. A finding may be milder than its rule where the text says so.

This page is written from the registry by `python -m coordexp.runs.rules.registry`; a test keeps the two equal.

| code | rule | severity |
|---|---|---|
"""


def rules_page() -> str:
    """The page as Markdown."""
    table = "".join(f"| [{r.code}](#{r.code.lower()}) | {r.title} | {r.severity} |\n" for r in RULES)
    sections = "".join(
        f"\n## {r.code}\n\n**{r.title}** ({r.severity})\n\n- Reads: {r.reads}.\n- Finding: {r.test}\n- What to change: {r.advice}\n"
        for r in RULES
    )
    return _PREAMBLE + table + sections


if __name__ == "__main__":
    with atomic_text(Path(DOCS)) as page:
        page.write(rules_page())
