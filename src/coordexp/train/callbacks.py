"""Callbacks: the JSONL log and the progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class JsonlLog(TrainerCallback):
    """Appends one flat object per log event to ``path``; the first row is the header."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        if not path.exists():
            self._append({"schema": 1, "kind": "header", **header})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Write the event with its step."""
        if state.is_world_process_zero and logs:
            self._append({"step": state.global_step, **logs})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class ProgressBar(TrainerCallback):
    """One live line with loss and coordinate error; on a pipe, one plain line per evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the bar."""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("  training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Advance."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the newest loss and coordinate error."""
        logs = logs or {}
        if self.progress is not None and "loss" in logs:
            note = f"loss {logs['loss']:.3f}  coord error {logs['coord_dist/median_bin_mae']:.1f} bins"
            self.progress.update(self.task, note=note)
        if "eval_loss" in logs and state.is_world_process_zero:
            self.console.print(
                f"  step {state.global_step}/{state.max_steps}: eval loss {logs['eval_loss']:.3f}, "
                f"coord error {logs['eval_coord_dist/median_bin_mae']:.1f} bins, "
                f"coord mass {logs['eval_coord_softce_w1/coord_vocab_mass']:.4f}, desc acc {logs['eval_desc_token_acc']:.3f}",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar, also after an interruption."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
