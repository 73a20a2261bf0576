"""Which metrics can rank checkpoints, and which way is better."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

from coordexp.errors import ConfigError
from coordexp.evaluate.registry import PROBE
from coordexp.train.options import BY_METRIC, TrainOptions
from coordexp.train.registry import METRICS

if TYPE_CHECKING:
    from transformers import TrainerState

PROBE_KEYS: Final = tuple(key for metric in PROBE for key in metric.names())


def waited(state: TrainerState) -> int:
    """Evaluations since the best one, from the log of the trainer, which a resumed run reads back."""
    best = state.best_global_step or 0
    return sum("eval_loss" in row and row["step"] > best for row in state.log_history)


def rankable() -> dict[str, bool]:
    """Metric key (as logged in training, without ``eval_``) -> whether a higher value is better."""
    found = {"loss": False, "coord_softce_w1/loss": False}
    found |= {key: metric.better == "higher" for metric in PROBE for key in metric.names() if metric.better != "neither"}
    # Counts, and shapes of the distribution, are better neither high nor low.
    return found | {metric.key: metric.better == "higher" for metric in METRICS if metric.better}


def check_best(options: TrainOptions, *, points: bool | None = None) -> bool | None:
    """Whether higher is better for ``train.save_best``; None where nothing is asked for.

    ``points``: whether the model writes points; None where that is not known, and has been looked at before.

    Raises:
        ConfigError: a key that no evaluation will have, with the nearest legal one.
    """
    key = options.save_best
    if key is None:
        return None
    legal = rankable()
    name = key.removeprefix("eval_")
    if name not in legal:
        # Compared with whole keys and with their last part: people write crps for coord_dist/crps.
        parts = {part: full for full in legal for part in (full.rpartition("/")[2], full)}
        near = difflib.get_close_matches(name.rpartition("/")[2], parts, n=1, cutoff=0.6) or difflib.get_close_matches(name, parts, n=1)
        hint = f"did you mean {parts[near[0]]}?" if near else f"expected one of {', '.join(sorted(legal))}"
        raise ConfigError(f"train.save_best: {key} is no metric that can rank checkpoints: {hint}")
    if points is not None:
        kind, measured, other = ("points", "probe/point_acc", "probe/f1_50") if points else ("boxes", "probe/f1_50", "probe/point_acc")
        if name == other:
            raise ConfigError(f"train.save_best: {key} is not measured on a model that writes {kind}: did you mean {measured}?")
    if name in PROBE_KEYS and options.lr_scheduler_type in BY_METRIC:
        raise ConfigError(f"train.lr_scheduler_type: {options.lr_scheduler_type} follows an evaluation, not {key}: set another save_best")
    if name in PROBE_KEYS and options.eval_strategy != "steps":
        raise ConfigError(f"train.save_best: {key} needs the probe at every evaluation: set train.eval_strategy=steps")
    if name in PROBE_KEYS and (options.probe_steps is None or options.eval_steps % options.probe_steps):
        raise ConfigError(
            f"train.save_best: {key} needs the probe at every evaluation (train.eval_steps={options.eval_steps}): "
            f"set train.probe_steps to {options.eval_steps} or a divisor of it"
        )
    return legal[name]
