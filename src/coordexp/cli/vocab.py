"""``coordexp vocab extend``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Overwrite

app = typer.Typer(help="Coordinate tokens of a model.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``extend`` a subcommand while it is the only one."""


@app.command("extend")
def extend(
    model: Annotated[Path, typer.Argument(help="A Qwen3-VL folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    init: Annotated[str, typer.Option(help="Rows of the new tokens: mean, digits or ordinal.")] = "ordinal",
    seed: int = 0,
    overwrite: Overwrite = False,
) -> None:
    """Add the 1,000 coordinate tokens to a model and its tokenizer."""
    from typing import cast, get_args

    from coordexp.errors import ConfigError
    from coordexp.vocab.options import Init, VocabOptions

    if init not in get_args(Init):
        raise ConfigError(f"--init: expected one of {', '.join(get_args(Init))}, got {init}")
    from coordexp.modeling.extend import extend_model

    typer.echo(str(extend_model(model, out, VocabOptions(init=cast(Init, init), seed=seed), overwrite=overwrite)))
