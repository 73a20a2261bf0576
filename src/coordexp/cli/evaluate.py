"""``coordexp evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    predictions: Annotated[Path, typer.Option(help="predictions.jsonl.")],
    data: Annotated[Path, typer.Option(help="The records they were made for; the images are not needed.")],
    out: Annotated[Path, typer.Option(help="Where results.json goes.")] = Path("results.json"),
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of the images for the intervals; 0 for none.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare predictions with records: F1, COCO AP, localisation error, health."""
    from coordexp.evaluate.options import EvaluateOptions
    from coordexp.evaluate.result import evaluate_files, headline

    results = evaluate_files(predictions, data, EvaluateOptions(bootstrap=bootstrap), out=out)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    for label, value in headline(results):
        typer.echo(f"{label:<44} {value}")
    typer.echo(f"results: {out}")
