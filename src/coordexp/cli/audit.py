"""``coordexp audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, examples

if TYPE_CHECKING:
    from coordexp.runs.audit import Audit

EXAMPLES = examples(
    "coordexp audit runs/demo",
    "coordexp audit output/v0/logging.jsonl --json",
    "coordexp audit trainer_state.json --html --out audit.html",
)

_COLORS = {"severe": "bold red", "warning": "yellow", "info": "blue"}


def audit(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run directory, logging.jsonl, trainer_state.json, or TensorBoard events.")
    ],
    as_json: AsJson = False,
    html: Annotated[bool, typer.Option("--html", help="Write a page as well: audit.html in a run directory, else here.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the page goes.", show_default="audit.html")] = None,
) -> None:
    """Check a run's log for what makes its numbers wrong. Exit code 1 on a severe finding."""
    from coordexp.errors import DataError
    from coordexp.runs.audit import audit as read_and_judge
    from coordexp.runs.audit import audit_run, is_run, write_page

    if not path.exists():
        raise DataError(f"{path}: no such file or folder: expected a run directory or a log")
    run = is_run(path)
    result = audit_run(path) if run else read_and_judge(path)
    if as_json:
        typer.echo(result.text(), nl=False)
    else:
        _print(result)
    if html or out is not None:
        page = write_page(result, out or (path if run else Path()) / "audit.html")
        typer.echo(f"page: {page}", err=as_json)
    if result.severe:
        raise typer.Exit(1)


def _print(result: Audit) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    findings, (train, evaluation) = result.of("finding"), result.rows
    console.print(f"{escape(result.name)} ({result.source}): {train} training rows, {evaluation} evaluation rows")
    for note in result.notes:
        console.print(f"  [dim]note: {escape(note)}[/dim]")
    for j in findings:
        color = _COLORS[j.severity]
        console.print(f"\n[{color}]{j.severity.upper()}[/{color}] {j.rule.code} [bold]{escape(j.rule.title)}[/bold]")
        for item in j.verdict.evidence:
            place = f" [dim]({escape(item.where)})[/dim]" if item.where else ""
            console.print(f"  {escape(item.what)}{place}")
            if item.sure:
                console.print(f"    [dim]how sure: {escape(item.sure)}[/dim]")
        console.print(f"  change: {escape(j.rule.advice)}")
        console.print(f"  [dim]{j.rule.anchor}[/dim]")
    console.print(f"\n{len(findings)} finding{'s' * (len(findings) != 1)}, {len(result.of('passed'))} rules passed")
    console.print(escape(result.missing()))
