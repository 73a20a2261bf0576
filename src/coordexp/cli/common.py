"""What several commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from coordexp.errors import ConfigError
from coordexp.terminal import Terminal, plain

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the experiment; repeatable.", show_default="none"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.")]


class Group(TyperGroup):
    """Lists its commands with the whole first sentence of their help, not with what one line holds of it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        rows = [(name, command.get_short_help_str(10_000)) for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def say(text: str, *, err: bool = False) -> None:
    """A line for a person; names in it are shown as text, control characters as escapes."""
    typer.echo(plain(text), err=err)


def examples(*lines: str) -> str:
    """The epilog of a command: lines to copy. ``\\b`` keeps the line breaks."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))


def end_worker() -> None:
    """End here a process other than the first of a torchrun; its work is done. Nothing happens in the first one.

    Threads of torch can abort the interpreter's own teardown, and torchrun would then stop the first process, which still writes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def model_folder(path: Path) -> Path:
    """``path``, unless it is a run directory: those hold several models.

    Raises:
        ConfigError: a run directory, with the model in it that is probably meant.
    """
    from coordexp.runs.manifest import MANIFEST

    if (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        final = path / "checkpoints" / "final"
        there = f"name its model: {final}" if final.is_dir() else "it has no checkpoints/final: its training has not finished"
        raise ConfigError(f"{path} is a run directory: {there}")
    return path


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar as a callback ``(done, total)``, on stderr; nothing is drawn on a pipe."""
    from rich.progress import Progress

    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def flags(section: str) -> Iterator[None]:
    """Around the making of options from flags: a component's complaint about ``section.some_key`` names ``--some-key``.

    Raises:
        ConfigError: for the component's ValueError.
    """
    try:
        yield
    except ValueError as error:
        pattern = rf"{re.escape(section)}\.(\w+)"
        raise ConfigError(re.sub(pattern, lambda match: "--" + match[1].replace("_", "-"), str(error))) from None
