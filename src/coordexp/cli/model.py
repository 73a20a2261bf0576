"""``coordexp model tiny``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Group, Overwrite, Seed, examples, flags, say

app = typer.Typer(cls=Group, help="Make models.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``tiny`` a subcommand while it is the only one."""


@app.command(
    "tiny",
    epilog=examples("coordexp model tiny --out models/tiny", "coordexp model tiny --out models/small --hidden-size 96 --num-layers 2"),
)
def tiny(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the language model, in channels; a multiple of 12.")] = 192,
    num_layers: Annotated[int, typer.Option(min=1, help="Number of layers of the language model.")] = 4,
    patch_size: Annotated[int, typer.Option(min=1, help="Side of an image patch, in pixels.")] = 8,
    max_pixels: Annotated[int, typer.Option(min=1, help="Image area that the processor keeps, in pixels.")] = 96 * 96,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a tiny random Qwen3-VL with tokenizer, chat template and processor files."""
    from coordexp.modeling.options import TinyOptions
    from coordexp.modeling.tiny import write_tiny_model

    with flags("model.tiny"):
        options = TinyOptions(hidden_size=hidden_size, num_layers=num_layers, patch_size=patch_size, max_pixels=max_pixels, seed=seed)
    say(f"model: {write_tiny_model(out, options, overwrite=overwrite)}")
