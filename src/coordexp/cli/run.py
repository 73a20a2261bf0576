"""``coordexp run`` and ``coordexp train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Overrides, Overwrite, end_worker, examples
from coordexp.errors import ConfigError

Experiment = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="An experiment file.")]
OutputDir = Annotated[Path | None, typer.Option(help="Run directory.", show_default="output_dir/name of the experiment")]
RUN_EXAMPLES = examples(
    "coordexp run experiments/demo.yaml",
    "coordexp run experiments/demo.yaml --set train.max_steps=20 --set name=short",
    "coordexp run experiments/demo.yaml --resume",
    "torchrun --nproc-per-node 8 -m coordexp run detection.yaml",
)
TRAIN_EXAMPLES = examples(
    "coordexp train experiments/demo.yaml --output-dir runs/second --overwrite",
    "coordexp train experiments/demo.yaml --output-dir runs/second --resume",
)
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run stopped, from its last complete checkpoint.")]


def run(
    experiment: Experiment,
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Run an experiment: data, model, train, predict, evaluate, report."""
    _start(experiment, overrides, output_dir, overwrite, resume, until=None)


def train(
    experiment: Experiment,
    overrides: Overrides = None,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
) -> None:
    """Run an experiment up to its trained model."""
    _start(experiment, overrides, output_dir, overwrite, resume, until="train")


def _start(
    experiment: Path, overrides: list[str] | None, output_dir: Path | None, overwrite: bool, resume: bool, *, until: str | None
) -> None:
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite: one continues the run, the other deletes it: give one of them")
    from coordexp.config.load import load_config

    config = load_config(experiment, overrides)
    from coordexp import experiment as root

    run_dir = output_dir or Path(config.output_dir) / config.name
    missed = root.run(config, run_dir, command=sys.argv, overwrite=overwrite, resume=resume, until=until)
    end_worker()
    if missed:
        raise typer.Exit(1)
