"""Batches. The one label shift of the package happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coordexp.data.targets import Targets, padded, shift
from coordexp.data.template import Example, Prompt
from coordexp.losses.linear import IGNORE


@dataclass(frozen=True)
class TrainCollator:
    """Right-padded batch of examples: the model's inputs ``[B, T]``, and under ``targets`` what it must predict (:class:`Targets`).

    ``mm_token_type_ids`` is 1 at image placeholders.
    """

    pad_token_id: int
    image_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        length = max(len(e.input_ids) for e in examples)
        ids = _pad([e.input_ids for e in examples], length, self.pad_token_id)
        labels = [[i if role else IGNORE for i, role in zip(e.input_ids, e.roles, strict=True)] for e in examples]
        rows: dict[str, list[Any]] = {
            "labels": labels,
            "roles": [e.roles for e in examples],
            "centers": [e.centers for e in examples],
            "extents": [e.extents for e in examples],
            "slots": [e.slots for e in examples],
        }
        return {
            "input_ids": ids,
            "attention_mask": _pad([[1] * len(e.input_ids) for e in examples], length, 0),
            "mm_token_type_ids": (ids == self.image_token_id).long(),
            "pixel_values": torch.cat([e.pixel_values for e in examples]),
            "image_grid_thw": torch.cat([e.image_grid_thw for e in examples]),
            # A filler that supervises nothing is no sample of the step.
            "targets": Targets(
                {name: shift(padded(values, name, length), name) for name, values in rows.items()},
                [e.image_id for e in examples if any(e.roles)],
            ),
        }


def _pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def collate_prompts(prompts: Sequence[Prompt], *, pad_token_id: int, image_token_id: int) -> dict[str, Tensor]:
    """Left-padded batch of prompts for generation."""
    length = max(len(p.input_ids) for p in prompts)
    ids = torch.tensor([[pad_token_id] * (length - len(p.input_ids)) + p.input_ids for p in prompts])
    mask = torch.tensor([[0] * (length - len(p.input_ids)) + [1] * len(p.input_ids) for p in prompts])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == image_token_id).long(),
        "pixel_values": torch.cat([p.pixel_values for p in prompts]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
    }
