"""``coordexp plan``."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, Overrides, examples, progress, say

if TYPE_CHECKING:
    from coordexp.plan.planner import Plan

EXAMPLES = examples(
    "coordexp plan experiments/demo.yaml",
    "coordexp plan detection.yaml --gpus 8 --gpu-memory 80",
    "coordexp plan detection.yaml --gpu-memory 24 --set adapter.kind=lora --json",
)


def plan(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="An experiment file.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of ranks (processes), a GPU each.")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="Memory of a GPU, in GB (10^9 bytes).", show_default="what this machine trains on")
    ] = None,
    levers: Annotated[bool, typer.Option("--levers/--no-levers", help="Try single changes too; without, the answer is quick.")] = True,
    as_json: AsJson = False,
) -> None:
    """Say whether a run will fit into memory, what helps if not, and how many steps it takes. Reads no weights. Exit code 1: no fit."""
    from coordexp.config.load import load_config

    config = load_config(experiment, overrides)
    from coordexp.preflight import preflight

    # Planned for a machine that may be another one.
    preflight(config, here=False)
    from coordexp.plan.planner import Device, Planner

    planner = Planner.of(config, None if config.model.path is None else Path(config.model.path), Device.of(gpu_memory), gpus)
    with progress("trying changes") as show:
        found = planner.plan(brief=not levers, progress=show)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        for line in _table(found):
            say(line)
    if not found.fits:
        raise typer.Exit(1)


def _table(plan: Plan) -> list[str]:
    """At most 80 columns."""
    names = list(plan.memory)
    parts = [part for part in plan.memory[plan.asked].parts if any(one.parts[part] >= 5e6 for one in plan.memory.values())]
    lines = [
        f"trains {plan.trained:,} of {plan.numbers:,} parameters",
        f"longest {plan.unit[:-1]} {plan.longest:,} tokens, {plan.image_tokens:,} of them a picture's",
        f"a step: {plan.window:,} {plan.unit}, about {plan.tokens_a_step:,.0f} tokens",
        f"{plan.steps:,} steps = {plan.epochs:.3g} epochs of {plan.steps_an_epoch:,} steps",
        "",
        f"{'GB a process':<26}" + "".join(f"{name + ('*' if name == plan.asked and len(names) > 1 else ''):>10}" for name in names),
    ]
    lines += [f"{part:<26}" + "".join(_gb(plan.memory[name].parts[part]) for name in names) for part in parts]
    lines += [f"{'total':<26}" + "".join(_gb(plan.memory[name].total) for name in names)]
    lines += [f"most in {plan.memory[plan.asked].moment}" + ("; *: what the experiment asks for" if len(names) > 1 else "")]
    kept = ", ".join(f"{value / 1e9:.2f} {name}" for name, value in plan.activations.items())
    lines.append(f"kept for the backward pass: {kept} gradient checkpointing")
    needed = plan.need * (plan.ranks if plan.device.kind == "cpu" else 1)
    left = plan.device.memory - needed
    lines += [
        "",
        f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {needed / 1e9:.1f} of {plan.device.memory / 1e9:.1f} GB {plan.device.kind.upper()}, "
        + (f"{left / 1e9:.1f} left" if left >= 0 else f"{-left / 1e9:.1f} too much")
        + f" ({(plan.device.memory - plan.usable) / 1e9:.1f} are kept free)",
    ]
    if plan.levers:
        lines += ["", "one change alone, GB (+ fits):"]
        lines += [f"{lever.total / 1e9:>7.1f} {'+' if lever.fits else ' '} {lever.setting}" for lever in plan.levers]
    return lines + [line for note in plan.notes for line in textwrap.wrap(f"note: {note}", 80, subsequent_indent="  ")]


def _gb(value: float) -> str:
    return f"{value / 1e9:>10.2f}"
