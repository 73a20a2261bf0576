"""``coordexp doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, examples, model_folder

if TYPE_CHECKING:
    from coordexp.doctor.base import Check

EXAMPLES = examples(
    "coordexp doctor",
    "coordexp doctor runs/demo/checkpoints/final",
    "coordexp doctor --data annotations/instances_train.json --json",
    "coordexp doctor --data data/mine/test.jsonl --predictions predictions.jsonl",
)
_COLORS = {"ok": "green", "warning": "yellow", "fail": "bold red", "skipped": "dim"}


def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="A model or adapter folder: tokens, table, rows.", show_default="none")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Records, COCO JSON or another tool's annotations: in which convention are its boxes?", show_default="none"),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Predictions for the records of --data: is there a systematic offset, and of what?", show_default="none"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with this machine, a checkpoint, or the coordinates of a file. Exit code 1 when a check fails."""
    from coordexp.doctor.base import failed
    from coordexp.errors import ConfigError

    if predictions is not None and data is None:
        raise ConfigError("--predictions: expected --data with the records they were made for")
    checks = _checks(None if checkpoint is None else model_folder(checkpoint), data, predictions)
    if as_json:
        typer.echo(json.dumps({"checks": [check.row() for check in checks]}, ensure_ascii=False, indent=1))
    else:
        _print(checks)
    if failed(checks):
        raise typer.Exit(1)


def _checks(checkpoint: Path | None, data: Path | None, predictions: Path | None) -> list[Check]:
    """The files first: a mistake in their names is said before anything slow begins."""
    from coordexp.doctor.annotations import read_boxes
    from coordexp.doctor.conventions import check_convention, check_file, check_inside

    boxes = [(path.name, read_boxes(path)) for path in (data, predictions) if path is not None]
    found: list[Check] = []
    for name, read in boxes:
        found += [check_file(read, name=name), check_convention(read, name=name), check_inside(read, name=name)]
    if data is not None and predictions is not None:
        from coordexp.doctor.offsets import check_offset

        found.append(check_offset(predictions, data))
    if checkpoint is not None:
        from coordexp.doctor.checkpoint import check_checkpoint

        found = check_checkpoint(checkpoint) + found
    from coordexp.doctor.machine import check_machine

    return check_machine() + found


def _print(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    for check in checks:
        color = _COLORS[check.outcome]
        console.print(f"[{color}]{check.outcome:<8}[/{color}] {check.code} {escape(check.name)}: {escape(check.seen)}")
        if check.advice and check.outcome != "ok":
            console.print(f"         do: {escape(check.advice)}")
    counts = {name: sum(check.outcome == name for check in checks) for name in _COLORS}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items() if count))
