"""``coordexp data export`` and ``coordexp predictions export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import Group, Overwrite, examples, progress, say

DATA_EXAMPLES = examples(
    "coordexp data export coco data/mine/train.jsonl data/mine/val.jsonl --out data/coco",
    "coordexp data export yolo data/mine/train.jsonl --out data/yolo --copy",
)
predictions = typer.Typer(cls=Group, help="Write predictions as other tools read them.", no_args_is_help=True)
_FORMATS = ("coco", "fiftyone", "yolo", "voc", "labelstudio")


def export(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(_FORMATS)}; ms-swift: export-swift.")],
    files: Annotated[list[Path], typer.Argument(metavar="RECORDS.jsonl", help="Record files, one for each split.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy images instead of linking them.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write records as another format. What it has no place for is left out and counted."""
    from coordexp.data.exporting import export_data
    from coordexp.errors import ConfigError

    if format_name not in _FORMATS:
        raise ConfigError(f"FORMAT: expected {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}, got {format_name}")
    with progress("images") as update:
        done = export_data(format_name, files, out, copy=copy, overwrite=overwrite, progress=update)
    splits = ", ".join(f"{count} {name}" for name, count in done.splits.items())
    left = "".join(f"; {count} {what} left out" for what, count in done.left_out.items())
    say(f"{splits} images, {done.objects} objects written to {out}{left}")


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
