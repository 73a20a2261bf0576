"""Named sums and their counts: the only form in which losses and diagnostics travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """Text and coordinate positions that the loss divides by: 0-dim tensors over window and ranks."""

    text: Tensor
    coord: Tensor


@dataclass(frozen=True)
class LossSums:
    """``values[name] = (sum, count)``, detached 0-dim float64 tensors; ``histograms[name]``, counts per bin. Adding adds all.

    A mean is taken once, by whoever reports it; a count of zero gives NaN there, not zero.
    """

    values: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    histograms: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(named: Mapping[str, tuple[Tensor, Tensor]]) -> LossSums:
        """Detached float64 copies of ``(sum, count)`` pairs."""
        return LossSums({k: (s.detach().double(), n.detach().double()) for k, (s, n) in named.items()})

    def __add__(self, other: LossSums) -> LossSums:
        if not self.values:
            return other
        if not other.values:
            return self
        if self.values.keys() != other.values.keys():
            raise ValueError(f"sums with different names cannot be added: {sorted(self.values.keys() ^ other.values.keys())}")
        values = {k: (s + other.values[k][0], n + other.values[k][1]) for k, (s, n) in self.values.items()}
        return LossSums(values, {k: h + other.histograms[k] for k, h in self.histograms.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def sum(self, name: str) -> Tensor:
        """The sum under ``name``."""
        return self.values[name][0]

    def count(self, name: str) -> Tensor:
        """The count under ``name``."""
        return self.values[name][1]

    def mean(self, name: str) -> Tensor:
        """``sum / count``; NaN where nothing was counted."""
        total, count = self.values[name]
        return total / count

    def pack(self) -> Tensor:
        """All pairs, then all histograms, as one float64 vector in sorted order of the names, for one collective."""
        pairs = torch.stack([part for name in sorted(self.values) for part in self.values[name]])
        return torch.cat([pairs, *(self.histograms[name] for name in sorted(self.histograms))])

    def unpack(self, packed: Tensor) -> LossSums:
        """The inverse of :meth:`pack`, with this object's names."""
        rows = packed[: 2 * len(self.values)].view(-1, 2)
        names = sorted(self.histograms)
        parts = torch.split(packed[2 * len(self.values) :], [self.histograms[name].numel() for name in names])
        values = {name: (rows[i, 0], rows[i, 1]) for i, name in enumerate(sorted(self.values))}
        return LossSums(values, dict(zip(names, parts, strict=True)))
