"""Packs as training data: several samples in one row, each with its own positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from coordexp.data.answers import PHRASE
from coordexp.data.collate import TrainCollator
from coordexp.data.dataset import RecordDataset, unsupervised
from coordexp.data.options import PackingOptions
from coordexp.data.packing import FILLER, PackPlan, PackSchedule, digest, plan_packs
from coordexp.data.records import Record
from coordexp.data.targets import beside, side_by_side
from coordexp.data.template import ChatTemplate, Example
from coordexp.errors import DataError


@dataclass(frozen=True)
class Pack:
    """Samples of one row. That of a filler supervises nothing and does not count."""

    examples: tuple[Example, ...]


class PackedDataset(Dataset[Pack]):
    """Slot i of the schedule's epoch as a :class:`Pack`; read in order. ``set_epoch`` steers pack order and object order."""

    def __init__(self, samples: RecordDataset, schedule: PackSchedule) -> None:
        self.samples = samples
        self.schedule = schedule
        self._order: tuple[int, tuple[int, ...]] = (0, schedule.order(0))

    def __len__(self) -> int:
        return self.schedule.slots

    def __getitem__(self, index: int) -> Pack:
        epoch = self.samples.epoch
        if self._order[0] != epoch:
            self._order = epoch, self.schedule.order(epoch)
        number = self._order[1][index]
        plan = self.schedule.plan
        if number == FILLER:
            shortest = min((i for pack in plan.packs for i in pack), key=lambda i: (plan.sample_lengths[i], i))
            return Pack((unsupervised(self.samples[shortest]),))
        examples = tuple(self.samples[i] for i in plan.packs[number])
        tokens = sum(len(example.input_ids) for example in examples)
        if tokens > plan.length:
            raise DataError(
                f"pack {number} ({', '.join(e.image_id for e in examples)}) has {tokens} tokens, planned were at most {plan.length}: "
                "a sample's length changed since the plan was made; with data.order=random set a larger data.packing.length"
            )
        return Pack(examples)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.samples.set_epoch(epoch)


@dataclass(frozen=True)
class PackCollator:
    """A batch ``[B, T]`` of packs, in which no sample sees another.

    Each sample goes through ``collate`` alone, which shifts its labels, so that its last position predicts nothing and no label
    crosses into the next sample; the results are laid side by side. ``position_ids`` ``[4, B, T]``: row 0 counts from 0 in every sample,
    by which transformers tells the samples apart, rows 1 to 3 are the sample's own rotary positions, from
    ``rope_index(input_ids, mm_token_type_ids, image_grid_thw) -> [3, 1, L]``. There is no ``attention_mask``: one would
    switch the separation off. Rows are padded on the right by a stretch of its own.

    ``single_row`` lays all packs of the batch in one row, B = 1: FlashAttention reads lengths from the positions there only.
    """

    collate: TrainCollator
    rope_index: Callable[[Tensor, Tensor, Tensor], Tensor]
    single_row: bool = False

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        rows = [[self._sample(example) for example in pack.examples] for pack in packs]
        if self.single_row:
            rows = [[sample for row in rows for sample in row]]
        length = max(sum(sample["input_ids"].shape[1] for sample in row) for row in rows)
        fills = {"input_ids": self.collate.pad_token_id, "mm_token_type_ids": 0}
        batch: dict[str, Any] = {
            name: torch.cat([side_by_side([sample[name] for sample in row], length, fill) for row in rows]) for name, fill in fills.items()
        }
        batch["position_ids"] = torch.cat([_positions([sample["position_ids"] for sample in row], length) for row in rows], dim=1)
        for name in ("pixel_values", "image_grid_thw"):
            batch[name] = torch.cat([sample[name] for row in rows for sample in row])
        batch["targets"] = beside([[sample["targets"] for sample in row] for row in rows], length)
        return batch

    def _sample(self, example: Example) -> dict[str, Any]:
        sample = self.collate([example])
        del sample["attention_mask"]
        ids = sample["input_ids"]
        rotary = self.rope_index(ids, sample["mm_token_type_ids"], sample["image_grid_thw"])
        text = torch.arange(ids.shape[1]).view(1, 1, -1)
        return {**sample, "position_ids": torch.cat([text, rotary])}


def _positions(parts: Sequence[Tensor], length: int) -> Tensor:
    row = torch.cat(list(parts), dim=2)
    padding = torch.arange(length - row.shape[2]).expand(4, 1, -1)
    return torch.cat([row, padding], dim=2)


def plan_dataset(samples: RecordDataset, options: PackingOptions, *, seed: int) -> PackPlan:
    """The plan of a data set: lengths from its tokenised samples, image tokens counted from the image sizes.

    Raises:
        DataError: over-long samples under ``on_overlong='error'``.
    """
    records, template = samples.records, samples.template
    return plan_packs(
        samples.token_counts(),
        length=options.length,
        seed=seed,
        on_overlong=options.on_overlong,
        names=[record.source for record in records],
        inputs={
            "data": data_digest(records),
            "tokenizer": digest(template.tokenizer.backend_tokenizer.to_str()),
            "template": template_digest(template),
            "order": template.order,
        },
    )


def data_digest(records: Sequence[Record]) -> str:
    """Hash of what the records say; where their files lie does not enter."""
    return digest(
        [
            [
                r.image_id,
                r.width,
                r.height,
                r.metadata.get(PHRASE),
                [[o.desc, o.geometry, [float(v) for v in o.values], not o.taught] for o in r.objects],
            ]
            for r in records
        ]
    )


def template_digest(template: ChatTemplate) -> str:
    """Hash of chat template, prompt, geometry, coordinate convention and image size settings."""
    processor = template.image_processor
    budget = [processor.size["shortest_edge"], processor.size["longest_edge"]]
    patches = [processor.patch_size, processor.merge_size, processor.temporal_patch_size]
    codec = [template.codec.num_bins, template.codec.convention]
    return digest([template.tokenizer.chat_template, template.prompt, template.geometry, template.seed, codec, budget, patches])
