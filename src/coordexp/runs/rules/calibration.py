"""CX025 to CX029: are the values of the soft objective what they can be, and do entropy, modes and bias fit the readout?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from coordexp.runs.columns import Series
from coordexp.runs.rules.base import Evidence, Subject, Verdict, finding, not_applicable, passed, rule
from coordexp.runs.rules.coordinates import KL, SOFT_CE, level_at_end
from coordexp.runs.rules.statistics import EVAL_WINDOW, TRAIN_WINDOW, Windows, kinds, windows


def _floors(subject: Subject) -> list[tuple[str, Windows]]:
    """Windows of ``soft_ce - kl``, which is the target's entropy H(q), in training and evaluation."""
    made = []
    for kind, columns, least in (("training", subject.train, TRAIN_WINDOW), ("evaluation", subject.eval, EVAL_WINDOW)):
        soft, kl = columns.series(SOFT_CE).finite(), columns.series(KL).finite()
        soft, kl = soft.at(kl.steps), kl.at(soft.steps)
        found = windows(Series(soft.steps, soft.values - kl.values), least=least) if len(soft) and len(soft) == len(kl) else None
        if found is not None:
            made.append((kind, found))
    return made


@rule(
    "CX025",
    "soft_ce is compared across sigmas",
    "warning",
    reads="`coord_softce_w1/soft_ce`, `coord_dist/kl`, train and eval",
    test="soft_ce - kl is the target's entropy H(q), the floor of soft_ce: it differs by more than .05 nats and five standard "
    "errors between "
    "windows, or between training and evaluation.",
    advice="Compare kl, crps or nll instead: their floor does not move with sigma, truncate or object size.",
)
def cx025(subject: Subject) -> Verdict:
    if subject.term_scale("soft_ce") != 1.0:
        return not_applicable("soft_ce may be weighted in this log")
    found = _floors(subject)
    if not found:
        return not_applicable("needs soft_ce and kl in twelve rows")
    rows = []
    for kind, floor in found:
        i, j = int(np.argmin(floor.level)), int(np.argmax(floor.level))
        rise, error = floor.change(i, j)
        if rise > max(0.05, 5 * error):
            text = f"H(q) moves between {floor.level[i]:.3f} and {floor.level[j]:.3f} nats within {kind}"
            rows.append(
                Evidence(text, floor.where(), "certain: soft_ce - kl", {"lowest": float(floor.level[i]), "highest": float(floor.level[j])})
            )
    if len(found) == 2:
        middles = [float(np.median(floor.level)) for _, floor in found]
        error = 3 * max(float(np.max(floor.error)) for _, floor in found)
        if abs(middles[0] - middles[1]) > max(0.05, error) and not rows:
            text = f"H(q) is {middles[0]:.3f} nats in training and {middles[1]:.3f} in evaluation"
            rows.append(Evidence(text, "all steps", "certain: soft_ce - kl", {"train": middles[0], "eval": middles[1]}))
    return finding(*rows) if rows else passed(f"H(q) is {float(np.median(found[0][1].level)):.3f} nats throughout")


def target_entropy(sigma: float, truncate: float | None, center: float, num_bins: int = 1000) -> float:
    """Entropy in nats of the sampled Gaussian target around ``center``, cut at ``truncate`` bins and at the vocabulary's ends."""
    offset = np.arange(num_bins) - center
    keep = np.ones(num_bins, bool) if truncate is None else np.abs(offset) <= truncate
    keep[min(max(round(center), 0), num_bins - 1)] = True
    logs = np.where(keep, -0.5 * (offset / sigma) ** 2, -np.inf)
    q = np.exp(logs - logs.max())
    q /= q.sum()
    return float(-np.sum(q[q > 0] * np.log(q[q > 0])))


def soft_ce_floor(objective: Mapping[str, Any]) -> float | None:
    """The least entropy a target of the objective can have, wherever its centre is; None where it is 0 or unknown."""
    if objective.get("target", "gaussian") != "gaussian":
        return None
    adaptive = objective.get("alpha") is not None
    sigma, truncate = objective.get("sigma_min" if adaptive else "sigma"), objective.get("truncate")
    if not isinstance(sigma, (int, float)) or not math.isfinite(sigma) or sigma <= 0:
        return None
    cut = float(truncate) if isinstance(truncate, (int, float)) else math.ceil(4 * sigma) if adaptive else None
    # Narrowest at the edge of the image; beside that only the centre's fraction matters.
    return min(target_entropy(float(sigma), cut, center) for center in (0.0, 0.5, 500.0, 500.25, 500.5))


