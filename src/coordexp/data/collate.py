"""Batches. The one label shift of the package happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coordexp.data.template import Example, Prompt

IGNORE = -100


@dataclass(frozen=True)
class TrainCollator:
    """Right-padded batch of examples, shapes ``[B, T]``.

    ``shift_labels[b, t]`` is the token that position t must predict (-100: unsupervised);
    ``coord_centers``, ``coord_extents`` (NaN elsewhere), ``token_roles`` and ``coord_slots`` are aligned
    with it. ``mm_token_type_ids`` is 1 at image placeholders.
    """

    pad_token_id: int
    image_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        length = max(len(e.input_ids) for e in examples)
        ids = _pad([e.input_ids for e in examples], length, self.pad_token_id, torch.long)
        roles = _pad([e.roles for e in examples], length, 0, torch.long)
        mask = _pad([[1] * len(e.input_ids) for e in examples], length, 0, torch.long)
        labels = torch.where(roles > 0, ids, IGNORE)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_token_id).long(),
            "pixel_values": torch.cat([e.pixel_values for e in examples]),
            "image_grid_thw": torch.cat([e.image_grid_thw for e in examples]),
            "shift_labels": shift(labels, IGNORE),
            "token_roles": shift(roles, 0),
            "coord_centers": shift(_pad([e.centers for e in examples], length, float("nan"), torch.float32), float("nan")),
            "coord_extents": shift(_pad([e.extents for e in examples], length, float("nan"), torch.float32), float("nan")),
            "coord_slots": shift(_pad([e.slots for e in examples], length, -1, torch.long), -1),
            # A filler that supervises nothing is no sample of the step.
            "image_ids": [e.image_id for e in examples if any(e.roles)],
        }


def shift(values: Tensor, fill: float) -> Tensor:
    """Move ``[B, T]`` one to the left, so that position t holds what is predicted there."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], fill)], dim=1)


def _pad(rows: Sequence[Sequence[float]], length: int, fill: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([list(row) + [fill] * (length - len(row)) for row in rows], dtype=dtype)


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
