"""What the objective is measured against: bare products and the textbook in full logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """``hidden`` ``[S, D]``, ``weight`` ``[V, D]``, ``labels`` ``[S]``; the coordinate slice is the last ``bins`` rows of V."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bins: int

    @property
    def start(self) -> int:
        """First coordinate row."""
        return self.weight.shape[0] - self.bins

    @property
    def is_coord(self) -> Tensor:
        """``[S]``."""
        return self.labels >= self.start


def make_workload(*, rows: int, coords: int, vocab: int, dim: int, bins: int, dtype: torch.dtype, device: str) -> Workload:
    """Random hidden states of unit variance and a head that gives logits of unit variance; nothing twice in memory."""
    torch.manual_seed(0)
    hidden = torch.empty(rows, dim, dtype=dtype, device=device).normal_()
    weight = torch.empty(vocab, dim, dtype=dtype, device=device).normal_().mul_(dim**-0.5)
    labels = torch.randint(0, vocab - bins, (rows,))
    labels[torch.randperm(rows)[:coords]] = torch.randint(vocab - bins, vocab, (coords,))
    return Workload(hidden.requires_grad_(), weight.requires_grad_(), labels.to(device), bins)


def products(w: Workload, budget_mb: float) -> Callable[[], None]:
    """The three matrix products that any exact gradient needs, in chunks: the lower bound."""

    def run() -> None:
        rows, vocab = w.hidden.shape[0], w.weight.shape[0]
        stride = -(-vocab // 64) * 64
        chunk = max(1, min(rows, int(budget_mb * 2**20 // (stride * w.weight.element_size()))))
        with torch.no_grad():
            buffer = torch.empty(chunk, stride, dtype=w.weight.dtype, device=w.weight.device)[:, :vocab]
            dh, dw = torch.empty_like(w.hidden), torch.zeros_like(w.weight, dtype=torch.float32)
            for a in range(0, rows, chunk):
                h = w.hidden[a : a + chunk]
                z = torch.mm(h, w.weight.T, out=buffer[: len(h)])
                torch.mm(z, w.weight, out=dh[a : a + chunk])
                if z.dtype == dw.dtype:
                    dw.addmm_(z.T, h)
                else:
                    torch.addmm(dw, z.T, h, out_dtype=torch.float32, out=dw)

    return run


def textbook_loss(w: Workload, *, coordinates: bool, sigma: float = 2.0) -> Tensor:
    """Full float32 logits; with ``coordinates``, soft CE, W1 and the gate as they are usually written."""
    logits = (w.hidden @ w.weight.T).float()
    if not coordinates:
        return F.cross_entropy(logits, w.labels)
    loss = F.cross_entropy(logits, w.labels.masked_fill(w.is_coord, -100))
    coord = logits[w.is_coord]
    part, bins = coord[:, w.start :], w.labels[w.is_coord] - w.start
    q = gaussian(bins, w.bins, sigma)
    gate = torch.logsumexp(coord, -1) - torch.logsumexp(part, -1)
    return loss + soft_ce_w1(part, q).mean() + gate.mean()


def gaussian(bins: Tensor, num_bins: int, sigma: float) -> Tensor:
    """Normalised Gaussian over the bins, centred at the label."""
    k = torch.arange(num_bins, device=bins.device)
    return torch.softmax(-0.5 * ((k - bins[:, None]) / sigma) ** 2, -1)


def soft_ce_w1(part: Tensor, q: Tensor) -> Tensor:
    """Soft cross-entropy and Wasserstein-1, per row."""
    log_p = torch.log_softmax(part, -1)
    return -(q * log_p).sum(-1) + (log_p.exp() - q).cumsum(-1).abs().sum(-1)
