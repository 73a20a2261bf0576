"""Headline tiles of a report, and the tables that compare readouts, from the flat metrics of ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass

from coordexp.evaluate.registry import FILE_READOUT
from coordexp.evaluate.tables import Cell, Metrics, Table, number, readout_name, tables

__all__ = ["Cell", "Metrics", "Table", "Tile", "every_metric", "metric_tables", "number", "readout_name", "readout_table", "tiles"]


@dataclass(frozen=True)
class Tile:
    """One headline number. ``value`` is None when the results do not have it."""

    label: str
    value: str | None
    unit: str
    interval: str | None
    detail: str


def tiles(metrics: Metrics) -> list[Tile]:
    """The headline: F1@.5 without and with the name, localisation error, AP, parse rate."""
    made = _referred_tiles(metrics)
    if metrics.readouts() or not made:
        made += [_f1_tile(metrics, "agnostic", "any name"), _f1_tile(metrics, "aware", "right name too")]
    readout = metrics.best("localisation.{}.all.mean_bins", lowest=True)
    key = f"localisation.{readout}.all.mean_"
    details = [] if readout is None else [f"mean per edge of matched boxes, {readout_name(readout)}"]
    pixels = metrics.value(key + "px")
    if pixels is not None:
        details.append(f"{number(pixels, 'px')} px")
    made.append(_tile(metrics, "Localisation error", key + "bins", "bins", "bins", "; ".join(details)))
    mode = "constant" if metrics.value("coco.file.ap") is None else "file"
    source = "every box scored 1" if mode == "constant" else "scores of the file"
    kind = "coco" if metrics.value(f"lvis.{mode}.ap") is None else "lvis"
    made.append(_tile(metrics, f"{kind.upper()} AP", f"{kind}.{mode}.ap", "ratio", "", f"IoU .50 to .95, {source}"))
    made.append(_tile(metrics, "Parse rate", "health.parse_rate", "percent", "", "answers read without a problem"))
    return made


def _referred_tiles(metrics: Metrics) -> list[Tile]:
    """Of records with one referred object: the share of boxes or points that meet it."""
    found = []
    readout = metrics.best("grounding.{}.acc.50")
    if readout is not None:
        key = f"grounding.{readout}.acc.50"
        found.append(_tile(metrics, "Grounding Acc .50", key, "ratio", "", f"IoU at least .50; {readout_name(readout)}"))
    if metrics.value("pointing.acc") is not None:
        found.append(_tile(metrics, "Pointing", "pointing.acc", "ratio", "", "points on the referred object"))
    return found


def _f1_tile(metrics: Metrics, naming: str, note: str) -> Tile:
    pattern = "detection.{}." + naming + ".f1.50"
    readout = metrics.best(pattern)
    named = len([r for r in metrics.readouts() if r != "file"])
    rank = f", best of {named} readouts" if named > 1 else ""
    detail = note if readout is None else f"{note}; {readout_name(readout)}{rank}"
    return _tile(metrics, f"F1 .50, {naming}", pattern.format(readout), "ratio", "", detail)


def _tile(metrics: Metrics, label: str, key: str, kind: str, unit: str, detail: str) -> Tile:
    value = metrics.value(key)
    return Tile(label, None if value is None else number(value, kind), unit, metrics.interval(key, kind), detail)


def metric_tables(metrics: Metrics, preferred: str | None = None) -> list[Table]:
    """The registry's tables of ``file``, the boxes as predicted, else of ``preferred`` or the first readout."""
    names = metrics.readouts()
    return tables(metrics, next((r for r in (FILE_READOUT, preferred) if r in names), names[0] if names else FILE_READOUT))


def readout_table(metrics: Metrics) -> Table | None:
    """One row per readout with the best of each column marked, or None without readouts."""
    names = metrics.readouts()
    if not names:
        return None
    columns = (
        ("aware F1 .50", "detection.{}.aware.f1.50", "ratio"),
        ("agnostic F1 .50", "detection.{}.agnostic.f1.50", "ratio"),
        ("aware F1 mean", "detection.{}.aware.f1.mean", "ratio"),
        ("agnostic F1 mean", "detection.{}.agnostic.f1.mean", "ratio"),
        ("mean error, bins", "localisation.{}.all.mean_bins", "bins"),
    )
    best = {pattern: metrics.best(pattern, lowest=kind == "bins") for _, pattern, kind in columns}
    tops = {p: None if r is None else metrics.value(p.format(r)) for p, r in best.items()}
    rows = tuple(
        (
            readout_name(r),
            tuple(metrics.cell(p.format(r), kind=kind, best=_is_top(metrics, p, r, tops[p])) for _, p, kind in columns),
        )
        for r in names
    )
    return Table("Readouts compared", tuple(label for label, _, _ in columns), rows)


def _is_top(metrics: Metrics, pattern: str, readout: str, top: float | None) -> bool:
    return readout != "file" and top is not None and metrics.value(pattern.format(readout)) == top


def every_metric(metrics: Metrics) -> list[tuple[str, Cell]]:
    """Every number of the results by key, for the complete list."""
    own = {k: v for k, v in metrics.results.items() if k != "schema" and not k.startswith("intervals.")}
    return [(k, metrics.cell(k, kind="plain")) for k, v in sorted(own.items()) if v is None or metrics.value(k) is not None]
