"""``coordexp data export`` and ``coordexp predictions export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from coordexp.cli.common import Group, Overwrite, examples, progress, say

DATA_EXAMPLES = examples(
    "coordexp data export coco data/mine/train.jsonl data/mine/val.jsonl --out data/coco",
    "coordexp data export yolo data/mine/train.jsonl --out data/yolo --copy",
    "coordexp data export swift data/mine/train.jsonl data/mine/val.jsonl --out data/swift",
)
predictions = typer.Typer(cls=Group, help="Write predictions as other tools read them.", no_args_is_help=True)
_FORMATS = ("coco", "fiftyone", "yolo", "voc", "labelstudio", "swift")

Files = Annotated[list[Path], typer.Argument(metavar="RECORDS.jsonl", help="Record files, one for each split.")]
Out = Annotated[Path, typer.Option(help="Folder to write; must not exist.")]
Prompt = Annotated[
    str | None, typer.Option(help="swift: the question asked; {phrase} in it: metadata.phrase.", show_default="that of an experiment")
]
Geometry = Annotated[
    str | None, typer.Option(help="swift: how objects are written: recorded, bbox_2d or point_2d.", show_default="recorded")
]
Convention = Annotated[str | None, typer.Option(help="swift: coordinate convention of the tokens.", show_default="norm999")]
Order = Annotated[
    str | None, typer.Option(help="swift: order of the objects: sorted or random (drawn once, from --seed).", show_default="sorted")
]
Seed = Annotated[int | None, typer.Option(min=0, help="swift: seed of the random order.", show_default="0")]


def export(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(_FORMATS[:-1])}, or {_FORMATS[-1]} (ms-swift).")],
    files: Files,
    out: Out,
    copy: Annotated[bool, typer.Option("--copy", help="Copy images instead of linking them; not for swift.")] = False,
    prompt: Prompt = None,
    geometry: Geometry = None,
    convention: Convention = None,
    order: Order = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Write records as another format. What it has no place for is left out and counted."""
    from coordexp.data.exporting import export_data
    from coordexp.errors import ConfigError

    if format_name not in _FORMATS:
        raise ConfigError(f"FORMAT: expected {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}, got {format_name}")
    words = {"prompt": prompt, "geometry": geometry, "convention": convention, "order": order, "seed": seed}
    given = {name: value for name, value in words.items() if value is not None}
    if format_name == "swift":
        if copy:
            raise ConfigError("--copy: expected none for swift, whose rows name the images where they are: leave it out")
        _write_swift(files, out, given, overwrite=overwrite)
        return
    if given:
        raise ConfigError(f"--{next(iter(given))}: expected none for {format_name}: only swift writes questions and answers")
    with progress("images") as update:
        done = export_data(format_name, files, out, copy=copy, overwrite=overwrite, progress=update)
    splits = ", ".join(f"{count} {name}" for name, count in done.splits.items())
    left = "".join(f"; {count} {what} left out" for what, count in done.left_out.items())
    say(f"{splits} images, {done.objects} objects written to {out}{left}")


def export_swift(
    files: Files,
    out: Out,
    prompt: Prompt = None,
    geometry: Geometry = None,
    convention: Convention = None,
    order: Order = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """The earlier name of ``data export swift``."""
    say("note: data export-swift is now data export swift", err=True)
    export("swift", files, out, False, prompt, geometry, convention, order, seed, overwrite)


def _write_swift(files: list[Path], out: Path, given: dict[str, Any], *, overwrite: bool) -> None:
    """ms-swift grounding JSONL whose answers are in coordinate tokens: OUT/<name of each file>.jsonl."""
    from coordexp.data.swift_rows import SwiftExportOptions, export_swift

    with progress("rows") as update:
        done = export_swift(files, out, SwiftExportOptions(**given), overwrite=overwrite, progress=update)
    splits = ", ".join(f"{count} {name}" for name, count in done.splits.items())
    notes = [
        f"{done.adjusted} boxes kept open by one bin" if done.adjusted else "",
        f"{done.crowd} crowd regions or difficult objects left out" if done.crowd else "",
        f"{done.copied} images written anew, upright and in RGB" if done.copied else "",
        f"{done.unasked} phrases not asked for, the prompt has no {{phrase}}" if done.unasked else "",
    ]
    say(f"{splits} rows, {done.objects} objects written to {out}" + "".join(f"; {note}" for note in notes if note))


@predictions.command(
    "export",
    epilog=examples("coordexp predictions export coco predictions.jsonl --data data/coco/val.jsonl --out results.json"),
)
def export_predictions(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help="coco (results JSON) or labelstudio (pre-annotations).")],
    file: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="predictions.jsonl.")],
    data: Annotated[Path, typer.Option(metavar="RECORDS", help="The records they were made for.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; must not exist.")],
    categories: Annotated[
        Path | None, typer.Option(help="coco: the file that numbers the categories.", show_default="what the records came from")
    ] = None,
) -> None:
    """Write predictions as COCO results with their scores, or as Label Studio pre-annotations."""
    from coordexp.data.staging import atomic_text
    from coordexp.errors import ConfigError
    from coordexp.evaluate.foreign import coco_results, labelstudio_tasks

    if format_name not in ("coco", "labelstudio"):
        raise ConfigError(f"FORMAT: expected coco or labelstudio, got {format_name}")
    if out.exists():
        raise ConfigError(f"--out: expected a new file, got {out}, which is there: choose another name")
    rows, notes = coco_results(file, data, categories) if format_name == "coco" else labelstudio_tasks(file, data)
    with atomic_text(out) as target:
        json.dump(rows, target, ensure_ascii=False, allow_nan=False)
    for note in notes:
        say(note)
    say(f"{len(rows)} {'results' if format_name == 'coco' else 'tasks'} written to {out}")
