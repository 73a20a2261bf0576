"""``coordexp init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import examples, say

EXAMPLES = examples("coordexp init my-run", "coordexp init my-data --kind detection")


def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files go; made where it is missing.")],
    kind: Annotated[str, typer.Option(help="demo (made scenes, a tiny model, a CPU) or detection (your data, a Qwen3-VL).")] = "demo",
) -> None:
    """Write a commented experiment to start from, and a README that says what to do next."""
    from coordexp.errors import ConfigError
    from coordexp.starter.write import KINDS, write_starter

    chosen = next((name for name in KINDS if name == kind), None)
    if chosen is None:
        raise ConfigError(f"--kind: expected {' or '.join(KINDS)}, got {kind}")
    experiment, readme = write_starter(folder, chosen)
    say(f"written: {experiment}, {readme}")
    say(f"next: cd {folder} && coordexp run {experiment.name}" if chosen == "demo" else f"next: read {readme}")
