"""The registry of training metrics: what every key means, where it is taken, and how it is reduced. Imports no torch.

``docs/metrics.md`` is written from it: ``python -m coordexp.train.registry docs/metrics.md``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from coordexp.losses.objective import COORD_TERMS, TERMS
from coordexp.train.options import TokenTypeMetrics

Take = Literal["mean", "count", "p90", "ks"]
Knob = Literal["", "enabled", "log_top5", "coord_monitor_mass"]

ROLES: Final = ("coord", "desc", "format")
SLOTS: Final = ("x1", "y1", "x2", "y2")
# Size of the object along the coordinate's axis, in bins.
SIZES: Final = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, math.inf)}


@dataclass(frozen=True)
class Histogram:
    """Fixed bins: ``bins`` equal ones from ``low`` to ``high``; values outside count in the outermost."""

    source: str
    low: float
    high: float
    bins: int
    definition: str


# p90 and the KS distance are read from these; half a bin is their resolution.
HISTOGRAMS: Final = {
    "pit": Histogram("pit", 0.0, 1.0, 100, "probability integral transform at the true centre; flat when calibrated"),
    "abs_err": Histogram("median_bin_mae", 0.0, 1000.0, 2000, "absolute error of the median, bins"),
    "entropy": Histogram("dist_entropy", 0.0, 7.0, 70, "entropy of the slice distribution, nats"),
}


@dataclass(frozen=True)
class Metric:
    """``source`` names a (sum, count) pair or, for ``p90`` and ``ks``, a histogram; ``mean`` is their ratio.

    ``better``: ``lower``, ``higher``, or empty where neither is. ``knob``: the option of ``token_type_metrics`` that shows it.
    """

    key: str
    source: str
    positions: str
    definition: str
    unit: str = ""
    better: str = ""
    take: Take = "mean"
    knob: Knob = "enabled"


def _base() -> Iterator[Metric]:
    yield Metric("base_ce/loss", "text_ce", "text", "cross-entropy over the full vocabulary", "nats", "lower", knob="")
    yield Metric("base_ce/noncoord_tokens", "text_ce", "text", "their number", "positions", take="count", knob="")
    group = "coord_softce_w1"
    yield Metric(f"{group}/soft_ce", "soft_ce", "coord", "soft cross-entropy to the target, training temperature", "nats", "lower", knob="")
    yield Metric(f"{group}/w1", "w1", "coord", "Wasserstein-1 to the target, training temperature", "bins", "lower", knob="")
    yield Metric(f"{group}/gate", "gate", "coord", "-log mass of the slice, training temperature", "nats", "lower", knob="")
    yield Metric(f"{group}/coord_tokens", "soft_ce", "coord", "their number", "positions", take="count", knob="")
    yield Metric("coord_dist/kl", "kl", "coord", "`soft_ce` minus the target's entropy: floor 0 for any sigma", "nats", "lower", knob="")


def _slice() -> Iterator[Metric]:
    group = "coord_softce_w1"
    yield Metric(f"{group}/coord_vocab_mass", "coord_mass", "coord", "probability of the coordinate slice", "", "higher")
    yield Metric(f"{group}/p_gt_mean", "p_gt", "coord", "in-slice probability of the true bin", "", "higher")
    yield Metric(f"{group}/margin_mean", "margin", "coord", "best slice logit minus the true bin's", "logits", "lower")
    yield Metric(f"{group}/acc_top5", "coord_acc_top5", "coord", "true bin among the five best of the slice", "", "higher")
    yield Metric("coord_expected_bin_mae", "expected_bin_mae", "coord", "abs(expectation - centre)", "bins", "lower")
    d = "coord_dist"
    yield Metric(f"{d}/crps", "crps_tau1", "coord", "continuous ranked probability score against the centre", "bins", "lower")
    yield Metric(f"{d}/nll", "nll", "coord", "hard cross-entropy inside the slice", "nats", "lower")
    yield Metric(f"{d}/entropy", "dist_entropy", "coord", "entropy of the slice", "nats")
    yield Metric(f"{d}/std", "dist_std", "coord", "standard deviation of the slice", "bins")
    yield Metric(f"{d}/modes", "modes", "coord", "peaks over 10 % of the highest, more than 3 bins apart", "", "lower")
    yield Metric(f"{d}/multimodal_frac", "multimodal", "coord", "share with several peaks", "", "lower")
    yield Metric(f"{d}/tail_mass", "tail_mass", "coord", "probability more than 16 bins from the mode", "", "lower")
    yield Metric(f"{d}/p_gt_ceiling", "p_gt_ceiling", "coord", "what the target gives the true bin: the most that `p_gt_mean` should reach")
    for name, text in (
        ("argmax", "argmax"),
        ("median", "median"),
        ("window", "expectation within 16 bins of the mode"),
        ("topk", "top-10 mean"),
    ):
        yield Metric(f"{d}/{name}_bin_mae", f"{name}_bin_mae", "coord", f"abs({text} - centre)", "bins", "lower")
    yield Metric(f"{d}/abs_err_p90", "abs_err", "coord", "90th percentile of abs(median - centre)", "bins", "lower", take="p90")
    yield Metric(f"{d}/signed_bias", "signed_bias", "coord", "median - centre", "bins")
    for level in (50, 80, 95):
        yield Metric(f"{d}/coverage_{level}", f"coverage_{level}", "coord", f"share of centres in the central {level} % interval")
    yield Metric(f"{d}/pit_ks", "pit", "coord", "Kolmogorov-Smirnov distance of the PIT to uniform", "", "lower", take="ks")
    for part in (*SLOTS, *SIZES):
        where = f"coord, slot {part}" if part in SLOTS else f"coord, extent {SIZES[part][0]:g} to {SIZES[part][1]:g} bins"
        for name, source, unit in HEADLINES:
            yield Metric(f"{d}/{name}_{part}", f"{source}@{part}", where, f"`{d}/{name}` there", unit, "lower")


# Metrics that are also split by slot and by size.
HEADLINES: Final = (("crps", "crps_tau1", "bins"), ("nll", "nll", "nats"), ("median_bin_mae", "median_bin_mae", "bins"))


def _tokens() -> Iterator[Metric]:
    yield Metric("token_acc", "correct", "all", "the label is the argmax over the full vocabulary", "", "higher")
    yield Metric("text_token_acc", "correct@text", "text", "`token_acc` there", "", "higher")
    yield Metric(
        "token_acc_top5", "correct_top5", "all", "the label is among the five best of the full vocabulary", "", "higher", knob="log_top5"
    )
    for role in ROLES:
        yield Metric(f"{role}_token_acc", f"correct@{role}", role, "`token_acc` there", "", "higher")
        yield Metric(f"{role}_token_acc_top5", f"correct_top5@{role}", role, "`token_acc_top5` there", "", "higher", knob="log_top5")
        yield Metric(f"{role}_token_frac", f"share@{role}", "all", f"share of {role} tokens")
    monitor = "coord_monitor"
    yield Metric(f"{monitor}/flip_coord_to_noncoord", "noncoord_argmax@coord", "coord", "the argmax lies outside the slice", "", "lower")
    for role in ("text", "desc", "format"):
        yield Metric(f"{monitor}/flip_{role}_to_coord", f"argmax_is_coord@{role}", role, "the argmax lies in the slice", "", "lower")
    for role in ("coord", "text", "desc", "format"):
        better = "higher" if role == "coord" else "lower"
        key = f"{monitor}/coord_vocab_mass_at_gt_{role}"
        yield Metric(key, f"mass@{role}", role, "probability of the slice", "", better, knob="coord_monitor_mass")
    key = f"{monitor}/mass_tokens"
    yield Metric(key, "mass@text", "text", "positions used for the mass at text", "positions", take="count", knob="coord_monitor_mass")


METRICS: Final[tuple[Metric, ...]] = (*_base(), *_slice(), *_tokens())


def shown(options: TokenTypeMetrics) -> tuple[Metric, ...]:
    """Metrics of the registry that these options log."""
    on = {"": True, "enabled": options.enabled}
    on |= {knob: options.enabled and vars(options)[knob] for knob in ("log_top5", "coord_monitor_mass")}
    return tuple(m for m in METRICS if on[m.knob])


def keys(options: TokenTypeMetrics) -> tuple[str, ...]:
    """All training keys, contributions included; evaluation has the same with ``eval_`` in front."""
    return ("loss", "coord_softce_w1/loss", *(m.key for m in shown(options)), *(f"contrib/{name}" for name in TERMS))


def markdown() -> str:
    """The tables of docs/metrics.md."""
    terms = ", ".join(f"`contrib/{name}`" for name in TERMS)
    lines = [
        "| key | positions | definition | unit | better | reducer | shown with |",
        "|---|---|---|---|---|---|---|",
        "| `loss` | all | sum of all contributions | nats | lower | | always |",
        f"| {terms} | | weight x sum / denominator of the normalisation | | | | always |",
        f"| `coord_softce_w1/loss` | coord | sum of the contributions of {', '.join(COORD_TERMS)}; weighted | | | | always |",
    ]
    reducers = {"mean": "sum / count", "count": "count", "p90": "histogram", "ks": "histogram"}
    for m in METRICS:
        knob = f"`{m.knob}`" if m.knob else "always"
        lines.append(f"| `{m.key}` | {m.positions} | {m.definition} | {m.unit} | {m.better} | {reducers[m.take]} | {knob} |")
    lines += ["", "Histograms (`histograms.jsonl`, TensorBoard), at coordinate positions:", "", "| name | what | bins |", "|---|---|---|"]
    lines += [f"| `{name}` | {h.definition} | {h.bins} from {h.low:g} to {h.high:g} |" for name, h in HISTOGRAMS.items()]
    return "\n".join(lines) + "\n"


BEGIN: Final = "<!-- written by python -m coordexp.train.registry docs/metrics.md -->\n"
END: Final = "<!-- end -->\n"


def written_into(page: str) -> str:
    """``page`` with the registry's tables between its two marks."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + markdown() + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
