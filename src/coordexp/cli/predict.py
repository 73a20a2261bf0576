"""``coordexp predict``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import AsJson, Overwrite, Seed, end_worker, examples, flags, model_folder, say

EXAMPLES = examples(
    "coordexp predict runs/demo/checkpoints/final runs/demo/data/test.jsonl --out predictions.jsonl",
    "coordexp predict models/mine data/mine/test.jsonl --out p.jsonl --limit 20 --score none --json",
    "torchrun --nproc-per-node 2 -m coordexp predict models/mine data/mine/test.jsonl --out p.jsonl",
)


def predict(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Model folder with coordinate tokens.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Records, JSONL.")],
    out: Annotated[Path, typer.Option(help="Where predictions.jsonl goes. A prediction that was cut off goes on.")],
    readout: Annotated[str, typer.Option(help="argmax, expectation, median, topk_mean, window or auto.")] = "auto",
    score: Annotated[str, typer.Option(help="none, constant, token or distribution.")] = "distribution",
    constrained: Annotated[bool, typer.Option("--constrained/--unconstrained", help="Keep to the answer format.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    max_objects: Annotated[int, typer.Option(min=1, help="Constrained: most objects of an answer.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling, in logit units; 0: greedy.")] = 0.0,
    seed: Seed = 0,
    save_distributions: Annotated[bool, typer.Option(help="Keep the coordinate distributions in OUT.distributions.")] = False,
    calibrate: Annotated[
        Path | None, typer.Option(help="Held-out predictions (with --calibrate-data), or a saved calibration.", show_default="none")
    ] = None,
    calibrate_data: Annotated[Path | None, typer.Option(help="The records of the held-out predictions.", show_default="none")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The instruction the model was trained with.", show_default="that of coordexp.json")
    ] = None,
    geometry: Annotated[
        str | None, typer.Option(help="What to write: bbox_2d, poly or point_2d.", show_default="that of coordexp.json")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the boxes (or points) a model sees on every image of a file. Several processes: with torchrun, as below."""
    from typing import cast, get_args

    from coordexp.decode.options import DecodeOptions, ReadoutName, ScoreName
    from coordexp.errors import ConfigError
    from coordexp.grammar import Geometry

    choices = (("readout", readout, ReadoutName), ("score", score, ScoreName), ("geometry", geometry, Geometry))
    for name, value, kind in choices:
        legal = get_args(kind)
        if value is not None and value not in legal:
            raise ConfigError(f"--{name}: expected one of {', '.join(legal)}, got {value}")
    if calibrate is None and calibrate_data is not None:
        raise ConfigError("--calibrate-data: expected --calibrate PREDICTIONS with it")
    if calibrate is not None and score == "none":
        raise ConfigError("--calibrate: expected scores to calibrate, got --score none")
    with flags("decode"):
        options = DecodeOptions(
            readout=cast(ReadoutName, readout), score=cast(ScoreName, score), constrained=constrained, batch_size=batch_size,
            max_new_tokens=max_new_tokens, max_objects=max_objects, temperature=temperature, seed=seed,
            save_distributions=save_distributions,
        )  # fmt: skip
    from coordexp.predicting import predict_file

    chosen = None if calibrate is None else (calibrate, calibrate_data)
    first = os.environ.get("RANK", "0") == "0"
    try:
        done = predict_file(
            model_folder(model), data, out, options, prompt=prompt, geometry=cast(Geometry | None, geometry), limit=limit,
            calibrate=chosen, device=device, overwrite=overwrite,
        )  # fmt: skip
    except KeyboardInterrupt:
        if first:
            say(
                f"{out} is incomplete: the same command{' without --overwrite' if overwrite else ''} goes on where it stopped", err=True
            )
        raise
    end_worker()
    if as_json:
        typer.echo(json.dumps({"out": str(out), **vars(done)}, indent=1))
        return
    if done.finished:
        say(f"{out} is finished: {done.resumed} images, made with these settings; nothing was done (--overwrite makes it again)")
        return
    if done.resumed:
        say(f"{done.resumed} images were done already")
    rate = f", {done.boxes / done.seconds:.1f} objects/s" if done.images else ""
    say(f"{done.boxes} objects on {done.images} images{rate}: {out}")
    if done.failed:
        say(f"{done.failed} images could not be used: the field `error` of their rows says why", err=True)
    if done.cut:
        say(f"{done.cut} answers were cut by the budget of {max_new_tokens} tokens: raise --max-new-tokens", err=True)
