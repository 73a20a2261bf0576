"""Callbacks: the JSONL log and the progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from coordexp.data.staging import atomic_text


class JsonlLog(TrainerCallback):
    """Appends one flat object per log event to ``path``; the first row is the header. One process of a run has one."""

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


def rewind_log(path: Path, step: int) -> int:
    """Take back the rows that a run wrote after ``step``, from which it goes on, and a torn last line; returns how many.

    With them gone the finished log reads like that of an uninterrupted run.
    """
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        if not line.endswith("\n"):
            continue
        row = json.loads(line)
        # The summary that an interrupted session wrote when it left.
        if row.get("kind") == "header" or (row["step"] <= step and "train_runtime" not in row):
            kept.append(line)
    if len(kept) < len(lines):
        with atomic_text(path) as file:
            file.writelines(kept)
    return len(lines) - len(kept)


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
            if "speed/tokens_per_s" in logs:
                note += f"  {logs['speed/samples_per_s']:.1f} samples/s  {logs['speed/tokens_per_s']:.0f} tokens/s"
            self.progress.update(self.task, note=note)
        if "probe/parse_rate" in logs and state.is_world_process_zero:
            points = "probe/point_acc" in logs
            met = f"points on the object {logs['probe/point_acc']:.3f}" if points else f"F1@.5 {logs['probe/f1_50']:.3f}"
            self.console.print(
                f"  step {state.global_step}/{state.max_steps}: generated {met}, "
                f"{logs['probe/objects_per_image']:.1f} objects an image, {logs['probe/parse_rate']:.0%} parsed",
                highlight=False,
                soft_wrap=True,
            )
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