@rule(
    "CX026",
    "soft_ce lies under its floor",
    "warning",
    reads="`coord_dist/kl`; or `coord_softce_w1/soft_ce` with the objective in `config.yaml`",
    test="A window of kl is below -.005, or a window of the raw soft_ce is below the least entropy that the configured target can have. "
    "Cross-entropy to q is at least H(q), so either is impossible.",
    advice="The value is not what its name says: weighted, averaged over other tokens, or against another target than the one trained.",
)
def cx026(subject: Subject) -> Verdict:
    rows, looked = [], []
    for kind, (kl,) in kinds(subject.train, subject.eval, KL):
        i = int(np.argmin(kl.level))
        looked.append(f"{kind} kl is at least {kl.level[i]:.4f}")
        if kl.level[i] < -0.005:
            rows.append(
                Evidence(
                    f"kl ({kind}) is {kl.level[i]:.4f}, below 0", kl.where(i, i), "certain", {"value": float(kl.level[i]), "floor": 0.0}
                )
            )
    floor, scale = soft_ce_floor(subject.section("objective")), subject.term_scale("soft_ce")
    if floor is not None and scale:
        for kind, (soft,) in kinds(subject.train, subject.eval, SOFT_CE):
            i = int(np.argmin(soft.level))
            value = float(soft.level[i]) / scale
            looked.append(f"{kind} soft_ce is at least {value:.3f}, floor {floor:.3f}")
            if value < floor - 0.01:
                text = f"soft_ce ({kind}) is {value:.3f}, below the least entropy {floor:.3f} of its target"
                rows.append(Evidence(text, soft.where(i, i), "certain", {"value": value, "floor": floor}))
    if rows:
        return finding(*rows)
    return passed("; ".join(looked)) if looked else not_applicable("needs kl, or raw soft_ce and the objective")


_UNIFORM: Final = math.log(1000)


@rule(
    "CX027",
    "Entropy does not fit the errors",
    "warning",
    reads="`coord_dist/entropy`, train and eval; `coord_dist/nll` where logged",
    test="At the end nll exceeds the entropy by more than .7 nats (overconfident), the entropy exceeds nll by more than 1 nat "
    "(too flat; a soft "
    "target of its own adds .5), or the entropy is over 95 % of a uniform distribution's (nothing learnt).",
    advice="Overconfident: stop earlier, lower ce and w1, or fit a temperature before scores are used. Too flat: narrow sigma. Nothing "
    "learnt: check that the coordinate rows are trained and the learning rate reaches them.",
)
def cx027(subject: Subject) -> Verdict:
    found = kinds(subject.train, subject.eval, "coord_dist/entropy", "coord_dist/nll")
    found = found or kinds(subject.train, subject.eval, "coord_dist/entropy")
    if not found:
        return not_applicable("needs coord_dist/entropy in twelve rows")
    rows = []
    for kind, (entropy, *rest) in found:
        h = float(entropy.level[-1])
        # Without nll only a uniform distribution can be told.
        n = float(rest[0].level[-1]) if rest else h
        error = 4 * math.hypot(float(entropy.error[-1]), float(rest[0].error[-1]) if rest else 0.0)
        problem = (
            "nothing learnt: nearly uniform" if h > 0.95 * _UNIFORM
            else "overconfident" if n - h > max(0.7, error)
            else "too flat" if h - n > max(1.0, error)
            else None
        )  # fmt: skip
        if problem:
            beside = f", nll {n:.2f}" if rest else ""
            text = f"{kind}: {problem}; entropy {h:.2f}{beside} nats (uniform {_UNIFORM:.2f})"
            rows.append(Evidence(text, entropy.where(-1), "likely", {"entropy": h, "nll": n if rest else None}))
    return finding(*rows) if rows else passed("; ".join(f"{k} entropy {w[0].level[-1]:.2f}" for k, w in found))


