"""CX020 to CX024: where the probability goes: mass, flattening, sharpening, the share of W1."""

from __future__ import annotations

from typing import Final

import numpy as np

from coordexp.losses.objective import COORD_TERMS
from coordexp.runs.rules.base import Evidence, Subject, Verdict, finding, not_applicable, passed, rule
from coordexp.runs.rules.statistics import TRAIN_WINDOW, Windows, kinds, windows

P_GT, TOP5 = "coord_softce_w1/p_gt_mean", "coord_softce_w1/acc_top5"
MASS = ("coord_softce_w1/coord_vocab_mass", "coord_monitor/coord_vocab_mass_at_gt_coord")
KL, SOFT_CE, W1 = "coord_dist/kl", "coord_softce_w1/soft_ce", "coord_softce_w1/w1"


def first_logged(subject: Subject, keys: tuple[str, ...], *beside: str) -> tuple[str, list[tuple[str, list[Windows]]]] | None:
    """The first of ``keys`` with enough rows, and its windows with those of ``beside`` over the same rows."""
    for key in keys:
        if found := kinds(subject.train, subject.eval, key, *beside):
            return key, found
    return None


@rule(
    "CX020",
    "Coordinate mass falls",
    "severe",
    reads="`coord_softce_w1/coord_vocab_mass` or `coord_monitor/coord_vocab_mass_at_gt_coord`, train and eval",
    test="The last of up to ten windows lies below the best earlier one by more than .01 and five standard errors, and ends below .95 "
    "(severe); or it still ends above .95 and what leaks, 1 - mass, has become more than three times as much: by more than .005 and five "
    "standard errors (warning).",
    advice="Raise objective.gate, lower the learning rate of the language model, and check that the coordinate rows of the "
    "head are trained "
    "(tied and untied heads differ). Generated answers lose coordinates before the loss shows it.",
)
def cx020(subject: Subject) -> Verdict:
    got = first_logged(subject, MASS)
    if got is None:
        return not_applicable("needs coordinate mass in twelve training rows or four evaluations")
    key, found = got
    rows, severe = [], False
    for kind, (mass,) in found:
        top = int(np.argmax(mass.level[:-1]))
        drop, error = mass.change(top)
        low = mass.level[-1] < 0.95
        leaks = 1 - mass.level[-1] > 3 * max(1 - mass.level[top], 0.0)
        if -drop > max(0.01 if low else 0.005, 5 * error) and (low or leaks):
            severe = severe or bool(low)
            rows.append(
                Evidence(
                    f"{key} ({kind}) falls from {mass.level[top]:.4f} to {mass.level[-1]:.4f}: {_times(mass, top)} leaks",
                    mass.where(top),
                    f"likely: {-drop / max(error, 1e-4):.0f} standard errors",
                    {"best": float(mass.level[top]), "last": float(mass.level[-1])},
                )
            )
    if rows:
        return finding(*rows, severity=None if severe else "warning")
    return passed("; ".join(f"{kind} ends at {w.level[-1]:.4f}" for kind, (w,) in found))


def _times(mass: Windows, top: int) -> str:
    """How much more leaks at the end than in window ``top``."""
    before, after = 1 - float(mass.level[top]), 1 - float(mass.level[-1])
    return f"{after / before:.1f} times as much" if before > 1e-6 else f"{after:.4f}"


_TEXT_MASS: Final = ("coord_monitor/coord_vocab_mass_at_gt_text", "coord_monitor/flip_text_to_coord")


