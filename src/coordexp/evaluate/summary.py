"""Results for a person: the few headline rows, and the tables of ``table.md``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from coordexp.evaluate.buckets import BIN_SIZES, COCO_SIZES, CROWDING
from coordexp.evaluate.coco import AREA_KEYS, COCO_KEYS, LVIS_KEYS, TIDE_KINDS
from coordexp.evaluate.localisation import SLOTS
from coordexp.evaluate.predictions import READOUT_NAMES
from coordexp.evaluate.samples import FILE_READOUT

READOUT_ORDER: Final[tuple[str, ...]] = (FILE_READOUT, *READOUT_NAMES)
_CLASSES: Final = 50
_THRESHOLDS: Final = ("50", "75", "90", "95", "mean")


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
    wanted = [
        ("point on the object", "pointing.acc", 3),
        (f"grounding Acc@.5 ({best})", f"grounding.{best}.acc.50", 3),
        (f"grounding Acc@.8 ({best})", f"grounding.{best}.acc.80", 3),
        (f"grounding Acc@.9 ({best})", f"grounding.{best}.acc.90", 3),
        (f"grounding mean IoU ({best})", f"grounding.{best}.mean_iou", 3),
        (f"F1@.5 class-agnostic ({best})", f"detection.{best}.agnostic.f1.50", 3),
        (f"F1@.5:.95 class-agnostic ({best})", f"detection.{best}.agnostic.f1.mean", 3),
        (f"F1@.5 class-aware ({best})", f"detection.{best}.aware.f1.50", 3),
        (f"F1@.5:.95 class-aware ({best})", f"detection.{best}.aware.f1.mean", 3),
        (f"macro F1@.5 class-aware ({best})", f"detection.{best}.aware.macro_f1.50", 3),
        ("COCO AP, constant score", "coco.constant.ap", 3),
        ("COCO AP, scores of the file", "coco.file.ap", 3),
        ("LVIS AP, constant score", "lvis.constant.ap", 3),
        ("LVIS AP, scores of the file", "lvis.file.ap", 3),
        (f"edge error of matched boxes, bins ({best})", f"localisation.{best}.all.mean_bins", 2),
        (f"edge error of matched boxes, pixels ({best})", f"localisation.{best}.all.mean_px", 2),
        ("true edge inside the 80 % interval", "calibration.all.coverage_80", 3),
        ("answers read without a problem", "health.parse_rate", 3),
        ("duplicate boxes", "health.duplicate_rate", 3),
        ("boxes per image", "health.boxes_per_image", 2),
        ("true boxes per image", "health.true_boxes_per_image", 2),
    ]
    counts = results["counts"]
    failed = f", {counts['failed']} could not be used" if counts.get("failed") else ""
    rows = [("task", str(results["task"])), ("images", f"{counts['effective']} of {counts['original']}{failed}")]
    rows.extend((name, _format(results, key, digits)) for name, key, digits in wanted if key in results)
    if results.get("health.truncation_rate"):
        rows.append(("answers cut by the token budget", _format(results, "health.truncation_rate", 3)))
    return rows


def _format(results: dict[str, Any], key: str, digits: int = 3) -> str:
    value = results.get(key)
    if value is None:
        return "undefined"
    if isinstance(value, int):
        return str(value)
    text = f"{value:.{digits}f}"
    bounds = results.get(f"intervals.{key}")  # absent: no bootstrap, or undefined
    return text if bounds is None else f"{text} [{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"


def markdown(results: dict[str, Any]) -> str:
    """``table.md``: everything a person may want to look up, of the boxes as they stand in the file."""
    parts = [
        "# Evaluation",
        "",
        *(f"- {_text(note)}" for note in results["notes"]),
        "",
        "95 % intervals in brackets; `undefined`: nothing to measure.",
        "",
    ]
    parts += _table("Headline", ("", "value"), headline(results))
    if f"detection.{FILE_READOUT}.aware.f1.50" in results:
        parts += _boxes(results)
    kinds = sorted(key.removeprefix("health.") for key in results if key.startswith("health."))
    parts += _table("Health of the answers", ("", "value"), [(key, _format(results, f"health.{key}")) for key in kinds])
    return "\n".join(parts).rstrip() + "\n"


def _boxes(results: dict[str, Any]) -> list[str]:
    def row(name: str, keys: Sequence[str], digits: int = 3) -> tuple[str, ...]:
        return (name, *(_format(results, key, digits) for key in keys))

    parts = _table(
        "Detection",
        ("", "IoU .50", ".75", ".90", ".95", "mean .50:.95"),
        [
            row(f"{name}, {mode}", [f"detection.{FILE_READOUT}.{mode}.{name}.{t}" for t in _THRESHOLDS])
            for mode in ("aware", "agnostic")
            for name in ("f1", "precision", "recall", "macro_f1")
            if f"detection.{FILE_READOUT}.{mode}.{name}.50" in results
        ],
    )
    for kind, named in (("coco", COCO_KEYS), ("lvis", LVIS_KEYS)):
        keys = [f"box_area.{key}" if key in AREA_KEYS and f"{kind}.constant.{key}" not in results else key for key in named]
        modes = [mode for mode in ("file", "constant") if f"{kind}.{mode}.ap" in results]
        rows = [row(f"scores: {mode}", [f"{kind}.{mode}.{key}" for key in keys]) for mode in modes]
        parts += _table(f"{kind.upper()} average precision", ("", *keys), rows)
    for mode in ("file", "constant"):
        rows = [row(kind, [f"tide.{mode}.{what}.{kind.lower()}" for what in ("dap", "count")]) for kind in TIDE_KINDS]
        if f"tide.{mode}.dap.cls" in results:
            parts += _table(f"Errors by TIDE, scores: {mode}", ("kind", "AP50 lost", "count"), rows)
    columns = ("f1.50", "f1.mean", "precision.50", "recall.50", "n")
    for kind, title, names in (
        ("size", "By object size (COCO)", [b[0] for b in COCO_SIZES]),
        ("bins", "By object size in bins", [b[0] for b in BIN_SIZES]),
        ("crowding", "By true boxes in the image", [b[0] for b in CROWDING]),
    ):
        rows = [row(name, [f"buckets.aware.{kind}.{name}.{key}" for key in columns]) for name in names]
        parts += _table(f"{title}, class-aware", ("", *columns), rows)
    where = f"localisation.{FILE_READOUT}"
    statistics = [f"{stat}_{unit}" for unit in ("bins", "px") for stat in ("mean", "median", "p90", "signed_bias")]
    parts += _table(
        "Localisation of matched boxes",
        ("", *statistics),
        [row(slot, [f"{where}.{slot}.{s}" for s in statistics], 2) for slot in (*SLOTS, "all")],
    )
    sized = ("mean_bins", "mean_px", "signed_bias_bins", "n")
    names = [*(f"size.{b[0]}" for b in COCO_SIZES), *(f"bins.{b[0]}" for b in BIN_SIZES)]
    parts += _table("Localisation by size", ("", *sized), [row(name, [f"{where}.{name}.{s}" for s in sized], 2) for name in names])
    if "calibration.all.n" in results:
        calibrated = ("coverage_50", "coverage_80", "coverage_90", "coverage_95", "pit_ks", "pit_mean", "n")
        rows = [row(slot, [f"calibration.{slot}.{key}" for key in calibrated]) for slot in (*SLOTS, "all")]
        parts += _table("Coordinate calibration", ("", *calibrated), rows)
    return parts + _class_table(results["per_class"])


def _class_table(classes: list[dict[str, Any]]) -> list[str]:
    columns = ("true", "predicted", "f1.50", "f1.mean", "recall.50", "ap")
    rows = [(_text(str(entry["desc"])), *(_format(entry, key) for key in columns)) for entry in classes[:_CLASSES]]
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
