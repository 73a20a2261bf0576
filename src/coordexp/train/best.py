"""Which metrics can rank checkpoints, and which way is better."""

from __future__ import annotations

import difflib
from typing import Final

from coordexp.errors import ConfigError
from coordexp.train.registry import METRICS

PROBE_KEYS: Final = ("probe/parse_rate", "probe/f1_50", "probe/point_acc", "probe/objects_per_image", "probe/duplicate_rate")


def rankable() -> dict[str, bool]:
    """Metric key (as logged in training, without ``eval_``) -> whether a higher value is better."""
    found = {"loss": False, "coord_softce_w1/loss": False, "probe/duplicate_rate": False}
    found |= dict.fromkeys(("probe/f1_50", "probe/point_acc", "probe/parse_rate"), True)
    # Counts, and shapes of the distribution, are better neither high nor low.
    return found | {metric.key: metric.better == "higher" for metric in METRICS if metric.better}


def check_best(key: str | None, *, probe_steps: int | None, eval_steps: float, points: bool | None = None) -> bool | None:
    """Whether higher is better for ``train.save_best``; None where nothing is asked for.

    ``points``: whether the model writes points; None where that is not known, and has been looked at before.

    Raises:
        ConfigError: a key that no evaluation will have, with the nearest legal one.
    """
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
    if name in PROBE_KEYS and (probe_steps is None or eval_steps % probe_steps):
        raise ConfigError(
            f"train.save_best: {key} needs the probe at every evaluation (train.eval_steps={eval_steps}): "
            f"set train.probe_steps to {eval_steps} or a divisor of it"
        )
    return legal[name]
