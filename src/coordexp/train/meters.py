"""From the loss's output to named sums, and from sums to the metrics of the registry; the same in training and evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coordexp.data.targets import Targets
from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import CoordLossOutput, send
from coordexp.losses.objective import COORD_TERMS, TERMS, TEXT_TERMS, CoordObjective
from coordexp.losses.sums import LossSums
from coordexp.train.options import TokenTypeMetrics
from coordexp.train.registry import HEADLINES, HISTOGRAMS, ROLES, SIZES, SLOTS, Histogram, shown


def step_sums(output: CoordLossOutput, targets: Targets, options: TokenTypeMetrics) -> LossSums:
    """The output's sums and the number of samples; by default also sums by token role, slot and size, and the histograms.

    Which position is what is known on the host: all groups are sent to the device as one table.
    """
    device = output.loss.device
    one = torch.ones(1, dtype=torch.float64, device=device)
    sums = output.sums.beside(LossSums.joined(("samples",), one * len(targets.image_ids), one))
    if not options.enabled:
        return sums
    n, index, d = output.num_coord, output.index, output.diagnostics
    roles = targets.roles.flatten()[index]
    coord = torch.arange(len(index)) < n
    groups = {role: roles == ROLE_CODES[role] for role in ROLES} | {"coord": coord, "text": ~coord}
    columns: dict[str, Tensor] = {"noncoord_argmax": 1.0 - d["argmax_is_coord"]}
    columns |= {name: d[name] for name in ("correct", "argmax_is_coord", *(["correct_top5"] if options.log_top5 else []))}
    sums = sums.beside(_split(columns, groups)).beside(_shares(groups, device))
    if options.coord_monitor_mass:
        kept = coord | _strided(groups["text"], options.coord_monitor_mass_max_tokens)
        sums = sums.beside(_split({"mass": d["mass"]}, {name: group & kept for name, group in groups.items()}))
    slots, extents = targets.slots.flatten()[index[:n]], targets.extents.flatten()[index[:n]]
    parts = {slot: slots == number for number, slot in enumerate(SLOTS)}
    parts |= {size: (extents > low) & (extents <= high) if low else extents <= high for size, (low, high) in SIZES.items()}
    sums = sums.beside(_split({source: d[source][:n] for _, source, _ in HEADLINES}, parts))
    empty = torch.zeros(0, dtype=torch.float64, device=device)
    return sums.beside(LossSums.joined((), empty, empty, {name: _histogram(d[h.source][:n], h) for name, h in HISTOGRAMS.items()}))


def _split(columns: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> LossSums:
    """``column@group`` of all columns ``[n]`` over all groups (masks ``[n]`` on the host).

    Chosen, not multiplied by 0 and 1: a NaN stays in its own groups.
    """
    masks = torch.stack(list(groups.values()))
    values = torch.stack([*columns.values()], dim=1).double()
    sums = torch.where(send(masks, values.device)[:, :, None], values, 0.0).sum(dim=1)
    counts = send(masks.sum(dim=1), values.device)[:, None].expand_as(sums)
    return LossSums.joined([f"{c}@{g}" for g in groups for c in columns], sums.flatten(), counts.flatten())


def _shares(groups: Mapping[str, Tensor], device: torch.device) -> LossSums:
    """``share@role``: the positions of each role, of all."""
    counts = send(torch.tensor([[int(groups[role].sum()) for role in ROLES], [len(groups["text"])] * len(ROLES)]), device)
    return LossSums.joined([f"share@{role}" for role in ROLES], counts[0], counts[1])


def _strided(mask: Tensor, most: int | None) -> Tensor:
    """At most ``most`` of the positions in ``mask``, evenly spaced."""
    if most is None:
        return mask
    stride = (mask.sum() + most - 1).div(most, rounding_mode="floor").clamp_min(1)
    return mask & ((mask.cumsum(0) - 1) % stride == 0)


def _histogram(values: Tensor, h: Histogram) -> Tensor:
    """Counts per bin ``[bins]``; a value that is no number has no bin and makes the first count NaN, so that nothing is read from them."""
    known = values == values
    place = ((values.double() - h.low) * (h.bins / (h.high - h.low))).floor().clamp(0, h.bins - 1)
    place = torch.where(known, place, 0.0).long()
    one = torch.where(known, 1.0, torch.nan).double()
    return torch.zeros(h.bins, dtype=torch.float64, device=values.device).index_add(0, place, one)


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