@rule(
    "CX028",
    "Expectation decoding of distributions with several modes",
    "warning",
    reads="`decode.readout` in `config.yaml`, `coord_dist/multimodal_frac`, `coord_dist/tail_mass`",
    test="decode.readout is expectation, and at the end over 5 % of the distributions have several modes or the mass over 16 bins from "
    "the mode is over 1 %.",
    advice="Set decode.readout to auto (window, or median where there are several modes): the mean of two modes lies on "
    "neither, and one per "
    "cent of stray mass doubles its error.",
)
def cx028(subject: Subject) -> Verdict:
    readout = subject.section("decode").get("readout")
    modes, tail = level_at_end(subject, "coord_dist/multimodal_frac"), level_at_end(subject, "coord_dist/tail_mass")
    if readout is None:
        return not_applicable("no configuration says which readout decodes")
    if readout != "expectation":
        return passed(f"decoded by {readout}")
    if modes is None and tail is None:
        return not_applicable("needs coord_dist/multimodal_frac or tail_mass")
    rows = [
        Evidence(f"{name} ({got[0]}) is {got[1]:.1%} with expectation decoding", got[2], "certain", {"value": got[1], "limit": limit})
        for name, got, limit in (("multimodal_frac", modes, 0.05), ("tail_mass", tail, 0.01))
        if got is not None and got[1] > limit
    ]
    return finding(*rows) if rows else passed("few distributions with several modes, little stray mass")


@rule(
    "CX029",
    "Coordinates are biased to one side",
    "warning",
    reads="`coord_dist/signed_bias`, `coord_dist/median_bin_mae` where logged; `localisation.<readout>.all.signed_bias_bins` of "
    "`results.json`",
    test="Over the second half of the windows the bias is over .4 bins and 10 % of the error (1 bin where that is not logged), more than "
    "five standard errors, and of one sign; "
    "or the results' bias is over .4 bins and 10 % of their mean error with an interval, where there is one, that leaves out 0.",
    advice="Check the coordinate convention of data and decoder: floor instead of round costs half a bin, k/1000 read as k/999 up to one "
    "bin at the far edge. Compare the codec named in the manifest.",
)
def cx029(subject: Subject) -> Verdict:
    rows, looked = [], []
    logged = kinds(subject.train, subject.eval, "coord_dist/signed_bias", "coord_dist/median_bin_mae")
    for kind, (bias, *rest) in logged or kinds(subject.train, subject.eval, "coord_dist/signed_bias"):
        late = bias.level[len(bias.level) // 2 :]
        # Without the error beside it the bias must stand alone: over 1 bin is more than any convention's own loss.
        middle, size = float(np.median(late)), float(np.median(rest[0].level[-len(late) :])) if rest else 10.0
        sigma = float(np.max(bias.error)) / math.sqrt(len(late))
        looked.append(f"{kind} {middle:+.2f} bins")
        if abs(middle) > max(0.4, 0.1 * size, 5 * sigma) and bool((np.sign(late) == np.sign(middle)).all()):
            beside = f" (absolute error {size:.2f})" if rest else ""
            text, values = f"median minus truth is {middle:+.2f} bins in {kind}{beside}", {"bias": middle, "error": size if rest else None}
            rows.append(Evidence(text, bias.where(len(bias.level) // 2), f"likely: one sign in {len(late)} windows", values))
    for key, value in (subject.results or {}).items():
        if not key.endswith(".all.signed_bias_bins") or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        mean = (subject.results or {}).get(key.replace("signed_bias", "mean"))
        interval = (subject.results or {}).get(f"intervals.{key}")
        looked.append(f"{key} {value:+.2f}")
        open_interval = isinstance(interval, list) and len(interval) == 2 and interval[0] <= 0 <= interval[1]
        if isinstance(mean, (int, float)) and abs(value) > max(0.4, 0.1 * mean) and not open_interval:
            rows.append(
                Evidence(
                    f"{key} is {value:+.2f} bins", "results.json", "possible" if interval is None else "likely", {"bias": float(value)}
                )
            )
    if rows:
        return finding(*rows)
    return passed("; ".join(looked[:4])) if looked else not_applicable("needs coord_dist/signed_bias or results.json")


RULES = (cx025, cx026, cx027, cx028, cx029)
