"""The files of a prediction while it is made: settings beside it, parts by process, all of it resumable.

``OUT.settings.json`` says what the prediction is made with; ``OUT.part-R-of-W`` holds the finished batches of
process R; the parts are put together, in order, as ``OUT`` when every process is done.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coordexp.data.records import Record
from coordexp.data.staging import atomic_text, read_json
from coordexp.decode.distributions import drop_distributions
from coordexp.errors import ConfigError, DataError
from coordexp.evaluate.distributions import distributions_folder
from coordexp.evaluate.origin import settings_path

_DISTRIBUTIONS = re.compile(r"\d{8}\.npz|\..*\.tmp")


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

    def close(self) -> None:
        """Leave the others: threads of the group that outlive the interpreter would abort it."""
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def agree(self, fault: str | None) -> None:
        """Wait for the first process, and stop with it: ``fault`` is its reason, None to go on. Nobody is left at a barrier.

        Raises:
            ConfigError: the first process's reason, in every process.
        """
        reasons = [fault]
        if self.world > 1:
            torch.distributed.broadcast_object_list(reasons, src=0)
        if reasons[0] is not None:
            raise ConfigError(reasons[0])

    def total(self, counts: Sequence[int]) -> list[int]:
        """Sums over all processes."""
        if self.world == 1:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.long)
        torch.distributed.all_reduce(sums)
        return [int(n) for n in sums]

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
        return settings_path(self.path)

    @property
    def distributions(self) -> Path:
        """Folder of the coordinate distributions."""
        return distributions_folder(self.path)

    @property
    def calibration_path(self) -> Path:
        """The calibration of its scores, if one was given."""
        return self.path.with_name(self.path.name + ".calibration.json")

    def part(self, rank: int) -> Path:
        """Finished batches of one process."""
        return self.path.with_name(f"{self.path.name}.part-{rank}-of-{self.workers.world}")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the settings file, so that no second prediction writes here: processes may outlive a killed torchrun.

        Raises:
            ConfigError: another prediction holds it.
        """
        with self.settings_path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path} is being written by another prediction: wait for it, or end it") from None
            except OSError as error:
                # Some network file systems know no locks; nothing can be told there.
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                    raise
            yield

    def prepare(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        """Begin, or check that what is there was begun with the same settings. One process only.

        Raises:
            ConfigError: a file made with other settings, not by this command (with ``overwrite`` too), or by one that is still at work.
        """
        if self.path.is_dir():
            raise ConfigError(f"{self.path}: expected the name of a file for --out, got a folder")
        if self.settings_path.is_file():
            with self.alone():
                pass
        if overwrite:
            self._remove()
        for left in self.distributions.glob(".*.tmp"):
            left.unlink()
        if self.settings_path.is_file():
            self._compare(settings)
            if self.path.exists():
                self._remove_parts()  # killed after the last step of putting them together
            return
        if self.path.exists() or any(self._parts()):
            raise ConfigError(
                f"{self.path} or a part of it exists without {self.settings_path.name}: choose another --out or pass --overwrite"
            )
        with atomic_text(self.settings_path) as file:
            file.write(json.dumps(settings, indent=1, sort_keys=True) + "\n")

    def _compare(self, settings: dict[str, Any]) -> None:
        try:
            there = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.settings_path}: expected JSON ({error}): choose another --out or pass --overwrite") from error
        here = json.loads(json.dumps(settings))
        if not isinstance(there, dict) or there != here:
            names = sorted(k for k in {*there, *here} if there.get(k) != here.get(k)) if isinstance(there, dict) else []
            said = ", ".join(f"{k}: {_short(there.get(k))} there, {_short(here.get(k))} here" for k in names)
            raise ConfigError(
                f"{self.path} was begun with other settings ({said or 'not an object'}): choose another --out or pass --overwrite"
            )

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(self.path.name) + r"\.part-\d+-of-\d+")
        return [path for path in self.path.parent.iterdir() if name.fullmatch(path.name)] if self.path.parent.is_dir() else []

    def _remove_parts(self) -> None:
        for part in self._parts():
            part.unlink()

    def _remove(self) -> None:
        """Make room; only what this command wrote is removed."""
        for path in (self.path, self.settings_path, self.calibration_path, *self._parts()):
            if path.is_symlink() or (path.exists() and not self._is_ours(path)):
                raise ConfigError(f"{path}: was not written by coordexp predict, and is left as it is: choose another --out")
        kept = [entry.name for entry in self.distributions.iterdir()] if self.distributions.is_dir() else []
        foreign = [name for name in kept if not _DISTRIBUTIONS.fullmatch(name)]
        if self.distributions.is_symlink() or foreign:
            what = f"holds {foreign[0]!r}" if foreign else "is a link"
            raise ConfigError(f"{self.distributions}: {what}, and is left as it is: choose another --out")
        self.path.unlink(missing_ok=True)
        self.settings_path.unlink(missing_ok=True)
        self.calibration_path.unlink(missing_ok=True)
        self._remove_parts()
        if self.distributions.is_dir():
            shutil.rmtree(self.distributions)

    def _is_ours(self, path: Path) -> bool:
        """Whether a file of this prediction's names holds what this command writes there; nothing at all counts too."""
        if path in (self.settings_path, self.calibration_path):
            keys = {"images", "processes", "readout"} if path == self.settings_path else {"kind", "score_source", "boxes"}
            content = read_json(path)
            return isinstance(content, dict) and keys <= content.keys()
        with path.open("rb") as file:
            first = file.readline()
        return not first or _image_id(first) is not None

    def resume(self, records: Sequence[Record], batch_size: int, *, start: int) -> int:
        """Number of ``records``, those of this process, that are done; ``start`` is the index of the first among all.

        Batches are written whole, so every line counts. Only where a line is cut off has a batch been: what stands of it
        is removed, and the batch is made again as it would have been.

        Raises:
            DataError: a part that holds other records.
        """
        part = self.part(self.workers.rank)
        lines = part.read_bytes().splitlines(keepends=True) if part.exists() else []
        torn = bool(lines) and not lines[-1].endswith(b"\n")
        whole = lines[:-1] if torn else lines
        done = len(whole) // batch_size * batch_size if torn else len(whole)
        for number, line in enumerate(whole[:done], start=1):
            expected = records[number - 1].image_id if number <= len(records) else None
            if expected is None or _image_id(line) != expected:
                raise DataError(
                    f"{part}:{number}: expected {'no row' if expected is None else f'image {expected!r}'}: pass --overwrite to begin again"
                )
        if torn:
            with part.open("r+b") as file:
                file.truncate(sum(map(len, whole[:done])))
        drop_distributions(self.distributions, range(start + done, start + len(records)))
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
        self._remove_parts()


def _image_id(line: bytes) -> object:
    """Of a row; None if it is no row of a prediction, after damage to the file."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row.get("image_id") if isinstance(row, dict) and "score_source" in row else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
