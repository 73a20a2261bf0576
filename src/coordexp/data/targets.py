"""``Targets``: what the objective and the meters need of a batch, in one object that no wrapper looks into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import IGNORE
from coordexp.losses.sums import Normalizer
from coordexp.vocab.coord_vocab import CoordVocab

# What stands at positions without a target, and the type of each column.
FILLS: Final[dict[str, tuple[float, torch.dtype]]] = {
    "labels": (IGNORE, torch.long),
    "roles": (ROLE_CODES["none"], torch.long),
    "centers": (float("nan"), torch.float32),
    "extents": (float("nan"), torch.float32),
    "slots": (-1, torch.long),
}


class Targets:
    """Of a batch ``[B, T]``, on the host: at position t what the model must predict there.

    ``labels`` token ids, -100 where nothing is supervised; ``roles`` codes of :data:`coordexp.grammar.ROLE_CODES`; ``centers`` continuous
    bin positions and ``extents`` sizes in bins, float32, NaN except at coordinates; ``slots`` 0 to 3 for x1, y1, x2, y2, else -1.
    ``image_ids`` names the samples that count; ``normalizer`` holds the counts of the optimizer step, None for the batch's own.

    It is deliberately no dataclass, no mapping, no sequence and no tensor, and has no ``to``: accelerate, torch's FSDP and DeepSpeed cast
    every float that they find in a model's arguments to their own precision, in which bin 700.4 becomes 700 or 704.
    """

    __slots__ = ("centers", "extents", "image_ids", "labels", "normalizer", "roles", "slots")

    labels: Tensor
    roles: Tensor
    centers: Tensor
    extents: Tensor
    slots: Tensor

    def __init__(self, columns: dict[str, Tensor], image_ids: Sequence[str], normalizer: Normalizer | None = None) -> None:
        for name in FILLS:
            setattr(self, name, columns[name])
        self.image_ids = list(image_ids)
        self.normalizer = normalizer

    def columns(self) -> dict[str, Tensor]:
        """The five columns by name."""
        return {"labels": self.labels, "roles": self.roles, "centers": self.centers, "extents": self.extents, "slots": self.slots}

    def divided_by(self, normalizer: Normalizer | None) -> Targets:
        """The same targets under other counts."""
        return Targets(self.columns(), self.image_ids, normalizer)

    def counts(self, vocab: CoordVocab) -> tuple[int, int]:
        """Supervised text and coordinate positions."""
        coord = (self.labels >= vocab.start) & (self.labels < vocab.start + vocab.num_bins)
        return int(((self.labels != IGNORE) & ~coord).sum()), int(coord.sum())


def shift(values: Tensor, name: str) -> Tensor:
    """Column ``name`` ``[B, T]`` moved one to the left, so that position t holds what is predicted there."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], FILLS[name][0])], dim=1)


def padded(rows: Sequence[Sequence[float]], name: str, length: int, *, left: bool = False) -> Tensor:
    """Column ``name`` ``[B, length]`` from rows of different lengths, filled on the right (or the left)."""
    fill, dtype = FILLS[name]
    blank = [[fill] * (length - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, blank, strict=True)], dtype=dtype)


def beside(rows: Sequence[Sequence[Targets]], length: int) -> Targets:
    """A batch of packs: each row's samples side by side, filled to ``length``."""
    columns = {}
    for name, (fill, _) in FILLS.items():
        columns[name] = torch.cat([side_by_side([targets.columns()[name] for targets in row], length, fill) for row in rows])
    return Targets(columns, [image_id for row in rows for targets in row for image_id in targets.image_ids])


def side_by_side(parts: Sequence[Tensor], length: int, fill: float) -> Tensor:
    """``[1, length]`` from rows ``[1, n]``, filled on the right."""
    row = torch.cat(list(parts), dim=1)
    return torch.nn.functional.pad(row, (0, length - row.shape[1]), value=fill)
