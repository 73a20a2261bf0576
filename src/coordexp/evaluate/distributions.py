"""The coordinate distributions that ``coordexp predict --save-distributions`` leaves beside a prediction file. NumPy only.

A folder ``<file>.distributions`` of ``*.npz`` with ``image_ids``, ``num_bins`` and, for each of R rows, ``image`` (index into
``image_ids``), ``object``, ``slot`` (0..3 for x1, y1, x2, y2; of points and polygons x and y in turn); row r has the bins
``bins[indptr[r]:indptr[r + 1]]`` with the probabilities ``probs``, and ``rest [R]`` is the probability that was left out.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import DataError

_FIELDS: Final = ("image_ids", "num_bins", "image", "object", "slot", "indptr", "bins", "probs", "rest")
# What NumPy, zipfile and zlib raise for damaged or hostile archives; RuntimeError: encrypted, MemoryError: a shape that nothing holds.
_UNREADABLE: Final = (
    OSError, LookupError, ValueError, TypeError, EOFError, OverflowError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    struct.error,
)  # fmt: skip
_BOX_SLOTS: Final = 4


class SlotDistribution(NamedTuple):
    """One coordinate: the kept ``bins [n]``, ascending, their ``probs [n]``, and the probability ``rest`` that was left out."""

    bins: NDArray[np.int64]
    probs: NDArray[np.float64]
    rest: float


@dataclass(frozen=True)
class SavedDistributions:
    """One image: ``rows`` by ``(object, slot)``, an object being the index in the image's row of the prediction file."""

    image_id: str
    num_bins: int
    rows: dict[tuple[int, int], SlotDistribution]

    @property
    def objects(self) -> int:
        """Number of objects."""
        return 1 + max((item for item, _ in self.rows), default=-1)

    def dense(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """``probs [objects, S, num_bins]``, 0 where nothing was kept, and ``rest [objects, S]``; S is 4, more only with polygons."""
        slots = max([_BOX_SLOTS, *(slot + 1 for _, slot in self.rows)])
        probs = np.zeros((self.objects, slots, self.num_bins))
        rest = np.zeros((self.objects, slots))
        for (item, slot), row in self.rows.items():
            probs[item, slot, row.bins] = row.probs
            rest[item, slot] = row.rest
        return probs, rest


def distributions_folder(predictions: Path) -> Path:
    """Where the distributions of a prediction file lie, if they were kept."""
    return predictions.with_name(predictions.name + ".distributions")


def read_distributions(folder: Path) -> Iterator[SavedDistributions]:
    """What was kept, image by image, in the order of the prediction file.

    Raises:
        DataError: no such folder, a file that is not what this module describes, or an image twice.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(f"{folder}: expected the folder that `coordexp predict --save-distributions` writes, found no .npz there")
    seen: set[str] = set()
    for path in paths:
        for item in _read(path):
            if item.image_id in seen:
                raise DataError(f"{_name(path)}: image {item.image_id!r} is in an earlier file too: predict again with --overwrite")
            seen.add(item.image_id)
            yield item


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _read(path: Path) -> list[SavedDistributions]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            content: dict[str, Any] = {name: file[name] for name in _FIELDS}
        fault = _fault(content)
        found = _unpack(content) if fault is None else []
    except _UNREADABLE as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{_name(path)}: expected distributions of a prediction, got a file that fails with: {why}") from error
    if fault:
        raise DataError(f"{_name(path)}: expected arrays that fit together, got {fault}: predict again with --overwrite")
    return found


def _fault(content: dict[str, Any]) -> str | None:
    """What does not fit, or None."""
    for name, array in content.items():
        wanted = (0, "iu") if name == "num_bins" else (1, "US") if name == "image_ids" else (1, "iuf")
        # An empty array has whatever type NumPy gives it.
        if array.ndim != wanted[0] or (array.size and array.dtype.kind not in wanted[1]):
            return f"{name} of type {array.dtype.str[:20]} with {array.ndim} axes"
    ends, bins, count = content["indptr"], content["bins"], len(content["image"])
    if len(ends) != count + 1 or any(len(content[name]) != count for name in ("object", "slot", "rest")):
        return f"{len(ends) - 1} rows of bins for {count} coordinates"
    if int(ends[0]) != 0 or int(ends[-1]) != len(bins) or len(bins) != len(content["probs"]) or bool((np.diff(ends) < 0).any()):
        return "bins that do not fill the rows"
    for name, limit in (("image", len(content["image_ids"])), ("slot", 2**15), ("bins", int(content["num_bins"])), ("object", 2**31)):
        values = content[name]
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < limit:
            return f"{name} {int(values.min())} to {int(values.max())}, where {limit - 1} is the last"
    return None


def _unpack(content: dict[str, Any]) -> list[SavedDistributions]:
    num_bins, ends = int(content["num_bins"]), content["indptr"].tolist()
    made = [SavedDistributions(str(image_id), num_bins, {}) for image_id in content["image_ids"].tolist()]
    bins, probs = content["bins"].astype(np.int64), content["probs"].astype(np.float64)
    places = zip(*(content[name].tolist() for name in ("image", "object", "slot", "rest")), strict=True)
    for r, (image, item, slot, rest) in enumerate(places):
        own = slice(ends[r], ends[r + 1])
        made[image].rows[item, slot] = SlotDistribution(bins[own], probs[own], rest)
    return made
