"""From the loss's output to named sums, and from sums to the metrics of the registry; the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import CoordLossOutput
from coordexp.losses.objective import COORD_TERMS, TERMS, TEXT_TERMS, CoordObjective
from coordexp.losses.sums import LossSums
from coordexp.train.options import TokenTypeMetrics
from coordexp.train.registry import HEADLINES, HISTOGRAMS, ROLES, SIZES, SLOTS, Histogram, shown


def step_sums(output: CoordLossOutput, batch: Mapping[str, Any], options: TokenTypeMetrics) -> LossSums:
    """The output's sums, split by token role, slot and size, and the histograms.

    ``batch`` holds ``token_roles``, ``coord_slots`` and ``coord_extents`` ``[B, T]``, aligned with the labels.
    """
    if not options.enabled:
        return output.sums
    index = output.index
    roles = batch["token_roles"].reshape(-1).index_select(0, index)
    groups = {role: roles == ROLE_CODES[role] for role in ROLES}
    groups["coord"] = output.is_coord
    groups["text"] = ~output.is_coord
    d = output.diagnostics
    columns: dict[str, Tensor] = {"noncoord_argmax": 1.0 - d["argmax_is_coord"]}
    columns |= {name: d[name] for name in ("correct", "argmax_is_coord", *(["correct_top5"] if options.log_top5 else []))}
    values = _split(columns, groups)
    total = torch.full((), float(len(index)), dtype=torch.float64, device=index.device)
    values |= {f"share@{role}": (values[f"correct@{role}"][1], total) for role in ROLES}
    if options.coord_monitor_mass:
        kept = _strided(groups["text"], options.coord_monitor_mass_max_tokens)
        masked = {name: group & (kept | output.is_coord) for name, group in groups.items()}
        values |= _split({"mass": d["mass"]}, masked)
    n = output.num_coord
    slots = batch["coord_slots"].reshape(-1).index_select(0, index[:n])
    extents = batch["coord_extents"].reshape(-1).index_select(0, index[:n])
    parts = {slot: slots == number for number, slot in enumerate(SLOTS)}
    parts |= {size: (extents > low) & (extents <= high) if low else extents <= high for size, (low, high) in SIZES.items()}
    values |= _split({source: d[source][:n] for _, source, _ in HEADLINES}, parts)
    histograms = {name: _histogram(d[h.source][:n], h) for name, h in HISTOGRAMS.items()}
    return LossSums({**output.sums.values, **values}, histograms)


def _split(columns: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``{column@group: (sum, count)}`` of all columns ``[n]`` over all groups (masks ``[n]``) by one product in float64."""
    masks = torch.stack(list(groups.values())).double()
    table = masks @ torch.stack([*columns.values()], dim=1).double()
    counts = masks.sum(dim=1)
    return {f"{c}@{g}": (table[i, j], counts[i]) for i, g in enumerate(groups) for j, c in enumerate(columns)}


def _strided(mask: Tensor, most: int | None) -> Tensor:
    """At most ``most`` of the positions in ``mask``, evenly spaced."""
    if most is None:
        return mask
    stride = (mask.sum() + most - 1).div(most, rounding_mode="floor").clamp_min(1)
    return mask & ((mask.cumsum(0) - 1) % stride == 0)


def _histogram(values: Tensor, h: Histogram) -> Tensor:
    place = ((values.double() - h.low) * (h.bins / (h.high - h.low))).floor().clamp(0, h.bins - 1).long()
    return torch.zeros(h.bins, dtype=torch.float64, device=values.device).index_add(0, place, torch.ones_like(place, dtype=torch.float64))


def quantile(counts: Tensor, h: Histogram, level: float) -> float:
    """Quantile of a histogram, linear inside its bin; NaN where nothing was counted."""
    total = counts.cumsum(0)
    if not total[-1]:
        return float("nan")
    target = level * total[-1]
    k = int((total < target).sum())
    inside = float((target - (total[k] - counts[k])) / counts[k])
    return h.low + (k + inside) * (h.high - h.low) / h.bins


def ks_uniform(counts: Tensor) -> float:
    """Largest distance of the histogram's cumulative share from the diagonal, at the edges of its bins."""
    total = counts.sum()
    if not total:
        return float("nan")
    diagonal = torch.arange(1, len(counts) + 1, dtype=torch.float64, device=counts.device) / len(counts)
    return float((counts.cumsum(0) / total - diagonal).abs().max())


def contributions(sums: LossSums, objective: CoordObjective) -> dict[str, float]:
    """``weight * sum / denominator`` of every term, by the objective's normalisation; a term without positions gives 0."""
    text, coord = float(sums.count("text_ce")), float(sums.count("soft_ce"))
    result = {}
    for name in TERMS:
        denominator = text + coord if objective.normalization == "token" else (text if name in TEXT_TERMS else coord)
        weight = objective.weight(name)
        result[name] = weight * float(sums.sum(name)) / denominator if weight and denominator else 0.0
    return result


def summarize(sums: LossSums, objective: CoordObjective, options: TokenTypeMetrics) -> dict[str, float]:
    """All metrics of a window, every key of the registry that ``options`` shows. A mean over nothing is NaN."""
    parts = contributions(sums, objective)
    metrics = {"loss": sum(parts.values()), "coord_softce_w1/loss": sum(parts[name] for name in COORD_TERMS)}
    for m in shown(options):
        if m.take == "p90":
            metrics[m.key] = quantile(sums.histograms[m.source], HISTOGRAMS[m.source], 0.9)
        elif m.take == "ks":
            metrics[m.key] = ks_uniform(sums.histograms[m.source])
        else:
            metrics[m.key] = float(sums.count(m.source) if m.take == "count" else sums.mean(m.source))
    return metrics | {f"contrib/{name}": value for name, value in parts.items()}
