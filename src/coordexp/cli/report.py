"""``coordexp report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import examples, say

EXAMPLES = examples("coordexp report runs/demo", "coordexp report runs/demo --images 40")


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    images: Annotated[int, typer.Option(min=0, help="Number of pictures; at least 8 are shown where there are as many.")] = 12,
) -> None:
    """Write report.html of a run directory again."""
    from coordexp.errors import ConfigError
    from coordexp.runs.manifest import MANIFEST
    from coordexp.runs.options import ReportOptions
    from coordexp.runs.report import write_report

    if not (run_dir / MANIFEST).is_file():
        raise ConfigError(f"{run_dir}: expected a run directory, found no {MANIFEST} in it")
    say(f"report: {write_report(run_dir, ReportOptions(images=images))}")
