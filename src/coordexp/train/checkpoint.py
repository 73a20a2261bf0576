"""Checkpoints that are whole or not there, and a trainer that goes on from one as if it had never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from coordexp.errors import ConfigError

STATE: Final = "trainer_state.json"
# What a resumed run must share with the one that wrote the checkpoint.
IDENTITY: Final = "resume.json"
_NAME: Final = re.compile(r"checkpoint-(\d+)")
_TMP: Final = ".tmp"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder by step; a folder that ends in ``.tmp`` was never finished and is none."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def remove_partial(folder: Path) -> None:
    """Delete what an interrupted save or an interrupted removal left."""
    for path in folder.glob(f"*{_TMP}") if folder.is_dir() else ():
        shutil.rmtree(path)


def publish(staging: Path, final: Path) -> None:
    """Give a filled folder its final name: every file and folder is flushed to disk before, the parent after."""
    for root, _, files in os.walk(staging, topdown=False):
        for name in files:
            _fsync(Path(root) / name)
        _fsync(Path(root))
    if final.exists():
        _remove(final)
    os.replace(staging, final)
    _fsync(final.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    # Renamed first: a removal that is interrupted must not leave half a checkpoint under its name.
    doomed = path.with_name(path.name + ".old" + _TMP)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def rotate(folder: Path, *, limit: int | None, keep: int | None) -> None:
    """Remove the oldest checkpoints over ``limit``; never the newest, nor that of step ``keep`` (the best one)."""
    if limit is None:
        return
    found = checkpoints(folder)
    spare = [path for path in found[:-1] if checkpoint_step(path) != keep]
    for path in spare[: max(len(found) - max(limit, 1), 0)]:
        _remove(path)


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of other data, another packing plan or another number of processes.

    Raises:
        ConfigError: what differs, one line each; or a checkpoint without the files of one.
    """
    missing = [name for name in (STATE, IDENTITY) if not (checkpoint / name).is_file()]
    if missing:
        raise ConfigError(
            f"{checkpoint}: not a checkpoint of coordexp ({', '.join(missing)} missing): delete the folder to use an older one"
        )
    found = json.loads((checkpoint / IDENTITY).read_text(encoding="utf-8"))
    problems = [
        f"{checkpoint.name}: {name}: made with {found.get(name)}, this start has {value}: an exact continuation needs the same; "
        "start a new run in another output_dir"
        for name, value in identity.items()
        if found.get(name) != value
    ]
    if problems:
        raise ConfigError(problems)


class ResumableTrainer(Trainer):
    """``Trainer`` with whole checkpoints and an exact continuation.

    Every file of a checkpoint is written to ``checkpoint-N.tmp``, flushed and renamed; model weights are safetensors, optimizer,
    scheduler and random states as ``Trainer`` writes them and reads with ``weights_only=True``. Beside them: per rank the running
    state of the unfinished log window (:meth:`window_state`), and ``resume.json`` with ``identity``.
    """

    identity: dict[str, Any]
    keep_checkpoints: int | None

    def window_state(self) -> dict[str, Any]:
        """Tensors and plain values of this rank that the next step of an uninterrupted run would start from."""
        raise NotImplementedError

    def restore_window(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`window_state`."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Called before the batches of an epoch are drawn, resumed in its middle or not."""
        raise NotImplementedError

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # accelerate tells the data set its epoch only where the sampler has none, and a resumed loader not at all.
        self.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder = Path(self._get_output_dir(trial=trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        staging = final.with_name(final.name + _TMP)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging))
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        torch.save(self.window_state(), staging / self._window_name())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_state(staging, final)
            publish(staging, final)
            rotate(folder, limit=self.keep_checkpoints, keep=self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _window_name(self) -> str:
        return f"window_{self.args.process_index}.pt"

    def _save_state(self, staging: Path, final: Path) -> None:
        best = None if self.state.best_global_step is None else final.with_name(f"checkpoint-{self.state.best_global_step}")
        if best is not None and (best == final or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
        self.state.save_to_json(str(staging / STATE))
        (staging / IDENTITY).write_text(json.dumps(self.identity, indent=1) + "\n", encoding="utf-8")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint must fill the model; a tied weight is in it under one of its names."""
        tensors = self.model.state_dict(keep_vars=True)
        filled = {id(tensor) for name, tensor in tensors.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if id(tensors[name]) not in filled]
        if missing or load_result.unexpected_keys:
            wrong = [*missing, *load_result.unexpected_keys]
            raise ConfigError(f"the checkpoint's weights do not fit the model: {', '.join(wrong[:5])}: it belongs to another model folder")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.restore_window(torch.load(Path(checkpoint) / self._window_name(), weights_only=True))
