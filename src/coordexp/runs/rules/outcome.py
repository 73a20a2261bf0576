"""CX030 to CX034: generated answers, schedule, size of the evaluation, completeness of the log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Final

import numpy as np

from coordexp.runs.columns import Columns
from coordexp.runs.logs import EVAL_PREFIX
from coordexp.runs.rules.base import Evidence, Subject, Verdict, finding, not_applicable, passed, rule


def _rates(subject: Subject, name: str) -> list[tuple[str, float, str]]:
    """Every value of a generation rate: of the results, and the last of each probe key of the log."""
    found = []
    value = (subject.results or {}).get(f"health.{name}")
    if isinstance(value, (int, float)) and math.isfinite(value):
        found.append((f"health.{name}", float(value), "results.json"))
    for columns in (subject.eval, subject.train):
        for key in columns.keys:
            if key.rpartition("/")[2].removeprefix(EVAL_PREFIX) == name:
                s = columns.raw(key)
                kept = s.finite() if s is not None else None
                if kept is not None and len(kept):
                    found.append((key, float(np.median(kept.values[-3:])), f"step {kept.steps[-1]}"))
    return found


def _judged(found: list[tuple[str, float, str]], bad: Callable[[float], bool]) -> Verdict:
    rows = [Evidence(f"{key} is {value:.1%}", where, "certain", {"value": value}) for key, value, where in found if bad(value)]
    if rows:
        return finding(*rows)
    return passed("; ".join(f"{key} {value:.1%}" for key, value, _ in found)) if found else not_applicable("no generated answers")


@rule(
    "CX030",
    "Generated boxes repeat",
    "warning",
    reads="`health.duplicate_rate` of `results.json`; `*/duplicate_rate` of a generation probe in the log",
    test="Over 5 % of the generated boxes repeat an earlier one (same name, IoU over .9).",
    advice="Shorten max_new_tokens towards the longest true answer, stop at a repeated object, and look for duplicated boxes in the "
    "training records.",
)
def cx030(subject: Subject) -> Verdict:
    return _judged(_rates(subject, "duplicate_rate"), lambda value: value > 0.05)


@rule(
    "CX031",
    "Generated answers cannot be parsed",
    "warning",
    reads="`health.parse_rate` of `results.json`; `*/parse_rate` of a generation probe in the log",
    test="Fewer than 98 % of the answers are read without a problem.",
    advice="See health.problems.*: truncated answers need more tokens, others the constrained decoder or longer training. The metrics "
    "count what was not read as missed.",
)
def cx031(subject: Subject) -> Verdict:
    return _judged(_rates(subject, "parse_rate"), lambda value: value < 0.98)


@rule(
    "CX032",
    "The learning rate reached its floor early",
    "info",
    reads="`learning_rate` (20 rows or more)",
    test="The rate stands within .1 % of its peak at its final value, itself below half the peak, for the last 10 % of the rows or more.",
    advice="The schedule ended before the run: set its length to the steps you train, or stop when it ends.",
)
def cx032(subject: Subject) -> Verdict:
    rate = subject.train.series("learning_rate").finite()
    if len(rate) < 20 or rate.values.max() <= 0:
        return not_applicable("needs 20 rows with a learning rate")
    peak, last = float(rate.values.max()), float(rate.values[-1])
    away = np.flatnonzero(np.abs(rate.values - last) > 1e-3 * peak)
    tail = len(rate) - (int(away[-1]) + 1 if len(away) else 0)
    if last < 0.5 * peak and tail >= 0.1 * len(rate):
        where = f"steps {rate.steps[-tail]} to {rate.steps[-1]}"
        return finding(
            Evidence(
                f"learning rate stays at {last:.3g} (peak {peak:.3g}) for {tail / len(rate):.0%} of the run",
                where,
                "certain",
                {"rows": tail},
            )
        )
    return passed(f"peak {peak:.3g}, last {last:.3g}")


_HEADLINES: Final = ("agnostic.f1.50", "aware.f1.50")


@rule(
    "CX033",
    "The evaluation is too small for what is claimed",
    "warning",
    reads="`results.json` with its intervals and `counts`, `evaluate.expect` in `config.yaml`",
    test="An expectation of the experiment lies inside the interval of its metric; or the evaluation has fewer than 100 images.",
    advice="Evaluate more images: the interval shrinks with the square root of their number. Call a difference real only when the paired "
    "interval of `coordexp compare` leaves out 0.",
)
def cx033(subject: Subject) -> Verdict:
    results = subject.results
    if not results:
        return not_applicable("no results.json")
    rows, looked = [], []
    counts = results.get("counts")
    images = counts.get("effective") if isinstance(counts, dict) else None
    intervals = {
        k.removeprefix("intervals."): v for k, v in results.items() if k.startswith("intervals.") and isinstance(v, list) and len(v) == 2
    }
    expected = subject.section("evaluate").get("expect")
    for pattern, least in (expected if isinstance(expected, dict) else {}).items():
        before, _, after = pattern.partition(".best.")
        for key, (low, high) in intervals.items():
            if key != pattern and not (after and key.startswith(before + ".") and key.endswith("." + after)):
                continue
            looked.append(key)
            if low < least < high:
                text = f"{key} has the interval {low:.3f} to {high:.3f}: {least:g} is neither reached nor missed with {images} images"
                rows.append(Evidence(text, "results.json", "certain", {"low": low, "high": high, "expected": least}))
                break
    widths = {k: (v[1] - v[0]) / 2 for k, v in intervals.items() if k.endswith(_HEADLINES)}
    if isinstance(images, int) and images < 100:
        widest = max(widths.items(), key=lambda item: item[1], default=None)
        note = f"; {widest[0]} is known to ± {widest[1]:.3f}" if widest and widest[1] else ""
        rows.append(Evidence(f"only {images} images{note}", "results.json", "certain", {"images": images}))
    if rows:
        return finding(*rows)
    return passed(f"{images} images, {len(looked)} expectations outside their intervals")


@rule(
    "CX034",
    "Keys appear or vanish during the run",
    "warning",
    reads="every numeric key, against the rows with `loss` or `eval_loss` (20 training rows or 6 evaluations)",
    test="A key that occurs three times or more is missing from the first or last 10 % of the rows (at least five), by more "
    "than twice its own "
    "longest gap in between.",
    advice="Two programs or two configurations wrote this log, or a metric is skipped when it has nothing to say: log a fixed set of keys, "
    "with counts.",
)
def cx034(subject: Subject) -> Verdict:
    rows, looked = [], 0
    for columns, least in ((subject.train, 20), (subject.eval, 6)):
        base = np.unique(columns.series("loss").steps)
        if len(base) >= least:
            looked += len(columns.keys)
            rows += _gaps(columns, base)
    if rows:
        return finding(*rows[:20])
    return passed(f"{looked} keys from the first row to the last") if looked else not_applicable("fewer than 20 rows with a loss")


def _gaps(columns: Columns, base: np.ndarray) -> list[Evidence]:
    groups: dict[tuple[int, str], list[str]] = defaultdict(list)
    n = len(base)
    for key in columns.keys:
        s = columns.raw(key)
        # A key of every row cannot have a gap.
        if s is None or len(s) < 3 or s.steps is columns.steps:
            continue
        at = np.unique(np.minimum(np.searchsorted(base, s.steps), n - 1))
        needed = max(0.1 * n, 5 if n >= 20 else 2, 2 * int(np.diff(at).max()) if len(at) > 1 else 0)
        if at[0] > needed:
            groups[int(base[at[0]]), "first at"].append(key)
        if n - 1 - at[-1] > needed:
            groups[int(base[at[-1]]), "last at"].append(key)
    return [
        Evidence(
            f"{len(keys)} key{'s' * (len(keys) > 1)} logged {what} step {step}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}",
            f"step {step}",
            "certain",
            {"keys": len(keys), "step": step},
        )
        for (step, what), keys in sorted(groups.items())
    ]


RULES = (cx030, cx031, cx032, cx033, cx034)
