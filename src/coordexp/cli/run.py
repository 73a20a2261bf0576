"""``coordexp run`` and ``coordexp train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Overrides, Overwrite

Experiment = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="An experiment file.")]
OutputDir = Annotated[Path | None, typer.Option(help="Run directory (default: output_dir/name of the experiment).")]


def run(experiment: Experiment, overrides: Overrides = None, output_dir: OutputDir = None, overwrite: Overwrite = False) -> None:
    """Run an experiment: data, model, train, predict, evaluate, report."""
    _start(experiment, overrides, output_dir, overwrite, until=None)


def train(experiment: Experiment, overrides: Overrides = None, output_dir: OutputDir = None, overwrite: Overwrite = False) -> None:
    """Run an experiment up to its trained model."""
    _start(experiment, overrides, output_dir, overwrite, until="train")


def _start(experiment: Path, overrides: list[str] | None, output_dir: Path | None, overwrite: bool, *, until: str | None) -> None:
    from coordexp.config.load import load_config

    config = load_config(experiment, overrides)
    from coordexp import experiment as root

    run_dir = output_dir or Path(config.output_dir) / config.name
    if root.run(config, run_dir, command=sys.argv, overwrite=overwrite, until=until):
        raise typer.Exit(1)
