"""Named sums and their counts: the only form in which losses and diagnostics travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    """Text and coordinate positions that the loss divides by: 0-dim tensors over window and ranks."""

    text: Tensor
    coord: Tensor


@dataclass(frozen=True)
class LossSums:
    """Pairs ``(sum, count)`` under ``names``, then the histograms ``bins`` (name and number of bins), in one detached float64 ``vector``
    ``[2 * len(names) + all bins]`` on the device: adding, sending and reducing it over ranks is one operation.

    A mean is taken once, by whoever reports it; a count of zero gives NaN there, not zero.
    """

    names: tuple[str, ...] = ()
    bins: tuple[tuple[str, int], ...] = ()
    vector: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @staticmethod
    def of(pairs: Mapping[str, tuple[Tensor, Tensor]], histograms: Mapping[str, Tensor] | None = None) -> LossSums:
        """From 0-dim ``(sum, count)`` pairs and counts per bin."""
        sums, counts = (torch.stack([pair[i].detach().double() for pair in pairs.values()]) for i in (0, 1))
        return LossSums.joined(tuple(pairs), sums, counts, histograms)

    @staticmethod
    def joined(names: Sequence[str], sums: Tensor, counts: Tensor, histograms: Mapping[str, Tensor] | None = None) -> LossSums:
        """From ``sums`` and ``counts`` ``[len(names)]`` and counts per bin, on one device."""
        histograms = histograms or {}
        pairs = torch.stack([sums.detach().double(), counts.double()], dim=1).flatten()
        bins = tuple((name, counts.numel()) for name, counts in histograms.items())
        return LossSums(tuple(names), bins, torch.cat([pairs, *(h.double() for h in histograms.values())]))

    def __bool__(self) -> bool:
        return bool(self.names)

    def __add__(self, other: LossSums) -> LossSums:
        if not self:
            return other
        if not other:
            return self
        if (self.names, self.bins) != (other.names, other.bins):
            raise ValueError(f"sums with different names cannot be added: {sorted(set(self.names) ^ set(other.names))}")
        return self.at(self.vector + other.vector)

    def beside(self, other: LossSums) -> LossSums:
        """Both as one; no name may be in both.

        Raises:
            ValueError: a name is.
        """
        names, n, m = (*self.names, *other.names), 2 * len(self.names), 2 * len(other.names)
        if len(set(names)) < len(names):
            raise ValueError(f"sums under one name twice: {sorted(set(self.names) & set(other.names))}")
        parts = (self.vector[:n], other.vector[:m], self.vector[n:], other.vector[m:])
        return LossSums(names, (*self.bins, *other.bins), torch.cat(parts))

    def at(self, vector: Tensor) -> LossSums:
        """The same names with another ``vector``: on another device, or summed over ranks."""
        return LossSums(self.names, self.bins, vector)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @cached_property
    def _place(self) -> dict[str, int]:
        return {name: 2 * i for i, name in enumerate(self.names)}

    def sum(self, name: str) -> Tensor:
        """The sum under ``name``."""
        return self.vector[self._place[name]]

    def count(self, name: str) -> Tensor:
        """The count under ``name``."""
        return self.vector[self._place[name] + 1]

    def mean(self, name: str) -> Tensor:
        """``sum / count``; NaN where nothing was counted."""
        return self.sum(name) / self.count(name)

    @property
    def histograms(self) -> dict[str, Tensor]:
        """Counts per bin by name."""
        found, start = {}, 2 * len(self.names)
        for name, size in self.bins:
            found[name] = self.vector[start : start + size]
            start += size
        return found
