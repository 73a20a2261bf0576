"""The eager implementation: full logits, autograd. It is the specification the fast ones are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from coordexp.losses import terms
from coordexp.losses.diagnostics import coord_diagnostics, row_diagnostics
from coordexp.losses.linear import HeadInputs, HeadResult, combine, term_scales
from coordexp.losses.terms import SLICE_TERMS, CoordSlice


def eager(x: HeadInputs) -> HeadResult:
    """Materialises ``[S, V]`` logits in float32 or wider; float64-capable."""
    with torch.autocast(x.hidden.device.type, enabled=False):
        logits = _logits(x)
        coord, text = logits[: x.num_coord], logits[x.num_coord :]
        view = x.coord_slice(coord[:, x.columns], slice(0, x.num_coord))
        values = _text_terms(text, x) | _coord_terms(coord, view, x)
        # Adding 0 * weight keeps the graph (and every collective) alive where nothing is supervised.
        loss = combine(values, term_scales(x.objective, x.normalizer), x) + 0.0 * logits.sum() + 0.0 * x.weight[:1].sum()
        with torch.no_grad():
            everywhere = _everywhere(logits.detach(), x)
            diagnostics = coord_diagnostics(x.coord_slice(view.logits.detach(), slice(0, x.num_coord)))
    return HeadResult(loss, {k: v.detach() for k, v in values.items()}, everywhere, diagnostics)


def _logits(x: HeadInputs) -> Tensor:
    weight = x.weight
    if x.coord_weight is not None:
        weight = torch.cat([weight[: x.columns.start], x.coord_weight.to(weight.dtype), weight[x.columns.stop :]])
    logits = x.hidden.to(x.wide) @ weight.to(x.wide).T
    return logits if x.bias is None else logits + x.bias.to(x.wide)


def _rest(logits: Tensor, x: HeadInputs) -> Tensor:
    return torch.cat([logits[:, : x.columns.start], logits[:, x.columns.stop :]], dim=-1)


def _split_lse(logits: Tensor, x: HeadInputs) -> tuple[Tensor, Tensor]:
    """``(L_C, L_R)``: logsumexp over the coordinate slice and over the rest."""
    return torch.logsumexp(logits[:, x.columns], dim=-1), torch.logsumexp(_rest(logits, x), dim=-1)


def _text_terms(text: Tensor, x: HeadInputs) -> dict[str, Tensor]:
    lse_coord, lse_rest = _split_lse(text, x)
    label_logit = text.gather(-1, x.labels[x.num_coord :, None]).squeeze(-1)
    return {
        "text_ce": terms.text_ce(torch.logaddexp(lse_coord, lse_rest), label_logit),
        "text_gate": terms.text_gate(lse_coord, lse_rest),
    }


def _coord_terms(coord: Tensor, view: CoordSlice, x: HeadInputs) -> dict[str, Tensor]:
    lse_coord, lse_rest = _split_lse(coord / x.objective.temperature, x)
    values = {name: term.value(view) for name, term in SLICE_TERMS.items()}
    return values | {"gate": terms.gate(lse_coord, lse_rest), "kl": values["soft_ce"] - terms.target_entropy(view.q)}


def _everywhere(logits: Tensor, x: HeadInputs) -> dict[str, Tensor]:
    lse_coord, lse_rest = _split_lse(logits, x)
    label_logit = logits.gather(-1, x.labels[:, None])
    return row_diagnostics(
        label_logit=label_logit.squeeze(-1),
        max_coord=logits[:, x.columns].amax(-1),
        max_rest=_rest(logits, x).amax(-1),
        above=(logits > label_logit).sum(-1),
        lse_coord=lse_coord,
        lse_rest=lse_rest,
    )
