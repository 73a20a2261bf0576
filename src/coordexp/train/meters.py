"""Metrics by name: each is a sum over a count, from the same sums in training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import CoordLossOutput
from coordexp.losses.objective import COORD_TERMS, TERMS, TEXT_TERMS, CoordObjective
from coordexp.losses.sums import LossSums


@dataclass(frozen=True)
class Metric:
    """``source`` names the (sum, count) pair; the value is their ratio, or the count with ``take='count'``."""

    key: str
    source: str
    definition: str
    take: str = "mean"


METRICS: Final[tuple[Metric, ...]] = (
    Metric("base_ce/loss", "text_ce", "cross-entropy at text positions, nats"),
    Metric("base_ce/noncoord_tokens", "text_ce", "text positions", take="count"),
    Metric("coord_softce_w1/soft_ce", "soft_ce", "soft cross-entropy at the training temperature, nats"),
    Metric("coord_softce_w1/w1", "w1", "Wasserstein-1 to the soft target, bins"),
    Metric("coord_softce_w1/gate", "gate", "-log mass of the coordinate slice, nats"),
    Metric("coord_softce_w1/coord_tokens", "soft_ce", "coordinate positions", take="count"),
    Metric("coord_softce_w1/coord_vocab_mass", "coord_mass", "probability of the coordinate slice at coordinate positions"),
    Metric("coord_softce_w1/p_gt_mean", "p_gt", "in-slice probability of the true bin"),
    Metric("coord_softce_w1/margin_mean", "margin", "best slice logit minus the true bin's"),
    Metric("coord_softce_w1/acc_top5", "coord_acc_top5", "true bin among the five best of the slice"),
    Metric("coord_expected_bin_mae", "expected_bin_mae", "|expectation - centre|, bins"),
    Metric("coord_dist/kl", "kl", "soft_ce minus the target's entropy, nats"),
    Metric("coord_dist/crps", "crps_tau1", "continuous ranked probability score, bins"),
    Metric("coord_dist/nll", "nll", "in-slice hard cross-entropy, nats"),
    Metric("coord_dist/entropy", "dist_entropy", "entropy of the slice, nats"),
    Metric("coord_dist/std", "dist_std", "standard deviation of the slice, bins"),
    Metric("coord_dist/tail_mass", "tail_mass", "probability more than 16 bins from the mode"),
    Metric("coord_dist/multimodal_frac", "multimodal", "share of distributions with several modes"),
    Metric("coord_dist/argmax_bin_mae", "argmax_bin_mae", "|argmax - centre|, bins"),
    Metric("coord_dist/median_bin_mae", "median_bin_mae", "|median - centre|, bins"),
    Metric("coord_dist/window_bin_mae", "window_bin_mae", "|windowed expectation - centre|, bins"),
    Metric("coord_dist/topk_bin_mae", "topk_bin_mae", "|top-10 mean - centre|, bins"),
    Metric("coord_dist/signed_bias", "signed_bias", "median - centre, bins"),
    Metric("token_acc", "correct", "full-vocabulary argmax is the label"),
    Metric("token_acc_top5", "correct_top5", "label among the five best of the vocabulary"),
    Metric("text_token_acc", "correct_text", "token_acc at text positions"),
    Metric("coord_token_acc", "correct_coord", "token_acc at coordinate positions"),
    Metric("desc_token_acc", "correct_desc", "token_acc at description tokens"),
    Metric("format_token_acc", "correct_format", "token_acc at format tokens"),
)


def with_roles(output: CoordLossOutput, token_roles: Tensor) -> LossSums:
    """The output's sums, and ``correct`` split by token role (``token_roles`` ``[B, T]``, aligned with the labels)."""
    roles = token_roles.reshape(-1).index_select(0, output.index)
    correct = output.diagnostics["correct"]
    groups = {name: roles == ROLE_CODES[name] for name in ("coord", "desc", "format")}
    groups["text"] = ~output.is_coord
    split = {f"correct_{name}": (correct[mask].sum(), mask.sum()) for name, mask in groups.items()}
    return LossSums({**output.sums.values, **LossSums.of(split).values})


def contributions(sums: LossSums, objective: CoordObjective) -> dict[str, float]:
    """``weight * sum / denominator`` of every term, by the objective's normalisation; a term without positions gives 0."""
    text, coord = float(sums.count("text_ce")), float(sums.count("soft_ce"))
    result = {}
    for name in TERMS:
        denominator = text + coord if objective.normalization == "token" else (text if name in TEXT_TERMS else coord)
        weight = objective.weight(name)
        result[name] = weight * float(sums.sum(name)) / denominator if weight and denominator else 0.0
    return result


def summarize(sums: LossSums, objective: CoordObjective) -> dict[str, float]:
    """All metrics of a window. ``loss`` is the sum of ``contrib/*``; a mean over nothing is NaN."""
    parts = contributions(sums, objective)
    values: Mapping[str, float] = {f"contrib/{name}": value for name, value in parts.items()}
    metrics = {
        "loss": sum(parts.values()),
        "coord_softce_w1/loss": sum(parts[name] for name in COORD_TERMS),
        **{m.key: float(sums.count(m.source) if m.take == "count" else sums.mean(m.source)) for m in METRICS},
    }
    return {**metrics, **values}
