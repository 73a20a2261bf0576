"""``coordexp audit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, examples
from coordexp.terminal import Terminal, plain

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
    from rich.text import Text

    def show(*parts: str | tuple[str, str]) -> None:
        cleaned = (plain(part) if isinstance(part, str) else (plain(part[0]), part[1]) for part in parts)
        console.print(Text.assemble(*cleaned), soft_wrap=True)

    console = Terminal()
    findings, (train, evaluation) = result.of("finding"), result.rows
    show(f"{result.name} ({result.source}): {train} training rows, {evaluation} evaluation rows")
    for note in result.notes:
        show((f"  note: {note}", "dim"))
    for j in findings:
        show("\n", (j.severity.upper(), _COLORS[j.severity]), f" {j.rule.code} ", (j.rule.title, "bold"))
        for item in j.verdict.evidence:
            show(f"  {item.what}", (f" ({item.where})" if item.where else "", "dim"))
            if item.sure:
                show((f"    how sure: {item.sure}", "dim"))
        show(f"  change: {j.rule.advice}")
        show((f"  {j.rule.anchor}", "dim"))
    show(f"\n{len(findings)} finding{'s' * (len(findings) != 1)}, {len(result.of('passed'))} rules passed")
    show(result.missing())