@rule(
    "CX021",
    "Coordinate mass at text slots rises",
    "warning",
    reads="`coord_monitor/coord_vocab_mass_at_gt_text` or `coord_monitor/flip_text_to_coord`",
    test="The last window lies above the lowest earlier one by more than .01 and five standard errors, and is at least twice as high.",
    advice="Give objective.text_gate a weight, or lower the share of coordinate tokens: the model begins to write coordinates "
    "where words belong.",
)
def cx021(subject: Subject) -> Verdict:
    got = first_logged(subject, _TEXT_MASS)
    if got is None:
        return not_applicable("needs the coordinate mass at text slots (token_type_metrics) in twelve rows")
    key, found = got
    rows = []
    for kind, (mass,) in found:
        low = int(np.argmin(mass.level[:-1]))
        rise, error = mass.change(low)
        if rise > max(0.01, 5 * error) and mass.level[-1] > 2 * mass.level[low]:
            text = f"{key} ({kind}) rises from {mass.level[low]:.4f} to {mass.level[-1]:.4f}"
            sure = f"likely: {rise / max(error, 1e-5):.0f} standard errors"
            rows.append(Evidence(text, mass.where(low), sure, {"lowest": float(mass.level[low]), "last": float(mass.level[-1])}))
    return finding(*rows) if rows else passed("; ".join(f"{kind} ends at {w.level[-1]:.4f}" for kind, (w,) in found))


@rule(
    "CX022",
    "The distribution flattens",
    "warning",
    reads="`coord_softce_w1/p_gt_mean` with `coord_dist/kl` or `coord_softce_w1/soft_ce`; `coord_softce_w1/acc_top5` where logged",
    test="From its best window on, p_gt falls by more than 10 % (five standard errors) and top-5 accuracy by more than .02 "
    "(four), while kl (or soft_ce) stays within 5 % or three standard errors, at least .02 nats. Without top-5 accuracy p_gt must fall by "
    "more than 20 % (eight).",
    advice="The loss no longer sees the peak: narrow sigma or truncate, add ce, or raise the weight of the coordinate terms "
    "against weight decay "
    "and temperature. Judge by crps and nll, not by soft_ce.",
)
def cx022(subject: Subject) -> Verdict:
    got = first_logged(subject, (KL, SOFT_CE), P_GT, TOP5) or first_logged(subject, (KL, SOFT_CE), P_GT)
    if got is None:
        return not_applicable("needs p_gt_mean and kl or soft_ce in twelve rows")
    key, found = got
    rows = []
    for kind, (flat, p, *rest) in found:
        best = int(np.argmax(p.level[:-1]))
        fall, error = p.change(best)
        drift, drift_error = flat.change(best)
        if rest:
            fall5, error5 = rest[0].change(best)
            falls = -fall > max(0.1 * p.level[best], 5 * error) and -fall5 > max(0.02, 4 * error5)
        else:
            falls = -fall > max(0.2 * p.level[best], 8 * error)
        if falls and abs(drift) < max(0.05 * abs(flat.level[best]), 3 * drift_error, 0.02):
            beside = f"top-5 {rest[0].level[best]:.3f} to {rest[0].level[-1]:.3f}, " if rest else ""
            rows.append(
                Evidence(
                    f"{kind}: p_gt {p.level[best]:.3f} to {p.level[-1]:.3f}, {beside}"
                    f"{key} {flat.level[best]:.3f} to {flat.level[-1]:.3f}",
                    p.where(best),
                    f"likely: {-fall / max(error, 1e-5):.0f} standard errors",
                    {"p_gt_best": float(p.level[best]), "p_gt_last": float(p.level[-1])},
                )
            )
    return finding(*rows) if rows else passed("; ".join(f"{kind} p_gt ends at {w[1].level[-1]:.3f}" for kind, w in found))


