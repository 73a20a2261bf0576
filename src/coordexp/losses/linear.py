"""``linear_coord_loss``: the objective on top of a linear head, whatever the implementation."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from coordexp.losses.diagnostics import derived
from coordexp.losses.objective import TEXT_TERMS, CoordObjective
from coordexp.losses.sums import LossSums, Normalizer
from coordexp.losses.targets import soft_target
from coordexp.losses.terms import CoordSlice

IGNORE: Final = -100

class UngatheredWeight(ValueError):
    """A weight of the head of which this process holds a part or nothing."""


# Buffer for one chunk of logits. More rows a chunk mean fewer passes over dW and better matrix products.
DEFAULT_BUDGET_MB: Final = {"cpu": 128, "cuda": 1280}


@dataclass(frozen=True)
class CoordLossOutput:
    """``loss`` 0-dim with a graph; ``sums`` detached; ``diagnostics`` per supervised position ``[S]``.

    ``index`` ``[S]``, on the host, are the positions in T, the ``num_coord`` coordinates first.
    Diagnostics that exist for coordinates only are NaN at text positions.
    """

    loss: Tensor
    sums: LossSums
    diagnostics: dict[str, Tensor]
    index: Tensor
    num_coord: int


@dataclass(frozen=True)
class HeadInputs:
    """Checked inputs of an implementation: supervised rows only, the ``num_coord`` coordinate rows first.

    ``hidden`` ``[S, D]``, ``labels`` ``[S]``; ``centers`` and ``extents`` ``[N]`` in float32 or wider; ``wide`` is that dtype.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    num_coord: int
    centers: Tensor
    extents: Tensor | None
    coord_weight: Tensor | None
    bias: Tensor | None
    coord_start: int
    num_bins: int
    objective: CoordObjective
    normalizer: Normalizer
    budget_mb: float
    top5: bool
    diagnostics: bool
    wide: torch.dtype

    @property
    def num_rows(self) -> int:
        """S, the number of supervised rows."""
        return self.labels.shape[0]

    @property
    def columns(self) -> slice:
        """Columns of the coordinate slice in the vocabulary."""
        return slice(self.coord_start, self.coord_start + self.num_bins)

    def coord_slice(self, logits: Tensor, rows: slice) -> CoordSlice:
        """View for the slice terms of coordinate rows ``rows`` with slice logits ``logits`` ``[n, K]``."""
        centers = self.centers[rows]
        extents = None if self.extents is None else self.extents[rows]
        q = soft_target(self.objective, centers, self.num_bins, extents)
        return CoordSlice.of(logits, self.labels[rows] - self.coord_start, centers, q, self.objective.temperature)


@dataclass(frozen=True)
class HeadResult:
    """``terms``: values per position, ``[S - N]`` for text terms, ``[N]`` otherwise. ``everywhere``: diagnostics
    ``[S]``; ``coord``: diagnostics ``[N]``. Only ``loss`` has a graph."""

    loss: Tensor
    terms: Mapping[str, Tensor]
    everywhere: Mapping[str, Tensor]
    coord: Mapping[str, Tensor]


Implementation = Callable[[HeadInputs], HeadResult]

# Loaded when first asked for: nothing imports triton on a machine that does not use it.
IMPLEMENTATIONS: Final = {
    "eager": "coordexp.losses.eager:eager",
    "chunked": "coordexp.losses.chunked:chunked",
    "triton": "coordexp.losses.triton.fused:fused",
}


