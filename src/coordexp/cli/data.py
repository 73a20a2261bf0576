"""``coordexp data synth | import | export | validate | stats | render``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from coordexp.cli.common import AsJson, Group, Overwrite, Seed, examples, flags, progress, say
from coordexp.cli.exporting import DATA_EXAMPLES, export, export_swift
from coordexp.cli.importing import EXAMPLES as IMPORT_EXAMPLES
from coordexp.cli.importing import import_

app = typer.Typer(cls=Group, help="Make, import and check data.", no_args_is_help=True)

app.command("import", epilog=IMPORT_EXAMPLES)(import_)
app.command("export", epilog=DATA_EXAMPLES)(export)
# The earlier name.
app.command("export-swift", hidden=True)(export_swift)

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]


@app.command("synth", epilog=examples("coordexp data synth --out data/scenes --train 1000 --val 50 --test 50"))
def synth(
    out: Out,
    train: Annotated[int, typer.Option(help="Number of training scenes.")] = 8000,
    val: Annotated[int, typer.Option(help="Number of validation scenes.")] = 100,
    test: Annotated[int, typer.Option(help="Number of test scenes.")] = 200,
    side: Annotated[int, typer.Option(help="Side of a scene, in pixels.")] = 96,
    min_objects: Annotated[int, typer.Option(help="Least number of objects of a scene.")] = 1,
    max_objects: Annotated[int, typer.Option(help="Largest number of objects of a scene.")] = 3,
    task: Annotated[str, typer.Option(help="detection, or grounding: a phrase for one of the objects.")] = "detection",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make scenes of coloured shapes on textured backgrounds, as records and PNG files."""
    from coordexp.data.options import SynthOptions
    from coordexp.data.synthetic import write_scenes

    _one_of("--task", task, ("detection", "grounding"))
    with flags("data.synth"):
        options = SynthOptions(
            train=train, val=val, test=test, side=side, min_objects=min_objects, max_objects=max_objects,
            task="grounding" if task == "grounding" else "detection", seed=seed,
        )  # fmt: skip
    with progress("scenes") as update:
        files = write_scenes(out, options, update, overwrite=overwrite)
    for split, path in files.items():
        say(f"{split}: {path}")


@app.command(
    "validate", epilog=examples("coordexp data validate data/mine/train.jsonl", "coordexp data validate data/mine/train.jsonl --json")
)
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Records, JSONL.")],
    as_json: AsJson = False,
) -> None:
    """Check every record and decode every image of a file; every fault is one line, with exit code 2."""
    from coordexp.data.records import check_records
    from coordexp.data.rows import losses_of
    from coordexp.errors import DataError

    with progress("records") as update:
        check = check_records(file, update)
    losses = losses_of(file)
    if as_json:
        typer.echo(json.dumps({**vars(check), "losses": losses}, ensure_ascii=False, indent=1))
        if check.faults:
            raise typer.Exit(2)
        return
    if check.turned:
        say(
            f"note: {check.turned} images have an EXIF rotation: boxes must be counted in the upright picture (data render shows it)"
        )
    if check.faults:
        raise DataError("\n".join(check.faults))
    say(f"{file}: {check.records} records, {check.objects} objects, all valid")
    for line in losses:
        say(f"warning: {line}")
    if not check.objects:
        say("warning: no record has an object: there is nothing to learn from")


