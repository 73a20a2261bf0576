"""What a coordinate distribution looks like, from the slice logits the loss has at hand; never with a gradient.

Everything here is at tau = 1, so that it compares across recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coordexp import distribution
from coordexp.losses import terms
from coordexp.losses.terms import CoordSlice


def coord_diagnostics(s: CoordSlice) -> dict[str, Tensor]:
    """Per coordinate position ``[N]``: probabilities, nats and bins.

    ``margin`` is the best slice logit minus the true bin's; ``rank`` the number of bins above the true one;
    ``*_bin`` are readouts of the distribution, ``std`` its spread, ``tail_mass`` what lies more than 16 bins
    from the mode, ``modes`` the number of separate peaks.
    """
    p, true_logit = s.p_1, s.logits.gather(-1, s.bins[:, None])
    return {
        "nll": terms.ce(s.log_p_1, s.bins),
        "p_gt": p.gather(-1, s.bins[:, None]).squeeze(-1),
        "margin": s.logits.amax(dim=-1) - true_logit.squeeze(-1),
        "rank": (s.logits > true_logit).sum(dim=-1).to(p.dtype),
        "argmax_bin": distribution.argmax(p),
        "expected_bin": distribution.expectation(p),
        "median_bin": distribution.median(p),
        "window_bin": distribution.window(p),
        "topk_bin": distribution.topk_mean(p),
        "dist_entropy": terms.entropy(s.log_p_1),
        "dist_std": distribution.std(p),
        "tail_mass": distribution.tail_mass(p),
        "modes": distribution.modes(p).to(p.dtype),
        "crps_tau1": terms.crps(p, s.centers),
    }


def derived(values: dict[str, Tensor], centers: Tensor) -> dict[str, Tensor]:
    """Errors against the true centre ``[N]`` (bins) and shares, from :func:`coord_diagnostics`."""
    errors = {f"{name}_mae": (values[name] - centers).abs() for name in values if name.endswith("_bin")}
    kind = values["rank"].dtype
    return {
        **values,
        **errors,
        "signed_bias": values["median_bin"] - centers,
        "coord_acc_top5": (values["rank"] < 5).to(kind),
        "multimodal": (values["modes"] > 1).to(kind),
    }


def row_diagnostics(
    *, label_logit: Tensor, max_coord: Tensor, max_rest: Tensor, above: Tensor, lse_coord: Tensor, lse_rest: Tensor
) -> dict[str, Tensor]:
    """Per supervised position ``[S]``, over the full vocabulary at tau = 1.

    ``correct``: no logit exceeds the label's; ``correct_top5``: fewer than five do (``above`` counts them);
    ``mass``: probability of the coordinate slice; ``argmax_is_coord``: the best token lies in the slice.
    """
    kind = lse_coord.dtype
    best = torch.maximum(max_coord, max_rest)
    return {
        "correct": (label_logit >= best).to(kind),
        "correct_top5": (above < 5).to(kind),
        "mass": torch.sigmoid(lse_coord - lse_rest),
        "argmax_is_coord": (max_coord > max_rest).to(kind),
    }
