"""CX001 to CX006: is the training loss on the scale of the evaluation loss, and over the same tokens?"""

from __future__ import annotations

import math

import numpy as np

from coordexp.runs.columns import Columns
from coordexp.runs.rules.base import Evidence, Severity, Subject, Verdict, finding, not_applicable, passed, rule
from coordexp.runs.rules.statistics import MIN_EVALUATIONS, Ratio, train_over_eval

_RATIO_READS = "`loss`, `eval_loss` (three evaluations or more)"
_TOO_FEW = f"needs loss and eval_loss, both positive, and at least {MIN_EVALUATIONS} evaluations with training rows beside them"


def _exp(value: float) -> float:
    """``exp``; infinite where it overflows."""
    return float(np.exp(value))


def _accuracy_gap(subject: Subject) -> float | None:
    """Training minus evaluation accuracy over the second half, where both are logged."""
    train, evaluation = subject.train.series("token_acc").finite(), subject.eval.series("token_acc").finite()
    if not len(train) or not len(evaluation):
        return None
    late = [float(np.median(s.values[len(s) // 2 :])) for s in (train, evaluation)]
    return late[0] - late[1]


def _overfits(subject: Subject, ratio: Ratio) -> bool:
    """A training loss below the evaluation loss together with a better accuracy is a gap of the model, not of the scale."""
    gap = _accuracy_gap(subject)
    return ratio.median < 0 and gap is not None and gap > 0.1


def _severity(subject: Subject, ratio: Ratio) -> Severity | None:
    """Of a wrong scale: a warning where a gap of the model explains it as well, i.e. a training loss below the evaluation loss without
    equal accuracies beside it; else the rule's own."""
    gap = _accuracy_gap(subject)
    return None if ratio.median > 0 or (gap is not None and gap < 0.03) else "warning"


def _scale_evidence(ratio: Ratio, cause: str) -> Evidence:
    share = float(np.mean(np.abs(ratio.logs - ratio.median) < 0.35))
    return Evidence(
        f"training loss is {ratio.factor:.3g} times the evaluation loss: {cause}",
        f"steps {ratio.steps[0]} to {ratio.steps[-1]}",
        f"{'likely' if ratio.spread < 0.15 else 'possible'}: {share:.0%} of {len(ratio.logs)} evaluations agree, "
        f"from the first ones on (spread {_exp(ratio.spread) - 1:.0%})",
        {"ratio": ratio.factor, "early_ratio": _exp(ratio.early), "evaluations": len(ratio.logs)},
    )


def _known_factor(subject: Subject, factor: float | None, cause: str, unknown: str) -> Verdict:
    ratio = subject.loss_ratio
    if ratio is None:
        return not_applicable(_TOO_FEW)
    if factor is None:
        return not_applicable(unknown)
    if factor in (1.0,):
        return not_applicable(f"the factor would be 1 (measured ratio {ratio.factor:.3g})")
    if ratio.matches(factor) and not _overfits(subject, ratio):
        return finding(_scale_evidence(ratio, cause), severity=_severity(subject, ratio))
    return passed(f"ratio train/eval {ratio.factor:.3g}, not {factor:.3g}", ratio=ratio.factor)


_CAUTION = (
    "A training loss below the evaluation loss is only severe where the token accuracies are logged and equal (within .03): otherwise "
    "over-fitting looks the same, and it is a warning; with a gap over .1 it is none."
)
_NO_STEPS = "nothing says how many micro-batches are accumulated (accum/grad_steps, config.yaml or args.json)"


@rule(
    "CX001",
    "Training loss is multiplied by the accumulation steps",
    "severe",
    reads=f"{_RATIO_READS}; accumulation steps from `accum/grad_steps`, `config.yaml` or `args.json`",
    test="The windowed ratio of training to evaluation loss is the number of accumulation steps, within 15 to 22 % in the median, "
    "from the first evaluations on and at 70 % of them. " + _CAUTION,
    advice="Divide by the counts of the whole accumulation window once: return sum/N with loss_is_scaled_for_ga=True (or a loss that "
    "uses num_items_in_batch). The gradient carries the same factor: after the fix raise max_grad_norm or the learning rate knowingly.",
)
def cx001(subject: Subject) -> Verdict:
    steps = subject.accumulation()
    return _known_factor(
        subject, None if steps is None else float(steps), f"the {steps} accumulation steps are summed, not averaged", _NO_STEPS
    )


@rule(
    "CX002",
    "Training loss is divided by the accumulation steps once too often",
    "severe",
    reads=f"{_RATIO_READS}; accumulation steps as for CX001",
    test="As CX001, for one over the number of accumulation steps, with its caution.",
    advice="The window's loss is divided twice: by the loss function and by the trainer. Let only one of them divide.",
)
def cx002(subject: Subject) -> Verdict:
    steps = subject.accumulation()
    return _known_factor(
        subject, None if steps is None else 1.0 / steps, f"it is divided by the {steps} accumulation steps twice", _NO_STEPS
    )


@rule(
    "CX003",
    "Training and evaluation loss differ by the number of ranks",
    "severe",
    reads=f"{_RATIO_READS}; number of ranks from `args.json`, the log's header or the manifest",
    test="As CX001, with its caution, for the number of ranks, one over it, and either of them times or over the accumulation steps.",
    advice="Gradients are averaged over ranks: a loss divided by the count of all ranks is multiplied by their number for the backward "
    "pass, and neither factor belongs into the logged value. Reduce sums and counts, then divide once.",
)
def cx003(subject: Subject) -> Verdict:
    ranks, steps = subject.world_size(), subject.accumulation() or 1
    ratio = subject.loss_ratio
    if ratio is None:
        return not_applicable(_TOO_FEW)
    if ranks is None or ranks == 1:
        return not_applicable("one rank, or nothing says how many")
    candidates = {float(ranks), 1.0 / ranks}
    if steps > 1:
        candidates |= {float(ranks * steps), 1.0 / (ranks * steps)} - {float(steps), 1.0 / steps}
        # Equal numbers: the accumulation is the more frequent cause, and CX001 or CX002 says so.
        candidates -= {float(steps), 1.0 / steps}
    for factor in sorted(candidates):
        if ratio.matches(factor) and not _overfits(subject, ratio):
            cause = f"close to {factor:.4g}, with {ranks} ranks and {steps} accumulation steps"
            return finding(_scale_evidence(ratio, cause), severity=_severity(subject, ratio))
    return passed(f"ratio train/eval {ratio.factor:.3g}, none of the factors of {ranks} ranks", ratio=ratio.factor)


@rule(
    "CX004",
    "Training and evaluation loss differ by a constant factor",
    "severe",
    reads=f"{_RATIO_READS}, `token_acc`, `eval_token_acc` where logged",
    test="The ratio is constant (spread under 15 %, the first evaluations within 25 % of the rest), not explained by CX001 to CX003, and "
    "beyond 3 or below 1/3 (severe) or beyond 1.5 (warning). " + _CAUTION,
    advice="Find who divides the loss in training and in evaluation. State the accumulation steps and ranks beside the log "
    "(args.json, accum/grad_steps) and audit again. Dropout and augmentation explain factors up to about 1.5.",
)
def cx004(subject: Subject) -> Verdict:
    ratio = subject.loss_ratio
    if ratio is None:
        return not_applicable(_TOO_FEW)
    for other in (cx001, cx002, cx003):
        if other.check(subject).outcome == "finding":
            return not_applicable(f"explained by {other.code}")
    size = abs(ratio.median)
    constant = ratio.spread < 0.15 and abs(ratio.early - ratio.median) < 0.25
    if not constant or size < math.log(1.5) or _overfits(subject, ratio):
        return passed(f"ratio train/eval {ratio.factor:.3g}{'' if constant else ', not constant'}", ratio=ratio.factor)
    severity = _severity(subject, ratio) if size > math.log(3) else "warning"
    return finding(_scale_evidence(ratio, "a constant factor that nothing beside the log explains"), severity=severity)


def _share_of_coordinates(columns: Columns) -> float | None:
    text, coord = columns.series("base_ce/noncoord_tokens").finite(), columns.series("coord_softce_w1/coord_tokens").finite()
    if len(text) and len(coord):
        total = float(text.values.sum() / len(text) + coord.values.sum() / len(coord))
        return float(coord.values.sum() / len(coord)) / total if total else None
    share = columns.series("coord_token_frac").finite()
    return float(np.median(share.values)) if len(share) else None


def _implied_text_weight(columns: Columns) -> float | None:
    """``(loss - coordinate loss) / text loss``: the text term's weight, if all are over the tokens they claim."""
    found = [columns.series(key).finite() for key in ("loss", "coord_softce_w1/loss", "base_ce/loss")]
    common = found[0].steps
    for s in found:
        common = common if s.steps is common else np.intersect1d(common, s.steps)
    total, coord, text = (s.at(common).values for s in found)
    if (
        len(common) < 3
        or not len(total) == len(coord) == len(text)
        or (text <= 0).any()
        or np.median(text) < 0.05 * np.median(np.abs(total))
    ):
        return None
    return float(np.median((total - coord) / text))


def _accuracy_error(columns: Columns) -> float | None:
    """Median gap between ``token_acc`` and the mix of text and coordinate accuracy by their counts."""
    keys = ("token_acc", "text_token_acc", "coord_token_acc", "base_ce/noncoord_tokens", "coord_softce_w1/coord_tokens")
    found = [columns.series(key) for key in keys]
    if len({len(s) for s in found}) != 1 or not len(found[0]):
        return None
    every, text, coord, n_text, n_coord = (s.values for s in found)
    with np.errstate(all="ignore"):
        error = np.abs(every - (text * n_text + coord * n_coord) / (n_text + n_coord))
    error = error[np.isfinite(error)]
    return float(np.median(error)) if len(error) else None


_PARTS = ("base_ce/loss", "coord_softce_w1/loss")


def _lone_part(subject: Subject) -> Evidence | None:
    """A part of the loss that differs by a constant factor while the other does not."""
    ratios = {key: train_over_eval(subject.train.series(key), subject.eval.series(key)) for key in _PARTS}
    for key, other in (_PARTS, _PARTS[::-1]):
        one, two = ratios[key], ratios[other]
        if one is None or two is None:
            continue
        same_sign = one.median * one.early > 0
        if abs(one.median) > math.log(1.6) and same_sign and abs(one.early) > math.log(1.4) and abs(two.median) < math.log(1.25):
            return Evidence(
                f"{key} in training is {one.factor:.3g} times that in evaluation while {other} agrees ({two.factor:.3g})",
                f"steps {one.steps[0]} to {one.steps[-1]}",
                f"likely: {len(one.logs)} evaluations, from the first ones on",
                {"ratio": one.factor, "other_ratio": two.factor},
            )
    return None


@rule(
    "CX005",
    "Training and evaluation metrics are computed on different tokens",
    "warning",
    reads="`base_ce/*`, `coord_softce_w1/{loss,coord_tokens}`, `coord_token_frac`, `{,text_,coord_}token_acc`, each with its `eval_` twin",
    test="Any of: the share of coordinate tokens differs by more than 25 %; one of text and coordinate loss differs by a constant factor "
    "over 1.6 while the other agrees; the implied text weight (loss - coordinate loss) / text loss differs by more than 20 %; token_acc is "
    "the mix of text and coordinate accuracy (within .01) on one side and not (over .03) on the other.",
    advice="Compute both through one function, from labels of the same roles: coordinate positions out of the text metrics, prompt "
    "positions out of both. Compare nothing across train and eval until this rule passes.",
)
def cx005(subject: Subject) -> Verdict:
    found: list[Evidence] = []
    looked = 0
    scaled = (ratio := subject.loss_ratio) is not None and abs(ratio.median) > math.log(1.5)
    train, evaluation = _share_of_coordinates(subject.train), _share_of_coordinates(subject.eval)
    if train is not None and evaluation is not None:
        looked += 1
        if abs(train - evaluation) > 0.25 * max(train, evaluation):
            text = f"coordinates are {train:.1%} of the training tokens and {evaluation:.1%} of the evaluation tokens"
            found.append(Evidence(text, "all steps", "likely", {"train": train, "eval": evaluation}))
    train, evaluation = _implied_text_weight(subject.train), _implied_text_weight(subject.eval)
    if train is not None and evaluation is not None and not scaled:
        looked += 1
        if abs(train - evaluation) > 0.2 * max(abs(train), abs(evaluation)):
            text = f"(loss - coordinate loss) / text loss is {train:.3g} in training and {evaluation:.3g} in evaluation"
            found.append(Evidence(text, "all steps", "likely", {"train": train, "eval": evaluation}))
    train, evaluation = _accuracy_error(subject.train), _accuracy_error(subject.eval)
    if train is not None and evaluation is not None:
        looked += 1
        off = max(train, evaluation)
        if min(train, evaluation) < 0.01 and off > 0.03:
            side = "training" if train > evaluation else "evaluation"
            text = f"in {side}, token_acc is not the mix of text and coordinate accuracy (off by {off:.3f})"
            found.append(Evidence(text, "all steps", "certain: an identity", {"train": train, "eval": evaluation}))
    if all(len(s.series(key)) for s in (subject.train, subject.eval) for key in _PARTS):
        looked += 1
        if lone := _lone_part(subject):
            found.append(lone)
    if found:
        return finding(*found)
    return passed(f"{looked} comparisons agree") if looked else not_applicable("no pair of train and eval metrics to compare")


@rule(
    "CX006",
    "Evaluation data may be among the training data",
    "warning",
    reads="`epoch`, `loss`, `eval_loss` (three epochs and three evaluations or more)",
    test="After the first epoch the training loss falls below 35 % of its level then, and over the second half of the run the evaluation "
    "loss is at most 5 % above the training loss: what is memorised is as good as what is held out.",
    advice="Compare the image hashes of the splits, and near duplicates. With a task this easy a gap may truly be absent: "
    "evaluate on images from elsewhere.",
)
def cx006(subject: Subject) -> Verdict:
    loss, epoch = subject.train.series("loss").finite(), subject.train.series("epoch").finite()
    ratio = subject.loss_ratio
    if ratio is None or len(epoch) < 12 or epoch.values[-1] < 3:
        return not_applicable("needs three epochs and three evaluations")
    first = loss.at(epoch.steps[(epoch.values > 0.8) & (epoch.values <= 1.2)])
    if len(first) < 2:
        return not_applicable("no training rows around the end of the first epoch")
    fall = float(np.median(loss.values[-max(3, len(loss) // 10) :]) / np.median(first.values))
    late = float(np.median(ratio.logs[len(ratio.logs) // 2 :]))
    if fall < 0.35 and -0.05 < late < math.log(1.5):
        return finding(
            Evidence(
                f"training loss fell to {fall:.0%} of its level after one epoch, and evaluation loss with it (train/eval {_exp(late):.3g})",
                f"steps {ratio.steps[len(ratio.steps) // 2]} to {ratio.steps[-1]}",
                "possible: an easy task looks the same",
                {"fall": fall, "late_ratio": _exp(late), "epochs": float(epoch.values[-1])},
            )
        )
    return passed(f"training loss at {fall:.0%} of its level after one epoch, train/eval late {_exp(late):.3g}")


RULES = (cx001, cx002, cx003, cx004, cx005, cx006)
