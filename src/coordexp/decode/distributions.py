"""Writes the coordinate distributions of a prediction: sparse, float16, one file a batch.

The layout, and the reader, are :mod:`coordexp.evaluate.distributions`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from coordexp.data.staging import temporary_beside

# Below this a float16 keeps too few digits; what is left out is stated per distribution.
LEAST_PROBABILITY: Final = 1e-4


def write_distributions(folder: Path, start: int, found: Sequence[tuple[str, Sequence[Tensor]]], *, num_bins: int) -> None:
    """Write ``<start>.npz``, ``start`` being the index of the batch's first record; ``found`` are image ids with ``[S, K]`` per
    object, S its number of values.

    Sparse rows: row r has the bins ``bins[indptr[r]:indptr[r + 1]]`` with the probabilities ``probs`` (float16), at
    least ``LEAST_PROBABILITY`` each; ``rest`` is what was left out. ``image``, ``object``, ``slot`` say whose it is.
    """
    rows = [(n, o, s, p[s]) for n, (_, objects) in enumerate(found) for o, p in enumerate(objects) for s in range(len(p))]
    kept = [(p >= LEAST_PROBABILITY).nonzero().squeeze(1) for *_, p in rows]
    probs = [p[bins] for (*_, p), bins in zip(rows, kept, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(folder / f"{start:08d}")
    with temporary.open("xb") as file:
        np.savez_compressed(
            file,
            image_ids=np.array([image_id for image_id, _ in found], dtype=np.str_),
            num_bins=np.array(num_bins),
            image=np.array([r[0] for r in rows], dtype=np.int32),
            object=np.array([r[1] for r in rows], dtype=np.int32),
            slot=np.array([r[2] for r in rows], dtype=np.int16),
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
