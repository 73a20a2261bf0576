"""``coordexp data import``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordexp.cli.common import AsJson, Overwrite, examples, progress, say
from coordexp.data.importers.formats import FORMATS

if TYPE_CHECKING:
    from coordexp.data.importers.writing import ImportReport

EXAMPLES = examples(
    "coordexp data import coco COCO_FOLDER --out data/mine",
    "coordexp data import voc VOC_FOLDER --out data/mine --on-invalid error --copy",
    "coordexp data import coco instances.json --images photos --split train --out data/mine --json",
    "coordexp data import coco val.json --split val --out data/mine --add",
    "coordexp data import swift train.jsonl --coords norm1000 --out data/mine",
)
_NAMES = [name for name, one in FORMATS.items() if one.importable]
# Lines of a kind that are printed; all of them stand in import.json.
_SHOWN = 10


def import_(
    format_name: Annotated[str, typer.Argument(metavar="FORMAT", help=f"{', '.join(_NAMES)}: docs/formats.md says what each reads.")],
    sources: Annotated[list[Path], typer.Argument(metavar="SRC", help="Folder or annotation file; several are put together.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist, unless --add.")],
    split: Annotated[
        list[str] | None, typer.Option(help="Import only this split (repeatable); names the output of single files.", show_default="all")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, where it is not the format's own.", show_default="none")
    ] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Take images and labels that are links out of the source.")] = False,
    coords: Annotated[
        str | None,
        typer.Option(help="What numbers are: absolute (pixels), norm1000 (0..1000) or norm1 (0..1). Never guessed.", show_default="none"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="How boxes stand where a source does not say: xyxy, xywh, cxcywh or yxyx.", show_default="none")
    ] = None,
    origin: Annotated[
        int | None, typer.Option(help="voc: the number of the first pixel, 0 or 1.", show_default="1, with a warning if it looks like 0")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Description of objects that have none.", show_default="they are left out")
    ] = None,
    polygons: Annotated[bool, typer.Option("--polygons", help="coco: take outlines of one part instead of boxes.")] = False,
    clip: Annotated[
        bool, typer.Option("--clip", help="Cut boxes at the border that leave the image by more than a pixel; otherwise they are left out.")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy images instead of linking them.")] = False,
    on_invalid: Annotated[str, typer.Option(help="skip: leave what is bad out and say so; error: stop at it.")] = "skip",
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write also what has no labels, or lost over 20 % of its objects or images.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="Add further splits to a folder that an import wrote.")] = False,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Import another format as records: train.jsonl, val.jsonl, test.jsonl, images/ and import.json.

    Of an image only the header is read; `coordexp data validate` decodes all of them.
    """
    from coordexp.data.importers.base import COORDS, LAYOUTS, ImportOptions
    from coordexp.data.importers.formats import import_data
    from coordexp.errors import ConfigError

    for flag, value, names in (
        ("FORMAT", format_name, _NAMES), ("--on-invalid", on_invalid, ["skip", "error"]), ("--coords", coords, [*COORDS]),
        ("--layout", layout, [*LAYOUTS]), ("--origin", None if origin is None else str(origin), ["0", "1"]),
    ):  # fmt: skip
        if value is not None and value not in names:
            raise ConfigError(f"{flag}: expected {', '.join(names[:-1])} or {names[-1]}, got {value}")
    given = {"coords": coords, "layout": layout, "origin": origin, "polygons": polygons or None}
    for key, option in given.items():
        takers = [taker for taker, one in FORMATS.items() if key in one.flags]
        if option is not None and format_name not in takers:
            raise ConfigError(f"--{key}: only for {', '.join(takers)}, got the format {format_name}: leave it out")
    options = ImportOptions(
        splits=tuple(split or ()), images=images, follow_links=follow_links, coords=coords, layout=layout, origin=origin, name=name,
        polygons=polygons, clip=clip, copy=copy, on_invalid="skip" if on_invalid == "skip" else "error", allow_loss=allow_loss,
    )  # fmt: skip
    with progress("images") as update:
        report = import_data(format_name, sources, out, options, overwrite=overwrite, add=add, progress=update)
    if as_json:
        typer.echo(json.dumps(vars(report), ensure_ascii=False, indent=1))
    else:
        _print(report, out)


def _print(report: ImportReport, out: Path) -> None:
    for kind, lines in (("warning", report.warnings), ("repaired", report.repaired), ("left out", report.dropped)):
        for line in lines[:_SHOWN]:
            say(f"{kind}: {line}")
        if len(lines) > _SHOWN:
            typer.echo(f"{kind}: ... and {len(lines) - _SHOWN} more, all in {out / 'import.json'}")
    splits = ", ".join(f"{count} {name}" for name, count in report.splits.items())
    classes = ", ".join(f"{name} {count}" for name, count in report.classes.items())
    notes = "".join(
        f", {count} of them {what}" for count, what in ((report.crowd, "crowd regions"), (report.difficult, "difficult")) if count
    )
    say(f"{splits} images, {report.objects} objects ({classes}){notes} written to {out}")
    for name, lost in report.left_out.items():
        if lost["reasons"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in lost["reasons"].items())
            say(
                f"{name}: {lost['objects_lost']} of {lost['objects']} objects and {lost['images_lost']} of {lost['images']} images "
                f"left out: {reasons}"
            )
    say(
        f"{len(report.warnings)} warnings, {len(report.repaired)} repaired, {len(report.dropped)} left out; also in {out / 'import.json'}"
    )
    say(
        f"of images only the headers were read: `coordexp data validate {next(iter(sorted(out.glob('*.jsonl'))), out)}` decodes them"
    )
