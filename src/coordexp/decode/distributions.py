"""The coordinate distributions of a prediction on disk: sparse, float16, one file a batch."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordexp.errors import DataError

# Below this a float16 keeps too few digits; what is left out is stated per distribution.
LEAST_PROBABILITY: Final = 1e-4
_FIELDS: Final = ("image_ids", "num_bins", "image", "object", "slot", "indptr", "bins", "probs", "rest")


@dataclass(frozen=True)
class SavedDistributions:
    """One image. ``probs`` ``[O, 4, K]`` by object of its row and slot (x1, y1, x2, y2), 0 where nothing was kept;
    ``rest`` ``[O, 4]`` is the probability that was left out."""

    image_id: str
    probs: NDArray[np.float32]
    rest: NDArray[np.float32]


def write_distributions(folder: Path, start: int, found: Sequence[tuple[str, Sequence[Tensor]]], *, num_bins: int) -> None:
    """Write ``<start>.npz``, ``start`` being the index of the batch's first record; ``found`` are image ids with ``[4, K]`` per object.

    Sparse rows: row r has the bins ``bins[indptr[r]:indptr[r + 1]]`` with the probabilities ``probs`` (float16), at
    least ``LEAST_PROBABILITY`` each; ``rest`` is what was left out. ``image``, ``object``, ``slot`` say whose it is.
    """
    rows = [(n, o, s, p[s]) for n, (_, objects) in enumerate(found) for o, p in enumerate(objects) for s in range(4)]
    kept = [(p >= LEAST_PROBABILITY).nonzero().squeeze(1) for *_, p in rows]
    probs = [p[bins] for (*_, p), bins in zip(rows, kept, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{start:08d}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            image_ids=np.array([image_id for image_id, _ in found], dtype=np.str_),
            num_bins=np.array(num_bins),
            image=np.array([r[0] for r in rows], dtype=np.int32),
            object=np.array([r[1] for r in rows], dtype=np.int32),
            slot=np.array([r[2] for r in rows], dtype=np.int8),
            indptr=np.cumsum([0, *map(len, kept)], dtype=np.int64),
            bins=torch.cat(kept).numpy().astype(np.uint16) if kept else np.zeros(0, np.uint16),
            probs=torch.cat(probs).numpy().astype(np.float16) if probs else np.zeros(0, np.float16),
            rest=np.array([max(0.0, 1.0 - float(p.sum())) for p in probs], dtype=np.float32),
        )
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"{start:08d}.npz")


def drop_distributions(folder: Path, indices: range) -> None:
    """Delete the files of batches that begin at one of ``indices``: their rows were never written."""
    for path in folder.glob("*.npz"):
        if int(path.stem) in indices:
            path.unlink()


def read_distributions(folder: Path) -> Iterator[SavedDistributions]:
    """What ``coordexp predict --save-distributions`` kept, image by image, in the order of the rows.

    Raises:
        DataError: no such folder, a file that cannot be read, or an image twice.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise DataError(f"{folder}: expected the folder that `coordexp predict --save-distributions` writes, found no .npz there")
    seen: set[str] = set()
    for path in paths:
        for item in _read(path):
            if item.image_id in seen:
                raise DataError(f"{path}: image {item.image_id!r} is in an earlier file too: predict again with --overwrite")
            seen.add(item.image_id)
            yield item


def _read(path: Path) -> list[SavedDistributions]:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in _FIELDS}
        return _unpack(**content)
    except (OSError, KeyError, ValueError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: expected saved distributions ({error}): predict again with --overwrite") from error


def _unpack(
    image_ids: NDArray[np.str_], num_bins: NDArray[np.int64], image: NDArray[np.int32], object: NDArray[np.int32], slot: NDArray[np.int8],
    indptr: NDArray[np.int64], bins: NDArray[np.uint16], probs: NDArray[np.float16], rest: NDArray[np.float32],
) -> list[SavedDistributions]:  # fmt: skip
    made = []
    for n, image_id in enumerate(image_ids.tolist()):
        rows = np.flatnonzero(image == n)
        count = 0 if rows.size == 0 else int(object[rows].max()) + 1
        dense = np.zeros((count, 4, int(num_bins)), dtype=np.float32)
        left = np.zeros((count, 4), dtype=np.float32)
        for r in rows:
            span = slice(indptr[r], indptr[r + 1])
            dense[object[r], slot[r], bins[span]] = probs[span]
            left[object[r], slot[r]] = rest[r]
        made.append(SavedDistributions(image_id, dense, left))
    return made