@rule(
    "CX023",
    "The distribution over-sharpens",
    "warning",
    reads="`coord_softce_w1/p_gt_mean` with `coord_dist/kl` or `coord_softce_w1/soft_ce`",
    test="From the lowest window of kl (or soft_ce) on, it rises by more than .03 nats, 3 % and five standard errors, while "
    "p_gt rises by more "
    "than 5 % (four standard errors).",
    advice="Stop at the lowest kl, or lower ce, w1 and entropy weights: w1 to a soft target and hard cross-entropy both "
    "reward overconfidence. "
    "crps is proper and does not.",
)
def cx023(subject: Subject) -> Verdict:
    got = first_logged(subject, (KL, SOFT_CE), P_GT)
    if got is None:
        return not_applicable("needs p_gt_mean and kl or soft_ce in twelve rows")
    key, found = got
    rows = []
    for kind, (kl, p) in found:
        low = int(np.argmin(kl.level[:-1]))
        rise, error = kl.change(low)
        gain, gain_error = p.change(low)
        if rise > max(0.03, 0.03 * abs(kl.level[low]), 5 * error) and gain > max(0.05 * p.level[low], 4 * gain_error):
            rows.append(
                Evidence(
                    f"{kind}: {key} rises from {kl.level[low]:.3f} to {kl.level[-1]:.3f} while p_gt rises from "
                    f"{p.level[low]:.3f} to {p.level[-1]:.3f}",
                    kl.where(low),
                    f"likely: {rise / max(error, 1e-4):.0f} standard errors",
                    {"lowest": float(kl.level[low]), "last": float(kl.level[-1]), "lowest_until_step": int(kl.last[low])},
                )
            )
    return finding(*rows) if rows else passed("; ".join(f"{kind} {key} ends at {w[0].level[-1]:.3f}" for kind, w in found))


@rule(
    "CX024",
    "W1 is flat, or too small to matter",
    "warning",
    reads="`contrib/w1` and the other contributions (or the weighted parts of an older log), `coord_softce_w1/w1`, `coord_dist/kl`",
    test="W1 has a weight and its share of the coordinate loss is under 2 % over the last third; or its value changes by less "
    "than 5 % from the "
    "first window to the last while kl falls by more than 10 %. The share of the loss stands for that of the gradient, which logs "
    "do not have.",
    advice="The term is in bins here: a weight of .001 a bin is the older w1 / (K - 1). Give it .02 to .1, use crps instead, or drop it.",
)
def cx024(subject: Subject) -> Verdict:
    weighted = subject.contribution("w1")
    if weighted is None or not len(weighted) or not (weighted.values != 0).any():
        return not_applicable("W1 is not trained, or the log does not tell contributions apart")
    total = 0.0
    for term in COORD_TERMS:
        part = subject.contribution(term)
        if part is not None and len(part):
            total += abs(float(np.median(part.values[-max(1, len(part) // 3) :])))
    own = abs(float(np.median(weighted.values[-max(1, len(weighted) // 3) :])))
    share = own / total if total else 0.0
    rows = []
    where = f"steps {weighted.steps[-max(1, len(weighted) // 3)]} to {weighted.steps[-1]}"
    if len(weighted) >= 5 and share < 0.02:
        rows.append(Evidence(f"W1 is {share:.2%} of the coordinate loss", where, "certain by scale", {"share": share, "contribution": own}))
    pair = kinds(subject.train, subject.eval, W1, KL)
    for kind, (w1, kl) in pair:
        move, fall = abs(w1.change(0)[0]), -kl.change(0)[0]
        if move < 0.05 * abs(w1.level[0]) and fall > max(0.1 * abs(kl.level[0]), 5 * kl.change(0)[1]):
            text = f"w1 ({kind}) stays at {w1.level[-1]:.4g} while kl falls from {kl.level[0]:.3f} to {kl.level[-1]:.3f}"
            rows.append(Evidence(text, w1.where(), "likely", {"first": float(w1.level[0]), "last": float(w1.level[-1])}))
    return finding(*rows) if rows else passed(f"W1 is {share:.1%} of the coordinate loss", share=share)


def level_at_end(subject: Subject, key: str) -> tuple[str, float, str] | None:
    """Where (train or eval), the last window's level and its steps; evaluation before training."""
    for kind, columns, least in (("evaluation", subject.eval, 1), ("training", subject.train, TRAIN_WINDOW)):
        s = columns.series(key).finite()
        made = windows(s, least=least)
        if made is not None:
            return kind, float(made.level[-1]), made.where(-1)
    return None


RULES = (cx020, cx021, cx022, cx023, cx024)
