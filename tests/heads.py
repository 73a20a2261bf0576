"""Small heads with supervised rows, for the tests of the fused objective."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.losses.linear import CoordLossOutput, linear_coord_loss
from coordexp.losses.objective import CoordObjective

# Every term at once, in sizes that let each matter.
ALL = {"ce": 0.3, "w1": 0.2, "crps": 0.1, "text_gate": 0.4, "entropy": 0.2, "variance": 0.01}


@dataclass
class Head:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    centers: Tensor
    extents: Tensor
    bias: Tensor
    start: int
    bins: int

    def to(self, dtype: torch.dtype) -> Head:
        return Head(
            self.hidden.to(dtype),
            self.weight.to(dtype),
            self.labels,
            self.centers,
            self.extents,
            self.bias.to(dtype),
            self.start,
            self.bins,
        )


def make_head(*, t=57, coords=21, vocabulary=93, bins=40, start=25, width=12, ignored=5, scale=1.0, seed=0) -> Head:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(t, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    rest = torch.tensor([v for v in range(vocabulary) if not start <= v < start + bins])
    labels = rest[torch.randint(0, len(rest), (t,), generator=g)]
    order = torch.randperm(t, generator=g)
    labels[order[:coords]] = torch.randint(start, start + bins, (coords,), generator=g)
    labels[order[coords : coords + ignored]] = -100
    centers = ((labels - start).double() + 0.8 * torch.rand(t, generator=g, dtype=torch.float64) - 0.4).clamp(0, bins - 1)
    is_coord = (labels >= start) & (labels < start + bins)
    centers[~is_coord] = math.nan
    extents = (bins * torch.rand(t, generator=g, dtype=torch.float64)).masked_fill(~is_coord, math.nan)
    return Head(hidden, weight, labels, centers, extents, torch.randn(vocabulary, generator=g, dtype=torch.float64), start, bins)


# Tests of the mark ``gpu`` run there where it exists.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(head: Head) -> Head:
    """What the model computes goes to ``DEVICE``; labels, centres and extents stay on the host, as in training."""
    for name in ("hidden", "weight", "bias"):
        setattr(head, name, vars(head)[name].to(DEVICE))
    return head


@dataclass
class Outcome:
    output: CoordLossOutput
    gradients: dict[str, Tensor]


def run(
    head: Head, objective: CoordObjective, impl: str, *, grad_output=1.0, with_bias=False, rows=None, chunk=None,
    train=("hidden", "weight"), top5=True,
) -> Outcome:  # fmt: skip
    """One forward and backward. ``rows`` stand in for the coordinate rows; ``chunk`` is in rows; ``train`` names leaves."""
    leaves = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias, "rows": rows}
    leaves = {k: None if v is None else v.detach().clone().requires_grad_(k in train) for k, v in leaves.items()}
    stride = -(-head.weight.shape[0] // 64) * 64
    wide = torch.promote_types(head.hidden.dtype, torch.float32)
    output = linear_coord_loss(
        leaves["hidden"], leaves["weight"], head.labels, coord_start=head.start, num_bins=head.bins, objective=objective,
        centers=head.centers, extents=head.extents, coord_weight=leaves["rows"], bias=leaves["bias"] if with_bias else None,
        impl=impl, logits_budget_mb=None if chunk is None else (chunk + 0.5) * stride * wide.itemsize / 2**20, top5=top5,
    )  # fmt: skip
    if train:
        (output.loss * grad_output).backward()
    return Outcome(output, {k: v.grad for k, v in leaves.items() if v is not None and v.grad is not None})


def textbook(head: Head, objective: CoordObjective) -> dict[str, Tensor]:
    """Logits in the type of the inputs, everything after in float32 by autograd: what bf16 training does today."""
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    kept = head.labels != -100
    logits = (hidden[kept] @ weight.T).float()
    labels = head.labels.to(hidden.device)[kept]
    coord = (labels >= head.start) & (labels < head.start + head.bins)
    part = logits[coord][:, head.start : head.start + head.bins]
    gate = torch.logsumexp(logits[coord], -1) - torch.logsumexp(part, -1)
    k = torch.arange(head.bins, device=hidden.device)
    q = torch.softmax(-0.5 * ((k - head.centers.to(hidden.device)[kept][coord].float()[:, None]) / objective.sigma) ** 2, -1)
    soft = -(q * torch.log_softmax(part, -1)).sum(-1)
    (F.cross_entropy(logits[~coord], labels[~coord]) + soft.mean() + gate.mean()).backward()
    return {"hidden": hidden.grad, "weight": weight.grad}


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of the difference over that of ``b``, in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
