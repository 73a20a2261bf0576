"""ms-swift's rows, encoded by its template, with the objective's targets beside; and their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch.utils.data import Dataset

from coordexp.codec import CoordCodec
from coordexp.data.targets import Targets, padded, shift
from coordexp.errors import DataError
from coordexp.grammar import ROLE_CODES
from coordexp.integrations.ms_swift.rows import answers_of, name_of, row_targets, token_targets
from coordexp.losses.linear import IGNORE

_TARGETS: Final = "coordexp_targets"
_NAME: Final = "coordexp_name"


@dataclass(frozen=True)
class SwiftSamples(Dataset[dict[str, Any]]):
    """``rows`` (ms-swift's, by number or column) through ``encode`` (its template's), each with its targets.

    Unlike ms-swift's own data set it never takes another row in place of a faulty one: which rows were trained on must be known.
    """

    name: str
    rows: Any
    encode: Callable[..., dict[str, Any]]
    tokenizer: Any
    codec: CoordCodec

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return self.rows[index]
        row = self.rows[index]
        try:
            return self.encoded(row) | {_NAME: name_of(row, f"{self.name}:{index}")}
        except (DataError, ValueError) as error:
            # ms-swift's own complaints, of a row beyond --max_length for one, are ValueErrors.
            raise DataError(f"{self.name} row {name_of(row, str(index))}: {error}") from error

    def encoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The template's encoding of a row, with its targets.

        Raises:
            DataError: what cannot be trained on; see :mod:`coordexp.integrations.ms_swift.rows`.
        """
        targets = row_targets(row, self.codec)
        encoded = self.encode(row, return_length=True)
        if encoded.get("loss_scale") is not None:
            raise DataError("the row has loss weights of its own, which the objective does not know: leave --loss_scale at its default")
        return encoded | {_TARGETS: token_targets(encoded["labels"], answers_of(row), targets, self.tokenizer)}


@dataclass(frozen=True)
class EvenSamples(Dataset[dict[str, Any]]):
    """``samples``, then fillers without labels up to a whole number of batches for every rank: they count nowhere.

    Without them accelerate repeats the first samples, and they would count twice.
    """

    samples: SwiftSamples
    multiple: int

    def __len__(self) -> int:
        return -(-len(self.samples) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index] if index < len(self.samples) else unsupervised(self.samples[0])


def unsupervised(sample: dict[str, Any]) -> dict[str, Any]:
    """The encoded sample with every label off."""
    n, targets = len(sample["labels"]), sample[_TARGETS]
    nan = float("nan")
    off = type(targets)([ROLE_CODES["none"]] * n, [nan] * n, [nan] * n, [-1] * n)
    return sample | {"labels": [IGNORE] * n, _TARGETS: off}


@dataclass(frozen=True)
class SwiftCollator:
    """ms-swift's batch with ``targets`` (:class:`Targets`) in the place of ``labels``."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    padding_side: str

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = [sample[_TARGETS] for sample in samples]
        names = [sample[_NAME] for sample in samples if any(label != IGNORE for label in sample["labels"])]
        # It takes some keys out of the samples.
        batch = self.collate([{k: v for k, v in sample.items() if k not in (_TARGETS, _NAME)} for sample in samples])
        labels = batch.pop("labels")
        rows = {
            "roles": [t.roles for t in targets],
            "centers": [t.centers for t in targets],
            "extents": [t.extents for t in targets],
            "slots": [t.slots for t in targets],
        }
        left = self.padding_side == "left"
        columns = {"labels": labels} | {name: padded(values, name, labels.shape[1], left=left) for name, values in rows.items()}
        return batch | {"targets": Targets({name: shift(values, name) for name, values in columns.items()}, names)}
