"""CX040 to CX045: over-fitting, divergence, a flat loss, a frozen model, a first loss worse than chance, rows that repeat."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coordexp.runs.columns import Series
from coordexp.runs.rules.base import Evidence, Subject, Verdict, finding, not_applicable, passed, rule
from coordexp.runs.rules.statistics import TRAIN_WINDOW, Windows, noise, windows

_FEW: Final = 5


def _course(series: Series) -> tuple[NDArray[np.int64], NDArray[np.float64], float] | None:
    """Last steps and medians of up to ten parts of an evaluation's values, and the standard error of each.

    From second differences: a trend is no noise. Under five values have no error of their own: 2 % of the largest stand for it.
    """
    kept = series.finite()
    if len(kept) < 3:
        return None
    parts = np.array_split(kept.values, min(10, len(kept)))
    last = kept.steps[np.cumsum([len(part) for part in parts]) - 1]
    few = len(kept) < _FEW
    error = 0.02 * float(np.abs(kept.values).max()) if few else noise(np.diff(kept.values)) / math.sqrt(3.0)
    return last, np.array([np.median(part) for part in parts]), 1.25 * error / math.sqrt(len(parts[0]))


@rule(
    "CX040",
    "Over-fitting: the evaluation loss rises while the training loss does not",
    "warning",
    reads="`eval_loss` (three evaluations or more); `loss` where logged",
    test="From its lowest level on the evaluation loss rises by more than 10 % and five standard errors (of up to ten parts of the "
    "evaluations), and the training loss, where it is logged, does not rise over the same steps.",
    advice="Keep the checkpoint of the lowest evaluation loss (train.save_best, load_best_model_at_end) and stop there: fewer epochs, a "
    "lower learning rate, more data or augmentation. Judge boxes too: they can improve a little longer than the loss.",
)
def cx040(subject: Subject) -> Verdict:
    found = _course(subject.eval.series("loss"))
    if found is None:
        return not_applicable("needs eval_loss of three evaluations")
    steps, level, error = found
    low = int(np.argmin(level))
    rise, sigma = float(level[-1] - level[low]), math.sqrt(2) * error
    if low == len(level) - 1 or level[low] <= 0 or rise < max(0.1 * level[low], 5 * sigma):
        return passed(f"evaluation loss lowest {level[low]:.4g} at step {steps[low]}, last {level[-1]:.4g}")
    train = subject.train.series("loss").finite()
    beside = [float(np.median(part)) for at in (steps[low], steps[-1]) if len(part := train.values[_beside(train.steps, int(at))])]
    if len(beside) == 2 and beside[1] > 1.05 * beside[0]:
        course = f"{beside[0]:.4g} to {beside[1]:.4g}"
        return passed(f"evaluation loss rises to {level[-1]:.4g}, and training loss with it ({course}): see CX041")
    also = f", training loss goes from {beside[0]:.4g} to {beside[1]:.4g}" if len(beside) == 2 else ""
    return finding(
        Evidence(
            f"evaluation loss rises from {level[low]:.4g} to {level[-1]:.4g}{also}",
            f"steps {steps[low]} to {steps[-1]}",
            f"likely: {rise / max(sigma, 1e-12):.0f} standard errors" if sigma > 0 else "likely",
            {"lowest": float(level[low]), "last": float(level[-1]), "lowest_at_step": int(steps[low])},
        )
    )


def _beside(steps: NDArray[np.int64], at: int) -> slice:
    """The five rows up to a step, and as many after it as there are of five."""
    i = int(np.searchsorted(steps, at, side="right"))
    return slice(max(0, i - 5), i + (0 if i == len(steps) else 2))


def _loss_windows(subject: Subject, count: int = 10) -> Windows | None:
    return windows(subject.train.series("loss"), least=TRAIN_WINDOW, count=count)


@rule(
    "CX041",
    "The training loss diverges",
    "severe",
    reads="`loss` (12 rows or more)",
    test="The last of up to ten windows lies above the lowest earlier one by more than eight standard errors, a tenth of the loss's "
    "own scale (its highest window) and 100 % (severe) or 30 % (warning), and the rows of the last window stay there. What a warm restart "
    "or a spike lifts comes down again.",
    advice="Go back to the checkpoint before the rise; lower the peak learning rate, lengthen the warm-up, clip gradients. In 16 bits "
    "look at the gradient norm and the optimizer's epsilon.",
)
def cx041(subject: Subject) -> Verdict:
    made = _loss_windows(subject)
    if made is None:
        return not_applicable("needs loss in twelve rows")
    low = int(np.argmin(made.level[:-1]))
    rise, error = made.change(low)
    base, scale = float(made.level[low]), float(made.level.max())
    loss = subject.train.series("loss").finite()
    tail = loss.values[loss.steps >= made.first[-1]]
    middle = base + rise / 2
    stays = bool(np.mean(tail[len(tail) // 2 :] > middle) > 0.75)
    if base > 0 and stays and rise > max(0.3 * base, 0.1 * scale, 8 * error):
        return finding(
            Evidence(
                f"training loss rises from {base:.4g} to {float(made.level[-1]):.4g} and stays there",
                made.where(low),
                f"likely: {rise / max(error, 1e-12):.0f} standard errors",
                {"lowest": base, "last": float(made.level[-1]), "lowest_until_step": int(made.last[low])},
            ),
            severity=None if rise > base else "warning",
        )
    return passed(f"lowest window {min(base, float(made.level[-1])):.4g}, last {float(made.level[-1]):.4g}")


@rule(
    "CX042",
    "Nothing is learnt: the training loss is flat",
    "warning",
    reads="`loss` (30 rows or more); `eval_loss`, `token_acc` and `learning_rate` where logged",
    test="No window of the loss lies below the first by more than 3 %, and the errors are small enough to tell (five of them under 3 %); "
    "the evaluation loss, where logged, does not fall by 3 % either, and the token accuracy is below .9. A rate of 0 is CX043's.",
    advice="Check that the trained parameters are the intended ones (the start-up banner counts them), that labels are not all ignored, "
    "and the learning rate. A run that goes on from a trained model may have little left to learn.",
)
def cx042(subject: Subject) -> Verdict:
    loss = subject.train.series("loss").finite()
    made = _loss_windows(subject, count=5)
    if made is None or len(loss) < 30:
        return not_applicable("needs loss in thirty rows")
    first, fall = float(made.level[0]), float(made.level[0] - made.level.min())
    error = 5 * max(math.hypot(made.error[0], e) for e in made.error)
    if first <= 0 or fall > 0.03 * first or error > 0.03 * first:
        return passed(f"training loss falls by {fall / first if first > 0 else 0:.0%}")
    accuracy, rate = subject.train.series("token_acc").finite(), subject.train.series("learning_rate").finite()
    if len(rate) and not (rate.values > 0).any():
        return not_applicable("the learning rate is 0: see CX043")
    if len(accuracy) and float(np.median(accuracy.values[-5:])) >= 0.9:
        return passed("the loss is flat, with little left to learn")
    held_out = subject.eval.series("loss").finite().values
    if len(held_out) >= 2 and held_out.min() < 0.97 * held_out[0]:
        return passed("the training loss is flat, the evaluation loss falls")
    where = made.where()
    text = f"training loss stays at {first:.4g} (lowest window {float(made.level.min()):.4g})"
    sure = "possible: a run that goes on from a trained model looks the same"
    return finding(Evidence(text, where, sure, {"first": first, "fall": fall}))


@rule(
    "CX043",
    "The model is frozen: the learning rate or the gradient is 0",
    "severe",
    reads="`learning_rate`, `grad_norm` (five rows or more), `loss`",
    test="All values are exactly 0 (severe; a warning for the rate where the loss falls all the same, which a rounded log shows); or the "
    "gradient norm is exactly 0 in the last 10 % of the rows, at least five (warning).",
    advice="Rate: the schedule's length and warm-up, and the optimizer's groups. Gradient: parameters that need none, a detached loss, "
    "masks without a supervised token, or a loss that is exactly 0.",
)
def cx043(subject: Subject) -> Verdict:
    rate, norm = subject.train.series("learning_rate").finite(), subject.train.series("grad_norm").finite()
    rows, severe = [], False
    made = _loss_windows(subject)
    falls = made is not None and made.level[0] > 0 and made.level[-1] < 0.9 * made.level[0] and made.change(0)[0] < -5 * made.change(0)[1]
    for key, s in (("learning_rate", rate), ("grad_norm", norm)):
        if len(s) < _FEW:
            continue
        if not s.values.any():
            mild = key == "learning_rate" and falls
            severe = severe or not mild
            text = f"{key} is 0 in all {len(s)} rows{', while the loss falls' if mild else ''}"
            sure = "possible: a rounded log" if mild else "certain"
            rows.append(Evidence(text, f"steps {s.steps[0]} to {s.steps[-1]}", sure, {"key": key}))
        elif key == "grad_norm":
            tail = len(s) - 1 - int(np.flatnonzero(s.values)[-1])
            if tail >= max(_FEW, 0.1 * len(s)):
                text = f"grad_norm is 0 in the last {tail} rows"
                rows.append(Evidence(text, f"steps {s.steps[-tail]} to {s.steps[-1]}", "certain", {"key": key, "rows": tail}))
    if rows:
        return finding(*rows, severity=None if severe else "warning")
    if len(rate) < _FEW and len(norm) < _FEW:
        return not_applicable("needs learning_rate or grad_norm in five rows")
    return passed("learning rate and gradient are not 0")


# The largest vocabularies in use have 262,144 tokens; ln 300,000 = 12.6.
_LARGEST_VOCABULARY: Final = 300_000


@rule(
    "CX044",
    "The first loss is worse than chance",
    "warning",
    reads="`base_ce/loss`, else `loss` (of a log without coordinate terms); `vocab_size` of the arguments where stated",
    test="The median of the first three rows is above ln V, what a uniform guess among V tokens costs; V = 300,000 where nothing says it.",
    advice="A pretrained model starts far below. Look for labels shifted by one, a loss summed over micro-batches or tokens, a head that "
    "is not the checkpoint's, or a vocabulary that was resized without its rows.",
)
def cx044(subject: Subject) -> Verdict:
    key = "base_ce/loss" if len(subject.train.series("base_ce/loss")) else "loss"
    loss = subject.train.series(key).finite()
    coordinates = any(name.startswith(("coord_softce_w1/", "contrib/")) for name in subject.train.keys)
    if len(loss) < 3 or (key == "loss" and coordinates):
        return not_applicable("needs three rows with base_ce/loss, or with loss where it is the cross-entropy alone")
    stated = subject.arguments.get("vocab_size")
    known = isinstance(stated, int) and not isinstance(stated, bool) and stated > 1
    limit = math.log(stated if known and isinstance(stated, int) else _LARGEST_VOCABULARY)
    first = float(np.median(loss.values[:3]))
    if first > limit:
        text = f"{key} begins at {first:.4g} nats, above ln V = {limit:.3g}{'' if known else ' of the largest vocabularies'}"
        return finding(Evidence(text, f"steps {loss.steps[0]} to {loss.steps[2]}", "likely", {"first": first, "limit": limit}))
    return passed(f"{key} begins at {first:.4g}, below {limit:.3g}")


@rule(
    "CX045",
    "Rows of the log repeat",
    "warning",
    reads="every training row",
    test="Over 5 % of the steps, two or more, have rows that contradict each other; or three rows or more in a row at different steps hold "
    "exactly the same loss and gradient norm; or (info) rows were written twice, which ms-swift does by habit.",
    advice="Two processes, or two runs, write one file: let the first process log alone, and give each run its own folder. Equal values "
    "at different steps: the same batch again and again, or a logger that repeats its last value.",
)
def cx045(subject: Subject) -> Verdict:
    rows = []
    loss = subject.train.series("loss")
    if not len(loss):
        return not_applicable("needs loss")
    steps, counts = np.unique(loss.steps, return_counts=True)
    several = steps[counts > 1]
    if len(several) >= max(2, 0.05 * len(steps)):
        text = f"{len(several)} of {len(steps)} steps have rows with different values"
        rows.append(Evidence(text, f"first at step {several[0]}, last at step {several[-1]}", "certain", {"steps": len(several)}))
    norm = subject.train.series("grad_norm").at(loss.steps)
    same = (np.diff(loss.values) == 0) & (loss.values[1:] != 0) & (np.diff(loss.steps) > 0)
    if len(norm) == len(loss):
        same &= np.diff(norm.values) == 0
    else:
        same &= False
    longest, end = _longest(same)
    if longest >= 2:
        text = f"loss and grad_norm are exactly the same in {longest + 1} rows, {loss.values[end]:.6g}"
        rows.append(Evidence(text, f"steps {loss.steps[end - longest]} to {loss.steps[end]}", "certain", {"rows": longest + 1}))
    if rows:
        return finding(*rows)
    twice = subject.log.duplicates
    if twice and subject.log.source != "ms-swift":
        return finding(Evidence(f"{twice} rows are written twice; each counts once", "", "certain", {"rows": twice}), severity="info")
    return passed(f"{len(steps)} steps, each with one row" + (f"; {twice} rows written twice" if twice else ""))


def _longest(flags: NDArray[np.bool_]) -> tuple[int, int]:
    """Length of the longest run of True, and the index after its end."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    begins, ends = edges[0::2], edges[1::2]
    if not len(begins):
        return 0, 0
    i = int(np.argmax(ends - begins))
    return int(ends[i] - begins[i]), int(ends[i])


RULES = (cx040, cx041, cx042, cx043, cx044, cx045)
