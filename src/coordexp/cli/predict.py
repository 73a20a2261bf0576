"""``coordexp predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def predict(
    model: Annotated[Path, typer.Option(help="Model folder with coordinate tokens.")],
    data: Annotated[Path, typer.Option(help="Records, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where predictions.jsonl goes.")],
    readout: Annotated[str, typer.Option(help="argmax, expectation, median, topk_mean, window or auto.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    prompt: Annotated[str | None, typer.Option(help="The instruction the model was trained with.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.")] = None,
) -> None:
    """Write the boxes a model sees on every image of a file."""
    from typing import cast, get_args

    from coordexp.decode.options import DecodeOptions, ReadoutName
    from coordexp.errors import ConfigError

    if readout not in get_args(ReadoutName):
        raise ConfigError(f"--readout: expected one of {', '.join(get_args(ReadoutName))}, got {readout}")
    from coordexp.experiment import predict_file

    options = DecodeOptions(readout=cast(ReadoutName, readout), batch_size=batch_size, max_new_tokens=max_new_tokens)
    boxes = predict_file(model, data, out, options, prompt=prompt, limit=limit)
    typer.echo(f"{boxes} boxes written to {out}")
