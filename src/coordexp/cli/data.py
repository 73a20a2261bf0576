"""``coordexp data synth | import voc | validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Overwrite, flags, progress

app = typer.Typer(help="Make, import and check data.", no_args_is_help=True)
importers = typer.Typer(help="Import other formats as records.", no_args_is_help=True)
app.add_typer(importers, name="import")

Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]


@app.command("synth")
def synth(
    out: Out,
    train: int = 8000,
    val: int = 100,
    test: int = 200,
    side: Annotated[int, typer.Option(help="Image side in pixels.")] = 96,
    min_objects: int = 1,
    max_objects: int = 3,
    seed: int = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make scenes of coloured shapes on textured backgrounds, as records and PNG files."""
    from coordexp.data.options import SynthOptions
    from coordexp.data.synthetic import write_scenes

    with flags("data.synth"):
        options = SynthOptions(train=train, val=val, test=test, side=side, min_objects=min_objects, max_objects=max_objects, seed=seed)
    with progress("scenes") as update:
        files = write_scenes(out, options, update, overwrite=overwrite)
    for split, path in files.items():
        typer.echo(f"{split}: {path}")


@importers.command("voc")
def voc(
    source: Annotated[Path, typer.Argument(help="A Pascal VOC folder: Annotations, JPEGImages, ImageSets/Main.")],
    out: Out,
    on_invalid: Annotated[str, typer.Option(help="skip: leave a bad box out and say so; error: stop at it.")] = "skip",
    overwrite: Overwrite = False,
) -> None:
    """Import a Pascal VOC folder as records."""
    from coordexp.data.importers.voc import import_voc
    from coordexp.errors import ConfigError

    if on_invalid not in ("skip", "error"):
        raise ConfigError(f"--on-invalid: expected skip or error, got {on_invalid}")
    with progress("images") as update:
        report = import_voc(source, out, on_invalid="skip" if on_invalid == "skip" else "error", overwrite=overwrite, progress=update)
    for problem in report.problems:
        typer.echo(f"left out: {problem}")
    splits = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    classes = ", ".join(f"{name} {count}" for name, count in report.classes.items())
    typer.echo(f"{splits} images, {report.boxes} boxes ({classes}) written to {out}")


@app.command("validate")
def validate(file: Annotated[Path, typer.Argument(help="Records, JSONL.")]) -> None:
    """Check every record and decode every image of a file."""
    from coordexp.data.records import read_records, verify_images

    records = read_records(file).records
    verify_images(records)
    typer.echo(f"{file}: {len(records)} records, {sum(len(r.objects) for r in records)} objects, all valid")
