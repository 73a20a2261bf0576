"""``coordexp compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordexp.cli.common import AsJson, examples
from coordexp.terminal import Terminal, plain

if TYPE_CHECKING:
    from coordexp.runs.compare import Compared

EXAMPLES = examples("coordexp compare runs/ab_seed", "coordexp compare runs/soft runs/hard --out compared")
_COLORS = {"better": "green", "worse": "red", "different": "yellow"}


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="The folder of an A/B; or two or more run directories, or folders of them (one a seed)."),
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="ARM", help="The arm to compare the others with.", show_default="the A/B's, or the first")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for comparison.json and comparison.html.", show_default="the A/B's, else the current one"),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples of the photos.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs on the same held-out photos, with intervals over photos and seeds."""
    import json

    from coordexp.runs.compare import compare as make
    from coordexp.runs.compare import write_comparison
    from coordexp.runs.groups import AB_FILE, read_groups

    result = make(read_groups(runs, baseline), resamples=resamples)
    console = Terminal(stderr=as_json)
    if as_json:
        typer.echo(json.dumps(result.data, indent=1, ensure_ascii=False))
    else:
        show(result, console)
    inside = len(runs) == 1 and (runs[0] / AB_FILE).is_file()
    for path in write_comparison(result, out or (runs[0] if inside else Path())):
        console.print(str(path), soft_wrap=True)


def show(result: Compared, console: Terminal) -> None:
    """The headline metrics as a table, and the notes."""
    from rich.table import Table
    from rich.text import Text

    from coordexp.runs.comparison_page import signed, value_text

    data = result.data
    what = f"{data['photos']} photos, {data['images']} records"
    console.print(f"\n{data['name']}: baseline {data['baseline']}, {what}")
    for line in data["cautions"]:
        console.print(f"caution: {line}", style="bold", soft_wrap=True)
    for arm, content in data["arms"].items():
        if content["differs"]:
            console.print(f"{arm} differs: {'; '.join(content['differs'])}", soft_wrap=True)
    width = max(map(len, data["arms"]))
    for key in data["headline"]:
        metric = data["metrics"][key]
        unit = metric["unit"]
        console.print(f"\n{metric['label']} ({unit}, {metric['better']} is better)")
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("", min_width=width)
        for name, least in (("mean", 6), ("difference", 10), ("95 % interval", 18), ("p (Holm)", 8)):
            table.add_column(name, justify="right", min_width=least)
        table.add_column("")
        for arm, content in data["arms"].items():
            mean = value_text(content["metrics"][key]["mean"], unit)
            if arm == data["baseline"]:
                table.add_row(plain(arm), mean)
                continue
            d: dict[str, Any] = data["differences"][arm][key]
            bounds = "" if d["interval"] is None else " to ".join(signed(v, unit) for v in d["interval"])
            p = "" if d["p_holm"] is None else f"{d['p_holm']:.3f}"
            color = _COLORS.get(d["verdict"], "dim")
            table.add_row(plain(arm), mean, signed(d["value"], unit), bounds, p, Text(d["verdict"], color))
        console.print(table)
    console.print()
    for note in data["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
