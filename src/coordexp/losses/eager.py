"""The eager implementation: full logits, autograd. It is the specification the fast ones are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from coordexp import distribution
from coordexp.losses import targets, terms
from coordexp.losses.linear import HeadInputs, combine
from coordexp.losses.sums import LossSums, Normalizer


def eager(x: HeadInputs) -> tuple[Tensor, LossSums, dict[str, Tensor]]:
    """Loss, sums and per-position diagnostics from materialised ``[S, V]`` logits; float64-capable."""
    wide = torch.promote_types(x.hidden.dtype, torch.float32)
    with torch.autocast(x.hidden.device.type, enabled=False):
        logits = _logits(x, wide)
        stop = x.coord_start + x.num_bins
        text, coord = logits[~x.is_coord], logits[x.is_coord]
        slice_logits = coord[:, x.coord_start : stop]
        per_position = _text_terms(text, x) | _coord_terms(coord, slice_logits, x)
        counts = {name: (~x.is_coord).sum() if name.startswith("text") else x.is_coord.sum() for name in per_position}
        term_sums = {name: (value.sum(), counts[name]) for name, value in per_position.items()}
        normalizer = x.normalizer or Normalizer(text=(~x.is_coord).sum(), coord=x.is_coord.sum())
        # Adding 0 * sum keeps the graph (and every collective) alive where nothing is supervised.
        loss = combine(term_sums, x.objective, normalizer) + 0.0 * logits.sum() + 0.0 * x.weight[:1].sum()
        with torch.no_grad():
            diagnostics = _diagnostics(logits.detach(), slice_logits.detach(), {k: v.detach() for k, v in per_position.items()}, x)
            sums = dict(term_sums)
            for name, value in diagnostics.items():
                kept = value if name in EVERY_POSITION else value[x.is_coord]
                sums[name] = (kept.sum(), torch.full((), kept.numel(), device=value.device))
    return loss, LossSums.of(sums), diagnostics


# Diagnostics of every supervised position; the others exist at coordinates only.
EVERY_POSITION = frozenset({"correct", "correct_top5"})


def _logits(x: HeadInputs, wide: torch.dtype) -> Tensor:
    weight = x.weight
    if x.coord_weight is not None:
        stop = x.coord_start + x.num_bins
        weight = torch.cat([weight[: x.coord_start], x.coord_weight.to(weight.dtype), weight[stop:]])
    logits = x.hidden.to(wide) @ weight.to(wide).T
    return logits if x.bias is None else logits + x.bias.to(wide)


def _split_lse(logits: Tensor, x: HeadInputs) -> tuple[Tensor, Tensor]:
    """``(L_C, L_R)``: logsumexp over the coordinate slice and over the rest."""
    stop = x.coord_start + x.num_bins
    rest = torch.cat([logits[:, : x.coord_start], logits[:, stop:]], dim=-1)
    return torch.logsumexp(logits[:, x.coord_start : stop], dim=-1), torch.logsumexp(rest, dim=-1)


def _text_terms(text: Tensor, x: HeadInputs) -> dict[str, Tensor]:
    lse_coord, lse_rest = _split_lse(text, x)
    label_logit = text.gather(-1, x.labels[~x.is_coord][:, None]).squeeze(-1)
    return {
        "text_ce": terms.text_ce(torch.logaddexp(lse_coord, lse_rest), label_logit),
        "text_gate": terms.text_gate(lse_coord, lse_rest),
    }


def _coord_terms(coord: Tensor, slice_logits: Tensor, x: HeadInputs) -> dict[str, Tensor]:
    bins = x.labels[x.is_coord] - x.coord_start
    centers = x.centers[x.is_coord].to(coord.dtype)
    extents = None if x.extents is None else x.extents[x.is_coord].to(coord.dtype)
    tau = x.objective.temperature
    q = targets.soft_target(x.objective, centers, x.num_bins, extents)
    log_p = torch.log_softmax(slice_logits / tau, dim=-1)
    p = log_p.exp()
    lse_coord, lse_rest = _split_lse(coord / tau, x)
    soft = terms.soft_ce(log_p, q)
    return {
        "ce": terms.ce(slice_logits, bins),
        "soft_ce": soft,
        "kl": soft - terms.target_entropy(q),
        "w1": terms.w1(p, q),
        "crps": terms.crps(p, centers),
        "gate": terms.gate(lse_coord, lse_rest),
        "entropy": terms.entropy(log_p),
        "variance": terms.variance(p),
    }


def _diagnostics(logits: Tensor, slice_logits: Tensor, per_position: dict[str, Tensor], x: HeadInputs) -> dict[str, Tensor]:
    """Per position ``[S]``, at tau = 1 except ``kl``; NaN at text positions for those of coordinates only."""
    bins = x.labels[x.is_coord] - x.coord_start
    centers = x.centers[x.is_coord].to(slice_logits.dtype)
    p = torch.softmax(slice_logits, dim=-1)
    true_logit = slice_logits.gather(-1, bins[:, None]).squeeze(-1)
    lse_coord, lse_rest = _split_lse(logits, x)
    label_logit = logits.gather(-1, x.labels[:, None]).squeeze(-1)
    coord_values = {
        "nll": per_position["ce"],
        "p_gt": p.gather(-1, bins[:, None]).squeeze(-1),
        "margin": slice_logits.amax(-1) - true_logit,
        "coord_acc_top5": ((slice_logits > true_logit[:, None]).sum(-1) < 5).to(p.dtype),
        "expected_bin_mae": (distribution.expectation(p) - centers).abs(),
        "argmax_bin_mae": (distribution.argmax(p) - centers).abs(),
        "median_bin_mae": (distribution.median(p) - centers).abs(),
        "window_bin_mae": (distribution.window(p) - centers).abs(),
        "topk_bin_mae": (distribution.topk_mean(p) - centers).abs(),
        "signed_bias": distribution.median(p) - centers,
        "dist_entropy": distribution.entropy(p),
        "dist_std": distribution.std(p),
        "tail_mass": distribution.tail_mass(p),
        "multimodal": (distribution.modes(p) > 1).to(p.dtype),
        "crps_tau1": terms.crps(p, centers),
    }
    result = {name: _scatter(value, x.is_coord) for name, value in coord_values.items()}
    mass = torch.exp(-terms.gate(lse_coord, lse_rest))
    result["coord_mass"] = torch.where(x.is_coord, mass, torch.nan)
    result["correct"] = (label_logit == logits.amax(-1)).to(logits.dtype)
    result["correct_top5"] = ((logits > label_logit[:, None]).sum(-1) < 5).to(logits.dtype)
    return result


def _scatter(value: Tensor, is_coord: Tensor) -> Tensor:
    full = torch.full(is_coord.shape, torch.nan, dtype=value.dtype, device=value.device)
    return full.masked_scatter(is_coord, value)
