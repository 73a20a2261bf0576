"""What several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from coordexp.errors import ConfigError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the experiment.")]


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar as a callback ``(done, total)``, on stderr; nothing is drawn on a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
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
