"""``coordexp evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import AsJson, Overwrite, Seed, examples, flags, say

EXAMPLES = examples(
    "coordexp evaluate predictions.jsonl --data data/mine/test.jsonl --out evaluation",
    "coordexp evaluate predictions.jsonl --data data/mine/test.jsonl --out again --json",
    "coordexp evaluate coco_results.json --data data/coco/val.jsonl --out evaluation",
    "coordexp evaluate labels --data data/mine/test.jsonl --categories data.yaml --out evaluation",
    "coordexp evaluate answers.jsonl --data data/mine/test.jsonl --coords norm1000 --out evaluation",
)


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help="predictions.jsonl, COCO or LVIS results JSON, a folder of YOLO .txt files, or answers of a chat model, JSONL.",
        ),
    ],
    data: Annotated[Path, typer.Option(metavar="RECORDS", help="The records they were made for; the images are not needed.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, per_image.jsonl and table.md.")],
    bootstrap: Annotated[int, typer.Option(min=0, help="Number of resamples of the photos for the intervals; 0: none.")] = 1000,
    seed: Seed = 0,
    match: Annotated[str, typer.Option(help="How descriptions are compared: exact (normalised) or semantic.")] = "exact",
    match_model: Annotated[Path | None, typer.Option(help="Folder of a text model, for --match semantic.", show_default="none")] = None,
    match_similarity: Annotated[float, typer.Option(min=-1, max=1, help="Least cosine similarity, -1 to 1, for --match semantic.")] = 0.7,
    convention: Annotated[str, typer.Option(help="Convention of bins: errors, answers in tokens.")] = "norm999",
    categories: Annotated[
        Path | None,
        typer.Option(help="COCO and YOLO results: the file that names their classes.", show_default="what the records came from"),
    ] = None,
    coords: Annotated[
        str | None, typer.Option(help="Numbers in chat answers: absolute, norm1000 or norm1. Never guessed.", show_default="none")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on where the predictions were made for other records.")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Compare predictions with records: F1, COCO and LVIS AP, localisation, calibration, health; grounding and pointing."""
    from tempfile import TemporaryDirectory
    from typing import Literal, cast

    from coordexp.data.importers.base import COORDS
    from coordexp.data.records import write_records
    from coordexp.errors import ConfigError
    from coordexp.evaluate.foreign import read_foreign
    from coordexp.evaluate.options import EvaluateOptions
    from coordexp.evaluate.result import headline
    from coordexp.predicting import evaluate_predictions

    if match not in ("exact", "semantic"):
        raise ConfigError(f"--match: expected exact or semantic, got {match}")
    with flags("evaluate"):
        options = EvaluateOptions(
            bootstrap=bootstrap,
            seed=seed,
            match=cast(Literal["exact", "semantic"], match),
            match_model=None if match_model is None else str(match_model),
            match_similarity=match_similarity,
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: expected a folder, got the file {out}")
    _check_free(out, overwrite)
    if coords is not None and coords not in COORDS:
        raise ConfigError(f"--coords: expected one of {', '.join(COORDS)}, got {coords}")
    foreign = read_foreign(predictions, data, categories=categories, coords=coords, convention=convention)
    with TemporaryDirectory() as folder:
        if foreign is not None:
            predictions = Path(folder) / f"{predictions.stem}.jsonl"
            write_records(predictions, foreign.rows)
        results = evaluate_predictions(predictions, data, options, out=out, convention=convention, force=force)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    for note in foreign.notes if foreign is not None else ():
        say(note)
    for label, value in headline(results):
        say(f"{label:<44} {value}")
    for note in results["notes"]:
        say(f"note: {note}")
    typer.echo(f"results: {out / 'results.json'}, tables: {out / 'table.md'}")


def _check_free(out: Path, overwrite: bool) -> None:
    """Results are replaced with ``--overwrite`` only, and files of the same names that are no results never."""
    from coordexp.data.staging import read_json
    from coordexp.errors import ConfigError

    there = [name for name in ("results.json", "per_image.jsonl", "table.md") if (out / name).exists()]
    if not there:
        return
    content = read_json(out / "results.json")
    if not isinstance(content, dict) or not {"schema", "task", "provenance"} <= content.keys():
        raise ConfigError(f"--out: {out / there[0]} is not of an evaluation, and is left as it is: choose another folder")
    if not overwrite:
        raise ConfigError(f"--out: {out} holds results already: choose another folder or pass --overwrite")
