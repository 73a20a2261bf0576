"""Results for a person: the few headline rows, and the tables of ``table.md``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from coordexp.evaluate.registry import FILE_READOUT, HEADLINES, READOUT_NAMES, by_key
from coordexp.evaluate.tables import NONE, Cell, Metrics, number, tables

READOUT_ORDER: Final[tuple[str, ...]] = (FILE_READOUT, *READOUT_NAMES)
_CLASSES: Final = 50
_DIGITS: Final = {"share": 3, "bins": 2, "px": 2, "boxes": 2}


def best_readout(results: dict[str, Any]) -> str:
    """The readout with the highest class-agnostic F1 at IoU .5; the earlier of ``file``, ``argmax``, ... on a tie.

    Chosen on the very images it is reported on, so slightly optimistic.
    """
    scores = {name: results[key] for name in READOUT_ORDER if (key := f"detection.{name}.agnostic.f1.50") in results}
    defined = {name: score for name, score in scores.items() if score is not None}
    return max(defined, key=lambda name: defined[name]) if defined else FILE_READOUT


def headline(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows for a person: name, and value with its 95 % interval, for the best readout. None reads ``undefined``."""
    best = best_readout(results)
    wanted = [(f"{h.label} ({best})" if "{}" in h.key else h.label, h.key.format(best)) for h in HEADLINES]
    counts = results["counts"]
    failed = f", {counts['failed']} could not be used" if counts.get("failed") else ""
    photos = f", of {counts['photos']} photos" if counts["photos"] != counts["original"] else ""
    rows = [("task", str(results["task"])), ("images", f"{counts['effective']} of {counts['original']}{failed}{photos}")]
    rows.extend((name, _format(results, key)) for name, key in wanted if key in results)
    if results.get("health.truncation_rate"):
        rows.append(("answers cut by the token budget", _format(results, "health.truncation_rate")))
    return rows


def _format(results: dict[str, Any], key: str) -> str:
    value = results.get(key)
    if value is None:
        return "undefined"
    digits = _DIGITS[by_key()[key].unit]
    bounds = results.get(f"intervals.{key}")  # absent: no bootstrap, or none (interval_notes says why)
    text = f"{value:.{digits}f}"
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def markdown(results: dict[str, Any]) -> str:
    """``table.md``: everything a person may want to look up, of the boxes as they stand in the file."""
    parts = [
        "# Evaluation",
        "",
        *(f"- {_text(note)}" for note in results["notes"]),
        "",
        f"95 % intervals in brackets; {NONE}: nothing to measure.",
        "",
    ]
    parts += _table("Headline", ("", "value"), headline(results))
    for table in tables(Metrics(results), FILE_READOUT):
        parts += _table(table.caption, ("", *table.columns), [(name, *map(_cell, cells)) for name, cells in table.rows])
    return "\n".join(parts + _class_table(results["per_class"])).rstrip() + "\n"


def _cell(cell: Cell) -> str:
    return cell.text if cell.interval is None else f"{cell.text} [{cell.interval}]"


def _class_table(classes: list[dict[str, Any]]) -> list[str]:
    columns = {"true": "whole", "predicted": "whole", "f1.50": "ratio", "f1.mean": "ratio", "recall.50": "ratio", "ap": "ratio"}
    rows = [(_text(str(entry["desc"])), *(number(entry[key], kind) for key, kind in columns.items())) for entry in classes[:_CLASSES]]
    title = f"Classes, the {_CLASSES} most frequent of {len(classes)}" if len(classes) > _CLASSES else "Classes"
    return _table(title, ("", *columns), rows)


# What Markdown or HTML would take for more than text; a break would end the row, a control character does worse.
_MARKUP: Final = re.compile(r"[\\`*_{}\[\]<>&|~@$]|:(?=//)|(?<=www)\.")
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")


def _text(value: str) -> str:
    """A name as Markdown shows it, character by character: no link, no picture, no tag."""
    return _MARKUP.sub(lambda found: "\\" + found[0], _CONTROLS.sub(" ", value))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, or nothing without rows. Descriptions may hold anything."""
    if not rows:
        return []
    body = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
    return [f"## {title}", "", body[0], "|" + "---|" * len(columns), *body[1:], ""]
