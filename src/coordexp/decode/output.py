"""The files of a prediction while it is made: settings beside it, parts by process, all of it resumable.

``OUT.settings.json`` says what the prediction is made with; ``OUT.part-R-of-W`` holds the finished batches of
process R; both parts are put together, in order, as ``OUT`` when every process is done.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordexp.data.records import Record
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, DataError

# Below this a float16 keeps too few digits; what is left out is stated per distribution.
LEAST_PROBABILITY = 1e-4


@dataclass(frozen=True)
class Workers:
    """This process among those of a ``torchrun``; one alone otherwise."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Workers:
        """Join the other processes, if torchrun started several."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        from datetime import timedelta

        # The slowest shard may be hours behind; a process that dies is noticed by torchrun.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        return cls(torch.distributed.get_rank(), world)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def share(self, count: int) -> range:
        """Indices of this process: one contiguous block, so that the parts join in order."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)


@dataclass(frozen=True)
class Output:
    """Where a prediction goes."""

    path: Path
    workers: Workers

    @property
    def settings_path(self) -> Path:
        """What it is made with, as JSON."""
        return self.path.with_name(self.path.name + ".settings.json")

    @property
    def distributions(self) -> Path:
        """Folder of the coordinate distributions."""
        return self.path.with_name(self.path.name + ".distributions")

    def part(self, rank: int) -> Path:
        """Finished batches of one process."""
        return self.path.with_name(f"{self.path.name}.part-{rank}-of-{self.workers.world}")

    def prepare(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Begin, or check that what is there was begun with the same settings. One process only.

        Raises:
            ConfigError: a file made with other settings, or not by this command.
        """
        if self.path.is_dir():
            raise ConfigError(f"{self.path}: expected the name of a file for --out, got a folder")
        if overwrite:
            self._remove()
        if self.settings_path.is_file():
            self._compare(settings)
            return
        if self.path.exists():
            raise ConfigError(f"{self.path} exists and was not made by this command: choose another --out or pass --overwrite")
        with atomic_text(self.settings_path) as file:
            file.write(json.dumps(settings, indent=1, sort_keys=True) + "\n")

    def _compare(self, settings: dict[str, Any]) -> None:
        try:
            there = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.settings_path}: expected JSON ({error}): choose another --out or pass --overwrite") from error
        here = json.loads(json.dumps(settings))
        if not isinstance(there, dict) or there != here:
            names = sorted(k for k in {*there, *here} if there.get(k) != here.get(k)) if isinstance(there, dict) else []
            said = ", ".join(f"{k}: {there.get(k)!r} there, {here.get(k)!r} here" for k in names)
            raise ConfigError(f"{self.path} was begun with other settings ({said}): choose another --out or pass --overwrite")

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.settings_path.unlink(missing_ok=True)
        for part in self.path.parent.glob(f"{self.path.name}.part-*-of-*"):
            part.unlink()
        if self.distributions.is_dir():
            shutil.rmtree(self.distributions)

    def resume(self, records: Sequence[Record], batch_size: int) -> int:
        """Number of records of this process that are done. What a killed process left of a batch is cut off.

        Raises:
            DataError: a part that holds other records.
        """
        part = self.part(self.workers.rank)
        if not part.exists():
            return 0
        lines = part.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        done = len(whole) if len(whole) == len(records) else len(whole) // batch_size * batch_size
        for number, (line, record) in enumerate(zip(whole[:done], records, strict=False), start=1):
            if json.loads(line)["image_id"] != record.image_id:
                raise DataError(f"{part}:{number}: expected image {record.image_id!r}: pass --overwrite to begin again")
        with part.open("r+b") as file:
            file.truncate(sum(map(len, whole[:done])))
        return done

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a batch to this process's part, on disk when this returns."""
        with self.part(self.workers.rank).open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def merge(self) -> None:
        """Put the parts together. One process only, when all are done."""
        parts = [self.part(rank) for rank in range(self.workers.world)]
        with atomic_text(self.path) as file:
            for part in parts:
                if part.exists():
                    with part.open(encoding="utf-8", newline="\n") as rows:
                        shutil.copyfileobj(rows, file)
        for part in parts:
            part.unlink(missing_ok=True)


def write_distributions(folder: Path, start: int, found: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """One file a batch, ``<index of its first record>.npz``; ``found`` are image ids with ``[4, K]`` per object.

    Sparse rows: row r has the bins ``bins[indptr[r]:indptr[r + 1]]`` with the probabilities ``probs`` (float16), at
    least ``LEAST_PROBABILITY`` each; ``rest`` is what was left out. ``image``, ``object``, ``slot`` say whose it is.
    """
    ids = [image_id for image_id, _ in found]
    rows = [(n, o, s, p[s]) for n, (_, objects) in enumerate(found) for o, p in enumerate(objects) for s in range(4)]
    kept = [(p >= LEAST_PROBABILITY).nonzero().squeeze(1) for *_, p in rows]
    probs = [p[bins] for (*_, p), bins in zip(rows, kept, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{start:08d}.npz"
    temporary = folder / f".{start:08d}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            image_ids=np.array(ids, dtype=np.str_),
            image=np.array([r[0] for r in rows], dtype=np.int32),
            object=np.array([r[1] for r in rows], dtype=np.int32),
            slot=np.array([r[2] for r in rows], dtype=np.int8),
            indptr=np.cumsum([0, *map(len, kept)], dtype=np.int64),
            bins=torch.cat(kept).numpy().astype(np.uint16) if kept else np.zeros(0, np.uint16),
            probs=torch.cat(probs).numpy().astype(np.float16) if probs else np.zeros(0, np.float16),
            rest=np.array([max(0.0, 1.0 - float(p.sum())) for p in probs], dtype=np.float32),
        )
    os.replace(temporary, target)
