"""Other fused losses on the inputs of the loss benchmark: cross-entropy alone, none of them knows coordinates."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coordexp.bench.baselines import Workload
from coordexp.bench.loss import Rival


def torch_linear_cross_entropy(w: Workload, budget_mb: float) -> Callable[[], Tensor]:
    """torch's own fused loss with a chunk of the same budget (its automatic one is ten times slower on a CPU)."""
    chunk = max(1, min(w.hidden.shape[0], int(budget_mb * 2**20 // (w.weight.shape[0] * w.weight.element_size()))))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda: F.linear_cross_entropy(w.hidden, w.weight, w.labels, options=options)


def liger(w: Workload, _: float) -> Callable[[], Tensor]:
    """``liger-kernel``'s fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(w.weight, w.hidden, w.labels)


def cut_cross_entropy(w: Workload, _: float) -> Callable[[], Tensor]:
    """``cut-cross-entropy`` without gradient filtering (``cce_exact``): its filter depends on the data."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(w.hidden, w.weight, w.labels, impl="cce_exact")


@dataclass(frozen=True)
class Offer:
    """A rival, whether it is here, how to get it, and its package (None: torch itself)."""

    make: Rival
    here: bool
    install: str
    package: str | None = None
    cuda: bool = False


OFFERS = {
    "torch_linear_cross_entropy": Offer(torch_linear_cross_entropy, "linear_cross_entropy" in dir(F), 'pip install "torch>=2.13"'),
    "liger_ce_only": Offer(
        liger, importlib.util.find_spec("liger_kernel") is not None, "pip install liger-kernel", "liger-kernel", cuda=True
    ),
    "cce_exact": Offer(
        cut_cross_entropy, importlib.util.find_spec("cut_cross_entropy") is not None, "pip install cut-cross-entropy", "cut-cross-entropy",
        cuda=True,
    ),
}  # fmt: skip


def at_hand(device: str) -> dict[str, Rival]:
    """Those that can run here; the others are named with the way to get them."""
    found = {}
    for name, offer in OFFERS.items():
        if offer.cuda and device == "cpu":
            print(f"skipped: {name}, which needs a CUDA device")
        elif not offer.here:
            print(f"skipped: {name}, which is not installed: {offer.install}")
        else:
            found[name] = offer.make
    return found
