"""``coordexp ab``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Overrides, examples
from coordexp.errors import ConfigError
from coordexp.terminal import Terminal

EXAMPLES = examples("coordexp ab experiments/ab_seed.yaml", "coordexp ab experiments/ab_seed.yaml --gpus 0,1,2,3")


def ab(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="An experiment file with a section arms.")],
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the A/B.", show_default="output_dir/name of the file")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each on its share of the cores.")] = 1,
    gpus: Annotated[str | None, typer.Option(metavar="0,1", help="One run at a time on each of these GPUs.", show_default="none")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run every arm again; warm-up runs are kept.")] = False,
) -> None:
    """Run every arm of an A/B at every seed, then compare them. The same command goes on where it stopped."""
    if gpus is not None and jobs != 1:
        raise ConfigError("--gpus and --jobs: one run goes to each GPU: give one of them")
    places = () if gpus is None else tuple(part.strip() for part in gpus.split(","))
    if any(not part.isdigit() for part in places) or len(set(places)) != len(places):
        raise ConfigError(f"--gpus: expected distinct indices separated by commas, such as 0,1, got {gpus!r}")
    from coordexp.config.arms import load_ab

    plan = load_ab(experiment, overrides)
    from coordexp.ab import run_ab

    console = Terminal()
    root = output_dir or Path(plan.output_dir) / plan.name
    tasks = run_ab(plan, root, jobs=jobs, gpus=places, overwrite=overwrite, console=console)
    failed = [task.label for task in tasks if task.state != "complete"]
    from coordexp.runs.compare import compare, write_comparison
    from coordexp.runs.groups import read_groups

    result = compare(read_groups([root]))
    from coordexp.cli.compare import show

    show(result, console)
    for path in write_comparison(result, root):
        console.print(str(path), soft_wrap=True)
    if failed:
        console.print(f"failed, and not in the comparison: {', '.join(failed)}", soft_wrap=True)
        raise typer.Exit(1)