@app.command(
    "stats",
    epilog=examples(
        "coordexp data stats data/mine/train.jsonl --tokenizer models/qwen3-vl-coord", "coordexp data stats data/mine/train.jsonl --json"
    ),
)
def stats(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Records, JSONL.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer folder with coordinate tokens: counts answer tokens.", show_default="none")
    ] = None,
    convention: Annotated[str, typer.Option(help="Coordinate convention of the grid.")] = "norm999",
    as_json: AsJson = False,
) -> None:
    """Counts, sizes, boxes and tokens per image, and the best mean IoU that the coordinate grid allows, by box size."""
    from coordexp.codec import CONVENTIONS, CoordCodec
    from coordexp.data.records import read_records
    from coordexp.data.stats import data_stats

    _one_of("--convention", convention, tuple(CONVENTIONS))
    count = None
    if tokenizer is not None:
        from coordexp.modeling.load import load_tokenizer
        from coordexp.vocab.coord_vocab import CoordVocab

        loaded = load_tokenizer(tokenizer)
        # Without the tokens every coordinate would be spelt out, and the count would be several times too high.
        CoordVocab.from_tokenizer(loaded)

        def count(text: str) -> int:
            return len(loaded(text, add_special_tokens=False)["input_ids"])

    records = read_records(file, check_images=False).records
    found = data_stats(records, CoordCodec(CONVENTIONS[convention].bins, convention), count)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    for name, value in found.items():
        for line in _rows(name, value):
            say(line)


@app.command("render", epilog=examples("coordexp data render data/mine/train.jsonl --out look --limit 20"))
def render(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Records, JSONL.")],
    out: Out,
    limit: Annotated[int, typer.Option(min=1, help="Most records to draw.")] = 50,
    predictions: Annotated[
        Path | None, typer.Option(help="A predictions.jsonl: its objects are drawn too, dashed.", show_default="none")
    ] = None,
) -> None:
    """Draw the objects on their images, and write a page with the answer text beside each."""
    from coordexp.data.gallery import render_records
    from coordexp.data.records import read_records
    from coordexp.data.rows import RecordObject

    records = read_records(file, limit=limit).records
    predicted = None
    if predictions is not None:
        from coordexp.errors import DataError
        from coordexp.evaluate.origin import check_origin
        from coordexp.evaluate.predictions import read_predictions
        from coordexp.evaluate.samples import check_size

        rows = read_predictions(predictions)
        by_id = {row.image_id: row for row in rows}
        known = [record for record in records if record.image_id in by_id]
        if not known:
            raise DataError(
                f"{predictions}: expected predictions of the records of {file}, found none: give the file they were predicted from"
            )
        for record in known:
            check_size(by_id[record.image_id], record)
        every = {record.image_id: record for record in read_records(file, check_images=False).records}
        if by_id.keys() <= every.keys():
            check_origin(rows, every, predictions, file)
        predicted = {
            record.image_id: [RecordObject(o.desc, o.geometry, tuple(o.values)) for o in by_id[record.image_id].objects] for record in known
        }
    with progress("images") as update:
        render_records(records, out, title=file.name, predicted=predicted, progress=update)
    say(f"{len(records)} pictures and {out / 'index.html'} written")


def _one_of(flag: str, value: str, names: Sequence[str]) -> None:
    from coordexp.errors import ConfigError

    if value not in names:
        raise ConfigError(f"{flag}: expected {', '.join(names[:-1])} or {names[-1]}, got {value}")


def _rows(name: str, value: Any) -> list[str]:
    """Lines of a table for a person."""
    if name == "quantisation":
        rows = [f"{'best reachable mean IoU':<26}{'boxes':>8}{'ceiling':>10}{'labels':>10}"]
        for bucket, row in value.items():
            numbers = "".join(f"{'-' if row[key] is None else format(row[key], '.4f'):>10}" for key in ("ceiling_iou", "label_iou"))
            rows.append(f"  {bucket:<24}{row['boxes']:>8}{numbers}")
        return rows
    if name == "classes":
        shown = [f"{desc} {count}" for desc, count in list(value.items())[:10]]
        return [f"{'classes':<26}{len(value)}: {', '.join(shown)}{', ...' if len(value) > 10 else ''}"]
    label = name.replace("_", " ")
    if isinstance(value, dict):
        return [f"{label:<26}" + "  ".join(f"{key} {number:.6g}" for key, number in value.items())]
    return [f"{label:<26}{'-' if value is None else value}"]
