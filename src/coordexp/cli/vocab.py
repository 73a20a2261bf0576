"""``coordexp vocab extend`` and ``coordexp vocab export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, Group, Overwrite, Seed, examples, progress

if TYPE_CHECKING:
    from coordexp.exporting import ExportSummary
    from coordexp.modeling.extend import ExtendSummary

app = typer.Typer(cls=Group, help="Coordinate tokens of a model.", no_args_is_help=True)


@app.command(
    "extend",
    epilog=examples(
        "coordexp vocab extend models/qwen3-vl --out models/qwen3-vl-coord",
        "coordexp vocab extend models/qwen3-vl --out models/qwen3-vl-digits --init digits --json",
    ),
)
def extend(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A Qwen3-VL, Qwen2.5-VL or Qwen3 folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    init: Annotated[str, typer.Option(help="Rows of the new tokens: mean, digits or ordinal.")] = "ordinal",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add the 1,000 coordinate tokens to a model and its tokenizer."""
    from typing import cast, get_args

    from coordexp.errors import ConfigError
    from coordexp.vocab.options import Init, VocabOptions

    if init not in get_args(Init):
        raise ConfigError(f"--init: expected one of {', '.join(get_args(Init))}, got {init}")
    from coordexp.modeling.extend import extend_model

    with progress("files") as told:
        summary = extend_model(model, out, VocabOptions(init=cast(Init, init), seed=seed), overwrite=overwrite, progress=told)
    _say(summary, as_json)


@app.command(
    "export",
    epilog=examples(
        "coordexp vocab export runs/demo models/demo --verify",
        "coordexp vocab export runs/demo/checkpoints/checkpoint-675 models/demo --dtype bfloat16",
    ),
)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    verify: Annotated[bool, typer.Option("--verify", help="Load the result again and compare its logits on real samples.")] = False,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head its own copy of the table.")] = False,
    dtype: Annotated[str, typer.Option(help="Type of the written weights: source, float32 or bfloat16.")] = "source",
    base: Annotated[Path | None, typer.Option(help="For an adapter: the model it was trained on.", show_default="as it says")] = None,
    data: Annotated[Path | None, typer.Option(help="Records to verify on.", show_default="the run's validation split")] = None,
    prompt: Annotated[str | None, typer.Option(help="For a checkpoint without coordexp.json: its prompt.", show_default="none")] = None,
    convention: Annotated[str | None, typer.Option(help="The same: its coordinate convention.", show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a merged checkpoint with tokenizer, processor and coordexp.json that plain transformers loads."""
    from typing import Literal, cast

    from coordexp.errors import ConfigError

    if dtype not in ("source", "float32", "bfloat16"):
        raise ConfigError(f"--dtype: expected one of source, float32, bfloat16, got {dtype}")
    if data is not None and not verify:
        raise ConfigError("--data: only with --verify")
    from coordexp.exporting import ExportOptions, export_checkpoint

    options = ExportOptions(
        verify=verify,
        untie=untie,
        dtype=cast(Literal["source", "float32", "bfloat16"], dtype),
        base=base,
        data=data,
        prompt=prompt,
        convention=convention,
    )
    with progress("files and comparisons" if verify else "files") as told:
        summary = export_checkpoint(run, out, options, told)
    _say(summary, as_json)


def _say(summary: ExtendSummary | ExportSummary, as_json: bool) -> None:
    typer.echo(json.dumps(vars(summary), default=str, indent=1) if as_json else str(summary))
