"""CX010 to CX013: values that are not finite, spikes, and what accumulation does to gradients."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from coordexp.runs.columns import Columns, Series
from coordexp.runs.logs import EVAL_PREFIX
from coordexp.runs.rules.base import Evidence, Subject, Verdict, finding, not_applicable, passed, rule
from coordexp.runs.rules.statistics import noise, spread

# A mean over nothing is NaN: these are defined only where the step had such positions.
_OF_COORDINATES: Final = ("coord_softce_w1/", "coord_dist/", "coord_expected_", "coord_token_", "coord_diag/")
_ALWAYS: Final = ("loss", "grad_norm", "learning_rate", "base_ce/loss")
_SHOWN: Final = 5


def _needs_a_value(key: str) -> bool:
    return key in _ALWAYS or key.endswith("_loss") or key.startswith(("contrib/", "loss/", "coord_softce_w1/", "coord_dist/"))


def _bad_points(columns: Columns, key: str) -> Series:
    """Points of a key that are not finite and should be."""
    found = columns.raw(key)
    if found is None or np.isfinite(found.values).all():
        return Series(np.empty(0, np.int64), np.empty(0))
    bad = ~np.isfinite(found.values)
    name = key.removeprefix(EVAL_PREFIX)
    counted = "coord_softce_w1/coord_tokens" if name.startswith(_OF_COORDINATES) else "base_ce/noncoord_tokens"
    if name.startswith(_OF_COORDINATES) or name == "base_ce/loss":
        count = columns.series(counted)
        bad &= ~(np.isnan(found.values) & np.isin(found.steps, count.steps[count.values == 0]))
    return Series(found.steps[bad], found.values[bad])


_SCALING_ROWS: Final = 20


def _loss_scaling(subject: Subject) -> NDArray[np.int64]:
    """Steps whose gradient overflowed because fp16's loss scale was too high; such steps are skipped, and the loss itself is finite.

    The scale begins at 2^16 and is halved at each overflow; later it is doubled every 2,000 steps, which may overflow once.
    """
    none = np.empty(0, np.int64)
    norm, loss = subject.train.raw("grad_norm"), subject.train.raw("loss")
    flags = {name: subject.arguments.get(name, subject.section("train").get(name)) for name in ("fp16", "bf16")}
    if norm is None or loss is None or flags["bf16"] is True or flags["fp16"] is False:
        return none
    bad = ~np.isfinite(norm.values) & np.isin(norm.steps, loss.finite().steps)
    lead = int(np.argmin(bad)) if not bad.all() else 0
    chosen = np.arange(len(bad)) < (lead if lead <= _SCALING_ROWS else 0)
    alone = bad & ~np.roll(bad, 1) & ~np.roll(bad, -1)
    if flags["fp16"] is True and alone.sum() <= 0.02 * len(bad):
        chosen |= alone
    return norm.steps[bad & chosen]


@rule(
    "CX010",
    "Values that are not finite",
    "severe",
    reads="every numeric key",
    test="A NaN or infinity in a loss, a contribution, the gradient norm, the learning rate or a coordinate metric; an infinity anywhere. "
    "A mean over no positions (count 0) is no fault, nor is a gradient norm that overflows while fp16 training looks for its loss scale: "
    "at most 20 rows from the first on, or, where the arguments say fp16, single rows under 2 %, each with a finite loss. Only a warning: "
    "NaN in some rows of another metric, or a training loss of exactly 0 in three rows or more (filtered NaN, or nothing supervised).",
    advice="Stop at the first one: look at that step's samples, at masks without a supervised token, at 16-bit overflow. Set "
    "logging_nan_inf_filter=False, or the log hides the next one.",
)
def cx010(subject: Subject) -> Verdict:
    severe: list[Evidence] = []
    mild: list[Evidence] = []
    looked, scaling = 0, _loss_scaling(subject)
    for columns in (subject.train, subject.eval):
        for key in columns.keys:
            looked += 1
            bad = _bad_points(columns, key)
            if key == "grad_norm" and columns is subject.train:
                bad = bad.without(scaling)
            if not len(bad):
                continue
            total = columns.raw(key)
            name = key.removeprefix(EVAL_PREFIX)
            always_undefined = total is not None and len(bad) == len(total) and bool(np.isnan(bad.values).all()) and name not in _ALWAYS
            row = Evidence(
                f"{key} is {', '.join(sorted({str(v) for v in bad.values[:100]}))} in {len(bad)} row{'s' * (len(bad) > 1)}",
                f"first at step {bad.steps[0]}, last at step {bad.steps[-1]}",
                "certain",
                {"key": key, "rows": len(bad), "first_step": int(bad.steps[0])},
            )
            if always_undefined:
                continue
            (severe if _needs_a_value(name) or np.isinf(bad.values).any() else mild).append(row)
    loss = subject.train.series("loss")
    zeros = loss.steps[loss.values == 0]
    if len(zeros) >= 3:
        mild.append(
            Evidence(f"loss is exactly 0 in {len(zeros)} rows", f"first at step {zeros[0]}", "likely a filtered NaN", {"rows": len(zeros)})
        )
    if severe:
        return finding(*sorted(severe, key=lambda e: e.values["first_step"])[:20], *mild[:_SHOWN])  # type: ignore[arg-type,return-value]
    if mild:
        return finding(*mild[:20], severity="warning")
    said = f"; grad_norm overflows in {len(scaling)} rows while the fp16 loss scale adjusts" if len(scaling) else ""
    return passed(f"{looked} keys, all finite{said}") if looked else not_applicable("the log has no numbers")


def _partial(subject: Subject) -> NDArray[np.int64]:
    """Steps whose accumulation window was cut short (the end of an epoch)."""
    full, current = subject.train.series("accum/grad_steps"), subject.train.series("accum/current_grad_steps")
    if len(full) != len(current) or not len(full):
        return np.empty(0, np.int64)
    return full.steps[current.values < full.values]


_SPIKE_WINDOW: Final = 21


@rule(
    "CX011",
    "Loss spikes",
    "warning",
    reads="`loss` (30 rows or more)",
    test="A loss over 1.5 times the median of the 21 rows before it and more than 8 robust standard deviations above, of the values (at "
    "least 3 % each) and of their logarithms, and by more than 5 % of the loss's own scale: its median over the first 21 rows, or over all "
    "where that is more. Rows of partial accumulation windows are left to CX013.",
    advice="Look at the samples of that step and at the gradient norm just before. Clip gradients, lengthen the warm-up, or lower the "
    "learning rate; a spike that repeats every epoch is a bad sample.",
)
def cx011(subject: Subject) -> Verdict:
    loss = subject.train.series("loss").finite()
    keep = ~np.isin(loss.steps, _partial(subject))
    steps, values = loss.steps[keep], loss.values[keep]
    if len(values) < 30:
        return not_applicable("needs 30 rows with a finite loss")
    before = sliding_window_view(values, _SPIKE_WINDOW)[:-1]
    middle = np.median(before, axis=1)
    scale = np.maximum(1.4826 * np.median(np.abs(before - middle[:, None]), axis=1), 0.03 * np.abs(middle))
    now = values[_SPIKE_WINDOW:]
    logs = np.log(np.maximum(before, np.finfo(float).tiny))
    ratio_scale = 1.4826 * np.median(np.abs(logs - np.median(logs, axis=1)[:, None]), axis=1)
    own = max(float(np.median(values[:_SPIKE_WINDOW])), float(np.median(values)))
    unusual = (now > middle + 8 * scale) & (np.log(np.maximum(now, np.finfo(float).tiny) / np.maximum(middle, 1e-300)) > 8 * ratio_scale)
    found = np.flatnonzero((middle > 0) & unusual & (now > 1.5 * middle) & (now - middle > 0.05 * own))
    if not len(found):
        return passed(f"{len(now)} rows, none beyond 8 robust standard deviations of those before it")
    begins = found[np.concatenate(([True], np.diff(found) > 1))]
    worst = sorted(begins, key=lambda i: now[i] / middle[i], reverse=True)[:_SHOWN]
    rows = [
        Evidence(
            f"loss jumps to {now[i]:.4g} from about {middle[i]:.4g}",
            f"step {steps[i + _SPIKE_WINDOW]}",
            f"likely: {(now[i] - middle[i]) / scale[i]:.0f} robust standard deviations; spike {n + 1} of {len(begins)}",
            {"step": int(steps[i + _SPIKE_WINDOW]), "value": float(now[i]), "before": float(middle[i])},
        )
        for n, i in enumerate(worst)
    ]
    return finding(*rows)


@rule(
    "CX012",
    "Gradient norm jumps when the accumulation changes",
    "severe",
    reads="`grad_norm`, `accum/grad_steps` (or a lasting change of `accum/current_grad_steps`), five rows on either side of the change",
    test="With g = new/old steps, the medians of ten rows before and after differ by more than g^0.6 (gradients are summed) or less than "
    "g^-0.8 (divided twice). More samples a step shrink the norm of a mean gradient by at most g^-0.5. Three standard errors are "
    "allowed for noise.",
    advice="The gradient must be that of sum/count over the window: equal for 1 x 32 and 8 x 4 samples. Let only one place divide, "
    "and count tokens over the window before the first backward pass.",
)
def cx012(subject: Subject) -> Verdict:
    norm = subject.train.series("grad_norm").finite()
    norm = Series(norm.steps[norm.values > 0], norm.values[norm.values > 0])
    steps = subject.train.series("accum/grad_steps").finite()
    if not len(steps) or bool((steps.values == steps.values[0]).all()):
        current = subject.train.series("accum/current_grad_steps").finite()
        steps = current if len(current) else steps
    if not len(norm) or not len(steps):
        return not_applicable("needs grad_norm and accum/grad_steps")
    changes = _lasting_changes(steps)
    if not changes:
        return not_applicable("the accumulation does not change")
    logs = np.log(norm.values)
    found, looked = [], 0
    for step, old, new, begin, end in changes:
        at = int(np.searchsorted(norm.steps, step))
        before = logs[max(at - 10, int(np.searchsorted(norm.steps, begin))) : at]
        after = logs[at : min(at + 10, int(np.searchsorted(norm.steps, end)))]
        if len(before) < 5 or len(after) < 5:
            continue
        looked += 1
        growth = math.log(new / old)
        jump = float(np.median(after) - np.median(before))
        error = 1.25 * math.hypot(spread(before) / math.sqrt(len(before)), spread(after) / math.sqrt(len(after)))
        share = jump / growth
        # Beyond the threshold, and beyond what a mean gradient can do by three standard errors.
        summed = share > 0.6 and abs(jump) > 3 * error
        twice = share < -0.8 and abs(jump) - 0.5 * abs(growth) > 3 * error
        if summed or twice:
            found.append(
                Evidence(
                    f"gradient norm changes {float(np.exp(jump)):.3g}-fold when the accumulation goes from {old:g} to {new:g}: "
                    f"{'gradients are summed over micro-batches' if summed else 'gradients are divided twice'}",
                    f"step {step}",
                    f"likely: {abs(jump) / max(error, 1e-3):.0f} standard errors",
                    {"step": step, "factor": float(np.exp(jump)), "accumulation_factor": new / old},
                )
            )
    if found:
        return finding(*found)
    return passed(f"{looked} changes without a jump") if looked else not_applicable("fewer than five rows on a side of every change")


def _lasting_changes(steps: Series) -> list[tuple[int, float, float, int, int]]:
    """Changes between runs of at least five equal values: step, old, new, step the old run begins at, step the new one ends before.

    Shorter runs (partial windows) are taken out first.
    """
    values = steps.values
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = np.concatenate(([0], edges, [len(values)]))
    runs = [(int(a), int(b)) for a, b in pairwise(bounds) if b - a >= 5]
    merged: list[tuple[int, int]] = []
    for a, b in runs:
        if merged and values[merged[-1][0]] == values[a]:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    last = int(steps.steps[-1]) + 1
    return [
        (int(steps.steps[c]), float(values[a]), float(values[c]), int(steps.steps[a]), int(steps.steps[d]) if d < len(values) else last)
        for (a, _), (c, d) in pairwise(merged)
        if values[a] > 0 and values[c] > 0
    ]


def _epoch_ends(subject: Subject) -> NDArray[np.int64]:
    """Steps that end an epoch, where every step is logged."""
    epoch = subject.train.series("epoch").finite()
    if len(epoch) < 20 or float(np.median(np.diff(epoch.steps))) > 1:
        return np.empty(0, np.int64)
    near = 0.25 * float(np.median(np.diff(epoch.values)))
    whole = np.round(epoch.values)
    return epoch.steps[(whole >= 1) & (np.abs(epoch.values - whole) < near)]


@rule(
    "CX013",
    "Partial accumulation windows are scaled differently",
    "warning",
    reads="`loss`, `grad_norm`, `accum/current_grad_steps` below `accum/grad_steps` (or, logged every step, the ends of `epoch`)",
    test="Two partial windows or more whose median departs from the five full rows on either side by more than 30 % and four robust "
    "standard deviations, three quarters of them in one direction; or a single one beyond six.",
    advice="Divide each window by its own counts, not by the configured number of micro-batches; the last window of an epoch is short.",
)
def cx013(subject: Subject) -> Verdict:
    partial = _partial(subject)
    source = "accum/current_grad_steps"
    if not len(partial):
        partial, source = _epoch_ends(subject), "the ends of epochs"
    if not len(partial):
        return not_applicable("no partial window in the log")
    found, looked = [], 0
    for key in ("loss", "grad_norm"):
        s = subject.train.series(key).finite()
        s = Series(s.steps[s.values > 0], np.log(s.values[s.values > 0]))
        short = np.isin(s.steps, partial)
        full_steps, full = s.steps[~short], s.values[~short]
        at = np.searchsorted(full_steps, s.steps[short])[:500]
        if len(full) < 10 or not len(at):
            continue
        beside = [np.median(full[max(0, i - 5) : i + 5]) for i in at]
        departures = s.values[short][: len(at)] - np.array(beside)
        looked += 1
        middle, sigma = float(np.median(departures)), noise(full)
        one_way = float(np.mean(np.sign(departures) == np.sign(middle))) >= 0.75
        needed = max(math.log(1.3), 4 * sigma) if len(departures) >= 2 else max(math.log(1.5), 6 * sigma)
        if one_way and abs(middle) > needed:
            found.append(
                Evidence(
                    f"{key} of partial windows is {float(np.exp(middle)):.3g} times that of the full ones beside them",
                    f"{len(departures)} windows, first at step {s.steps[short][0]} (by {source})",
                    f"likely: noise of a row is {float(np.expm1(sigma)):.0%}",
                    {"key": key, "factor": float(np.exp(middle)), "windows": len(departures)},
                )
            )
    if found:
        return finding(*found)
    return passed(f"{len(partial)} partial windows like their neighbours") if looked else not_applicable("fewer than ten full windows")


RULES = (cx010, cx011, cx012, cx013)
