"""The order of samples: a pure function of seed and epoch, so that a resumed run sees what the uninterrupted one would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """A permutation of ``size`` samples for the epoch of :meth:`set_epoch`, then fillers up to ``slots``.

    With ``lengths`` samples of similar length stay together, as in transformers' ``group_by_length``, in groups of ``window`` (the
    samples of a step). Fillers are the numbers ``size .. slots - 1``: see :class:`coordexp.data.dataset.EvenDataset`.
    """

    def __init__(self, size: int, *, seed: int, slots: int | None = None, lengths: Sequence[int] | None = None, window: int = 1) -> None:
        self.size, self.seed, self.lengths, self.window = size, seed, lengths, window
        self.slots = size if slots is None else slots
        self.epoch = 0

    def __len__(self) -> int:
        return self.slots

    def __iter__(self) -> Iterator[int]:
        # Epoch 0 is drawn from the seed itself.
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        if self.lengths is None:
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = get_length_grouped_indices(list(self.lengths), self.window, generator=generator)
        yield from (*order, *range(self.size, self.slots))

    def set_epoch(self, epoch: int) -> None:
        """Steer the permutation."""
        self.epoch = epoch
