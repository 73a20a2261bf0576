"""``coordexp doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, examples
from coordexp.terminal import Terminal, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordexp.doctor.checks import Check

EXAMPLES = examples(
    "coordexp doctor",
    "coordexp doctor models/qwen --data data/train.jsonl",
    "coordexp doctor --data data/val.jsonl --predictions runs/a/predictions.jsonl",
)
_MARKS = {"ok": ("ok", "green"), "warning": ("WARN", "yellow"), "fail": ("FAIL", "bold red"), "skipped": ("skip", "dim")}


def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CHECKPOINT]", help="A model, checkpoint or adapter folder, or a run directory.", show_default="none"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Records, or another tool's JSONL or JSON with boxes.", show_default="none")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="predictions.jsonl made from the records of --data.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, and what else is given, for what spoils a run. Exit code 1 if a check fails."""
    from coordexp.doctor.checks import failed, to_json
    from coordexp.doctor.examine import examine

    checks = examine(checkpoint, data, predictions)
    if as_json:
        typer.echo(to_json(checks), nl=False)
    else:
        _print(checks)
    if failed(checks):
        raise typer.Exit(1)


def _print(checks: Sequence[Check]) -> None:
    from rich.text import Text

    console = Terminal()
    group = ""
    for check in checks:
        head, _, what = check.name.partition(".")
        if head != group:
            console.print(("\n" if group else "") + head, style="bold")
            group = head
        mark, color = _MARKS[check.outcome]
        console.print(Text.assemble("  ", (f"{mark:4}", color), plain(f" {what}: {check.seen}")), soft_wrap=True)
        if check.advice:
            console.print(f"       do: {check.advice}", soft_wrap=True)
    counts = {outcome: sum(check.outcome == outcome for check in checks) for outcome in _MARKS}
    console.print("\n" + ", ".join(f"{number} {outcome}" for outcome, number in counts.items()))