def implementation(name: str, device: torch.device) -> Implementation:
    """The implementation of that name; ``auto`` is ``triton`` on a CUDA device that has it, else ``chunked``.

    Raises:
        ValueError: an unknown name, with the list.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") is not None else "chunked"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {name!r}: choose one of {', '.join(['auto', *sorted(IMPLEMENTATIONS)])}")
    module, function = IMPLEMENTATIONS[name].split(":")
    chosen: Implementation = vars(importlib.import_module(module))[function]
    return chosen


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
    logits_budget_mb: float | None = None,
    top5: bool = False,
    diagnostics: bool = True,
) -> CoordLossOutput:
    """Loss, sums and diagnostics of ``objective`` for logits ``hidden @ weight.T + bias``.

    ``hidden`` ``[T, D]``, ``weight`` ``[V, D]``, ``labels`` ``[T]`` already aligned with ``hidden`` (nothing is
    shifted here; -100 is ignored). Coordinates are the labels in ``[coord_start, coord_start + num_bins)``.
    ``centers`` ``[T]`` are real bin positions (None: ``label - coord_start``); ``extents`` ``[T]`` bins, required
    with ``objective.alpha``. ``normalizer`` holds the counts to divide by (None: this call's own).
    ``coord_weight`` ``[K, D]`` stands in for the coordinate rows of ``weight``.

    ``labels``, ``centers`` and ``extents`` are checked and sorted on the host: hand them over there and nothing waits
    for the device; on the device they are read back once, at the start. ``impl``: ``eager`` materialises ``[S, V]``
    logits and is the specification; ``chunked`` and ``triton`` need one buffer of ``logits_budget_mb``.
    Slice logits are float32 at least. ``top5`` adds ``correct_top5`` over the full vocabulary (one more look at
    the logits); without ``diagnostics`` only the terms, ``kl`` and the diagnostics of every position are made.

    Raises:
        ValueError: shapes that do not fit, labels out of range, a centre that is not finite or an extent that
            is negative at a coordinate label, either of them below float32, an empty or sharded weight (:class:`UngatheredWeight`), an
            unknown ``impl``.
    """
    run = implementation(impl, hidden.device)
    budget = DEFAULT_BUDGET_MB.get(hidden.device.type, 512) if logits_budget_mb is None else logits_budget_mb
    if not budget > 0:
        raise ValueError(f"logits_budget_mb must be positive, got {budget}")
    _check_shapes(hidden, weight, labels, coord_start, num_bins, centers, extents, coord_weight, bias)
    index, rows, num_coord = _supervised(labels, weight.shape[0], coord_start, num_bins)
    device, wide = hidden.device, torch.promote_types(hidden.dtype, torch.float32)
    coords = index[:num_coord]
    middle = _at(centers, coords, "centers") if centers is not None else rows[:num_coord] - coord_start
    size = None if extents is None else _at(extents, coords, "extents")
    if normalizer is None:
        counts = send(torch.tensor([len(rows) - num_coord, num_coord]), device)
        normalizer = Normalizer(text=counts[0], coord=counts[1])
    inputs = HeadInputs(
        hidden=hidden.index_select(0, send(index, device)), weight=weight, labels=send(rows, device), num_coord=num_coord,
        centers=send(middle, device).to(wide), extents=None if size is None else send(size, device).to(wide),
        coord_weight=coord_weight, bias=bias, coord_start=coord_start, num_bins=num_bins, objective=objective,
        normalizer=normalizer, budget_mb=budget, top5=top5, diagnostics=diagnostics, wide=wide,
    )  # fmt: skip
    return _output(run(inputs), inputs, index)


def _supervised(labels: Tensor, vocabulary: int, coord_start: int, num_bins: int) -> tuple[Tensor, Tensor, int]:
    """Positions and labels of the supervised rows, coordinates first, on the host; and how many are coordinates."""
    host = labels.detach().to("cpu")
    index = torch.nonzero(host != IGNORE).squeeze(-1)
    rows = host[index]
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= vocabulary):
        raise ValueError(f"labels must lie in [0, {vocabulary}) or be {IGNORE}, got {int(rows.min())}..{int(rows.max())}")
    coord = (rows >= coord_start) & (rows < coord_start + num_bins)
    order = torch.cat([torch.nonzero(coord).squeeze(-1), torch.nonzero(~coord).squeeze(-1)])
    return index[order], rows[order], int(coord.sum())


def _at(values: Tensor, coords: Tensor, name: str) -> Tensor:
    """Values at the coordinate positions, on the host, checked."""
    kept = values.detach().to("cpu")[coords]
    if not bool(torch.isfinite(kept).all()):
        raise ValueError(f"{name} must be finite at every coordinate label, got NaN or infinity")
    if name == "extents" and bool((kept < 0).any()):
        raise ValueError(f"extents must be 0 or more bins at every coordinate label, got {float(kept.min())}")
    return kept


def send(value: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _output(result: HeadResult, x: HeadInputs, index: Tensor) -> CoordLossOutput:
    """Sums in float64 and diagnostics padded to all supervised rows."""
    coord = derived(dict(result.coord), x.centers)
    kl = result.terms["kl"]
    counted = {**result.terms, **coord, **result.everywhere, "coord_mass": result.everywhere["mass"][: x.num_coord]}
    totals = torch.stack([value.detach().sum(dtype=torch.float64) for value in counted.values()])
    counts = send(torch.tensor([value.numel() for value in counted.values()], dtype=torch.float64), totals.device)
    sums = LossSums.joined(tuple(counted), totals, counts)
    padding = torch.full((x.num_rows - x.num_coord,), torch.nan, dtype=x.wide, device=totals.device)
    diagnostics = {name: torch.cat([value, padding]) for name, value in {**coord, "kl": kl.detach()}.items()}
    return CoordLossOutput(result.loss, sums, {**diagnostics, **result.everywhere}, index, x.num_coord)


def term_scales(objective: CoordObjective, normalizer: Normalizer) -> dict[str, Tensor]:
    """``weight / denominator`` of every active term, 0-dim float64: the one place where weights meet terms.

    An empty denominator (no such position anywhere in the step) divides by one: its sum is zero.
    """
    scales = {}
    for name in objective.active:
        if objective.normalization == "token":
            denominator = normalizer.text + normalizer.coord
        else:
            denominator = normalizer.text if name in TEXT_TERMS else normalizer.coord
        scales[name] = objective.weight(name) / denominator.double().clamp_min(1.0)
    return scales


def combine(values: Mapping[str, Tensor], scales: Mapping[str, Tensor], x: HeadInputs) -> Tensor:
    """``sum over active terms of scale * sum(l)``, added up in float64."""
    total = torch.zeros((), device=x.hidden.device, dtype=torch.float64)
    for name, scale in scales.items():
        total = total + scale * values[name].sum(dtype=torch.float64)
    return total.to(x.wide)


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
    # First, because an ungathered weight of ZeRO-3 has one dimension and no element.
    for name, value in (("weight", weight), ("coord_weight", coord_weight)):
        if value is not None and value.numel() == 0:
            raise UngatheredWeight(f"{name} is empty ({list(value.shape)}): under ZeRO-3, gather it before the loss")
        if type(value).__module__.startswith("torch.distributed"):
            raise UngatheredWeight(f"{name} is sharded ({type(value).__name__}): run the loss inside the wrapped forward")
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(f"expected hidden [T, D] and weight [V, D], got {list(hidden.shape)} and {list(weight.shape)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has width {hidden.shape[1]}, weight has {weight.shape[1]}")
    if coord_start < 0 or num_bins < 2 or coord_start + num_bins > weight.shape[0] or num_bins == weight.shape[0]:
        raise ValueError(f"coordinate rows [{coord_start}, {coord_start + num_bins}) do not fit a vocabulary of {weight.shape[0]}")
    for name, value in (("labels", labels), ("centers", centers), ("extents", extents)):
        if value is not None and tuple(value.shape) != (hidden.shape[0],):
            raise ValueError(f"{name} must have shape [{hidden.shape[0]}] like hidden, got {list(value.shape)}")
    for name, value in (("centers", centers), ("extents", extents)):
        if value is not None and value.is_floating_point() and value.dtype.itemsize < 4:
            raise ValueError(f"{name} must be float32 or float64, got {value.dtype}: keep mixed precision from casting it")
    if coord_weight is not None and tuple(coord_weight.shape) != (num_bins, hidden.shape[1]):
        raise ValueError(f"coord_weight must have shape [{num_bins}, {hidden.shape[1]}], got {list(coord_weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
