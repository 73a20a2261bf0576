"""The training dataset: records, tokenised when they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from coordexp.data.answers import ask
from coordexp.data.records import Record
from coordexp.data.template import ChatTemplate, Example
from coordexp.grammar import ROLE_CODES


class RecordDataset(Dataset[Example]):
    """Examples of ``records`` under ``template``; ``set_epoch`` steers the random object order."""

    def __init__(self, records: Sequence[Record], template: ChatTemplate) -> None:
        self.records = list(records)
        self.template = template
        # Shared with the workers of a data loader: with persistent ones their copy of this object stays that of the first epoch.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch of :meth:`set_epoch`, in every process of a data loader."""
        return int(self._epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self.template.encode(self.records[index], self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self._epoch.fill_(epoch)

    def lengths(self) -> list[int]:
        """Answer lengths in tokens, for grouping samples of similar length (images do not enter)."""
        grid = torch.tensor([[1, self.template.image_processor.merge_size, self.template.image_processor.merge_size]])
        return [
            len(self.template.encode_answer(ask(self.template.prompt, r), self.template.instances(r)[0], grid)["input_ids"])
            for r in self.records
        ]

    def token_counts(self) -> list[int]:
        """Length in tokens of every sample, image placeholders included; no image is opened."""
        processor = self.template.image_processor
        area = int(processor.merge_size) ** 2
        images = [processor.get_number_of_image_patches(r.height, r.width) // area for r in self.records]
        # ``lengths`` counts one placeholder for the image.
        return [text - 1 + image for text, image in zip(self.lengths(), images, strict=True)]


class EvenDataset(Dataset[Example]):
    """``samples``, then fillers up to a whole number of batches for every rank: they supervise nothing and count nowhere.

    Without them accelerate repeats the first samples where a set does not divide over the ranks, and they would count twice.
    """

    def __init__(self, samples: RecordDataset, *, multiple: int) -> None:
        self.samples = samples
        self.size = len(samples)
        self.slots = -(-self.size // multiple) * multiple

    def __len__(self) -> int:
        return self.slots

    def __getitem__(self, index: int) -> Example:
        return self.samples[index] if index < self.size else unsupervised(self.samples[0])

    def set_epoch(self, epoch: int) -> None:
        """As for the samples."""
        self.samples.set_epoch(epoch)

    def lengths(self) -> list[int]:
        """Answer lengths of the samples, fillers left out."""
        return self.samples.lengths()


def unsupervised(example: Example) -> Example:
    """The sample with every label off."""
    n = len(example.input_ids)
    nan = float("nan")
    return dataclasses.replace(example, roles=[ROLE_CODES["none"]] * n, centers=[nan] * n, extents=[nan] * n, slots=[-1] * n)
