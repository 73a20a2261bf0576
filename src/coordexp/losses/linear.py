"""``linear_coord_loss``: the objective on top of a linear head, whatever the implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import LossSums, Normalizer

IGNORE: Final = -100


@dataclass(frozen=True)
class CoordLossOutput:
    """``loss`` 0-dim with a graph; ``sums`` detached; ``diagnostics`` per supervised position ``[S]``.

    ``index`` ``[S]`` are the positions in T; ``is_coord`` ``[S]`` says which are coordinates. Diagnostics
    that exist for coordinates only are NaN at text positions.
    """

    loss: Tensor
    sums: LossSums
    diagnostics: dict[str, Tensor]
    index: Tensor
    is_coord: Tensor


@dataclass(frozen=True)
class HeadInputs:
    """Checked inputs of an implementation, supervised rows only: ``hidden`` ``[S, D]``, ``labels`` ``[S]``,
    ``centers`` and ``extents`` ``[S]`` in float32 or wider (NaN at text positions)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    is_coord: Tensor
    centers: Tensor
    extents: Tensor | None
    coord_weight: Tensor | None
    bias: Tensor | None
    coord_start: int
    num_bins: int
    objective: CoordObjective
    normalizer: Normalizer | None


Implementation = Callable[[HeadInputs], tuple[Tensor, LossSums, dict[str, Tensor]]]


def implementations() -> dict[str, Implementation]:
    """Implementations by name. ``auto`` is the fastest one that this build has for the device."""
    from coordexp.losses.eager import eager

    return {"eager": eager, "auto": eager}


def linear_coord_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    coord_start: int,
    num_bins: int,
    objective: CoordObjective,
    centers: Tensor | None = None,
    extents: Tensor | None = None,
    normalizer: Normalizer | None = None,
    coord_weight: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
    logits_budget_mb: int = 256,
) -> CoordLossOutput:
    """Loss, sums and diagnostics of ``objective`` for logits ``hidden @ weight.T + bias``.

    ``hidden`` ``[T, D]``, ``weight`` ``[V, D]``, ``labels`` ``[T]`` already aligned with ``hidden`` (nothing is
    shifted here; -100 is ignored). Coordinates are the labels in ``[coord_start, coord_start + num_bins)``.
    ``centers`` ``[T]`` are real bin positions (None: ``label - coord_start``); ``extents`` ``[T]`` bins, required
    with ``objective.alpha``. ``normalizer`` holds the counts to divide by (None: this call's own).
    ``coord_weight`` ``[K, D]`` stands in for the coordinate rows of ``weight``.

    ``logits_budget_mb`` bounds the logits buffer of the chunked implementations; ``eager`` materialises
    ``[S, V]`` and is the specification. Slice logits are float32 at least.

    Raises:
        ValueError: shapes that do not fit, labels out of range, a centre that is not finite at a
            coordinate label, an empty weight, an unknown ``impl``.
    """
    table = implementations()
    if impl not in table:
        raise ValueError(f"unknown impl {impl!r}: choose one of {', '.join(sorted(table))}")
    if logits_budget_mb < 1:
        raise ValueError(f"logits_budget_mb must be at least 1, got {logits_budget_mb}")
    _check_shapes(hidden, weight, labels, coord_start, num_bins, centers, extents, coord_weight, bias)
    index = torch.nonzero(labels != IGNORE).squeeze(-1)
    rows = labels.index_select(0, index)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= weight.shape[0]):
        raise ValueError(f"labels must lie in [0, {weight.shape[0]}) or be {IGNORE}, got {int(rows.min())}..{int(rows.max())}")
    is_coord = (rows >= coord_start) & (rows < coord_start + num_bins)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    middle = (rows - coord_start).to(wide) if centers is None else centers.index_select(0, index).to(wide)
    if not bool(torch.isfinite(middle[is_coord]).all()):
        raise ValueError("centers must be finite at every coordinate label, got NaN or infinity")
    inputs = HeadInputs(
        hidden=hidden.index_select(0, index),
        weight=weight,
        labels=rows,
        is_coord=is_coord,
        centers=middle,
        extents=None if extents is None else extents.index_select(0, index).to(wide),
        coord_weight=coord_weight,
        bias=bias,
        coord_start=coord_start,
        num_bins=num_bins,
        objective=objective,
        normalizer=normalizer,
    )
    loss, sums, diagnostics = table[impl](inputs)
    return CoordLossOutput(loss=loss, sums=sums, diagnostics=diagnostics, index=index, is_coord=is_coord)


def _check_shapes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    coord_start: int,
    num_bins: int,
    centers: Tensor | None,
    extents: Tensor | None,
    coord_weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"expected hidden [T, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight is empty ({list(weight.shape)}): under ZeRO-3, gather it before the loss")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has width {hidden.shape[1]}, weight has {weight.shape[1]}")
    if coord_start < 0 or num_bins < 2 or coord_start + num_bins > weight.shape[0]:
        raise ValueError(f"coordinate rows [{coord_start}, {coord_start + num_bins}) do not fit a vocabulary of {weight.shape[0]}")
    for name, value in (("labels", labels), ("centers", centers), ("extents", extents)):
        if value is not None and tuple(value.shape) != (hidden.shape[0],):
            raise ValueError(f"{name} must have shape [{hidden.shape[0]}] like hidden, got {list(value.shape)}")
    if coord_weight is not None and tuple(coord_weight.shape) != (num_bins, hidden.shape[1]):
        raise ValueError(f"coord_weight must have shape [{num_bins}, {hidden.shape[1]}], got {list(coord_weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")


def combine(term_sums: dict[str, tuple[Tensor, Tensor]], objective: CoordObjective, normalizer: Normalizer) -> Tensor:
    """``sum over active terms of weight * sum / denominator``: the one place where weights meet terms.

    An empty denominator (no such position anywhere in the step) contributes zero: its sum is zero too.
    """
    from coordexp.losses.objective import TEXT_TERMS

    total = torch.zeros((), device=normalizer.text.device, dtype=torch.float32)
    for name in objective.active:
        value = term_sums[name][0]
        if objective.normalization == "token":
            denominator = normalizer.text + normalizer.coord
        else:
            denominator = normalizer.text if name in TEXT_TERMS else normalizer.coord
        total = total + objective.weight(name) * value / denominator.to(value.dtype).clamp_min(1.0)
    return total
