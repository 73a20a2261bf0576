"""Headline tiles and tables of a report, from the flat metrics of ``results.json``. Every number becomes text here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

NONE: Final = "–"
THRESHOLDS: Final = ("50", "75", "90", "95", "mean")
_ORDER: Final = ("argmax", "expectation", "median", "topk_mean", "window", "auto", "file")
_COCO: Final = (
    ("ap", "AP"),
    ("ap50", "AP .50"),
    ("ap75", "AP .75"),
    ("aps", "AP small"),
    ("apm", "AP medium"),
    ("apl", "AP large"),
    ("ar1", "AR 1"),
    ("ar10", "AR 10"),
    ("ar100", "AR 100"),
)
_LVIS: Final = (*_COCO[:6], ("apr", "AP rare"), ("apc", "AP common"), ("apf", "AP frequent"), ("ar300", "AR 300"))
_TIDE: Final = (
    ("dap.cls", "name"), ("dap.loc", "place"), ("dap.both", "both"), ("dap.dupe", "duplicate"),
    ("dap.bkg", "nothing there"), ("dap.miss", "missed"),
)  # fmt: skip
_GROUNDING: Final = (("acc.50", "Acc .50"), ("acc.80", "Acc .80"), ("acc.90", "Acc .90"), ("mean_iou", "mean IoU"))
_BUCKETS: Final = (
    ("size.small", "small objects"),
    ("size.medium", "medium objects"),
    ("size.large", "large objects"),
    ("crowding.1-5", "images of 1 to 5 objects"),
    ("crowding.6-10", "images of 6 to 10"),
    ("crowding.11-20", "images of 11 to 20"),
    ("crowding.21+", "images of 21 and more"),
)


@dataclass(frozen=True)
class Cell:
    """A number as text, its 95 % interval as text, and whether it is the best of its column."""

    text: str
    interval: str | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """``rows`` pairs a row's name with one cell per column (the columns after the first)."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Tile:
    """One headline number. ``value`` is None when the results do not have it."""

    label: str
    value: str | None
    unit: str
    interval: str | None
    detail: str


class Metrics:
    """Lookup in flat results: numbers at dotted keys, intervals under ``intervals.<the same key>``."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def value(self, key: str) -> float | None:
        """The finite number at ``key``, or None."""
        return _number(self.results.get(key))

    def cell(self, key: str, kind: str = "ratio", *, best: bool = False) -> Cell:
        """The number at ``key`` with its interval; ``kind`` is that of :func:`number`."""
        return Cell(number(self.value(key), kind), self.interval(key, kind), best)

    def interval(self, key: str, kind: str = "ratio") -> str | None:
        """The interval of ``key`` as text, or None."""
        bounds = self.results.get(f"intervals.{key}")
        if not isinstance(bounds, list) or len(bounds) != 2:
            return None
        low, high = _number(bounds[0]), _number(bounds[1])
        if low is None or high is None:
            return None
        joint = " to " if low < 0 else "–"
        return f"{number(low, kind).removesuffix(' %')}{joint}{number(high, kind)}"

    def readouts(self) -> list[str]:
        """Names of the readouts in the results, ``file`` (the boxes as they stand in the file) last."""
        found = {key.split(".")[1] for key in self.results if key.startswith("detection.") and key.count(".") >= 3}
        return [r for r in _ORDER if r in found] + sorted(found - set(_ORDER))

    def best(self, pattern: str, *, lowest: bool = False) -> str | None:
        """The readout with the best value of ``pattern`` (``{}`` stands for its name).

        ``file`` repeats one of the others or comes from elsewhere: it counts only where it is alone.
        """
        values = {r: v for r in self.readouts() if (v := self.value(pattern.format(r))) is not None}
        if len(values) > 1:
            values.pop("file", None)
        if not values:
            return None
        return (min if lowest else max)(values, key=lambda r: values[r])


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float | None, kind: str = "ratio") -> str:
    """A number as text: ``ratio`` 3 decimals, ``percent`` 1, ``bins`` 1, ``px`` 2, ``count`` 1, ``whole`` 0, ``plain`` 4 digits."""
    if value is None or not math.isfinite(value):
        return NONE
    if kind == "percent":
        return f"{100 * value:.1f} %"
    if kind == "plain":
        return f"{value:.4g}"
    return f"{value:.{ {'ratio': 3, 'bins': 1, 'px': 2, 'count': 1, 'whole': 0}[kind] }f}"


def readout_name(readout: str) -> str:
    """A readout as a reader knows it."""
    return {"file": "as predicted (file)", "topk_mean": "top-k mean"}.get(readout, readout)


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
    made.append(_rate_tile(metrics, "Parse rate", "health.parse_rate", "answers read without a problem"))
    return made


def _rate_tile(metrics: Metrics, label: str, key: str, detail: str) -> Tile:
    """A share of images; without an interval in the results, Wilson's: a bootstrap has none where every image agrees."""
    tile = _tile(metrics, label, key, "percent", "", detail)
    counts = metrics.results.get("counts")
    rate, total = metrics.value(key), _number(counts.get("effective")) if isinstance(counts, Mapping) else None
    if tile.interval is not None or rate is None or not total:
        return tile
    low, high = wilson(rate, total)
    return replace(
        tile, interval=f"{number(low, 'percent').removesuffix(' %')}–{number(high, 'percent')}", detail=f"{detail}; Wilson interval"
    )


def wilson(rate: float, total: float) -> tuple[float, float]:
    """95 % interval of a share of ``total`` trials: ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``, z = 1.96 (Wilson 1927)."""
    z = 1.959964
    middle = rate + z * z / (2 * total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


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
    """Detection, COCO, localisation and health tables; those without a single value are left out.

    Detection and localisation are of ``file``, the boxes as predicted, else of ``preferred`` or the first readout.
    """
    names = metrics.readouts()
    choice = next((r for r in ("file", preferred) if r in names), names[0] if names else "file")
    columns = ("IoU .50", ".75", ".90", ".95", "mean .50 to .95")
    detection = [
        (f"{label}, {naming}", tuple(metrics.cell(f"detection.{choice}.{naming}.{key}.{t}") for t in THRESHOLDS))
        for naming, shown in (("aware", ("f1", "precision", "recall", "macro_f1")), ("agnostic", ("f1", "precision", "recall")))
        for key, label in (("f1", "F1"), ("precision", "Precision"), ("recall", "Recall"), ("macro_f1", "Macro F1"))
        if key in shown
    ]
    coco = [(f"{mode} scores", tuple(metrics.cell(f"coco.{mode}.{key}") for key, _ in _COCO)) for mode in ("file", "constant")]
    statistics = [*((stat, unit) for unit in ("bins", "px") for stat in ("mean", "median", "p90")), ("signed_bias", "bins")]
    errors = [
        (slot, tuple(metrics.cell(f"localisation.{choice}.{slot}.{stat}_{unit}", unit) for stat, unit in statistics))
        for slot in ("x1", "y1", "x2", "y2", "all")
    ]
    names = [f"grounding.{r}" for r in names]
    grounding = [(readout_name(n.partition(".")[2]), tuple(metrics.cell(f"{n}.{key}") for key, _ in _GROUNDING)) for n in names]
    tables = [
        Table("Grounding of the referred object", tuple(label for _, label in _GROUNDING), _filled(grounding)),
        Table(f"Detection, {readout_name(choice)}", columns, _filled(detection)),
        Table("COCO average precision and recall", tuple(label for _, label in _COCO), _filled(coco)),
        Table("LVIS average precision", tuple(label for _, label in _LVIS), _filled(_modes(metrics, "lvis", _LVIS))),
        Table("AP .50 lost to each kind of error (TIDE)", tuple(label for _, label in _TIDE), _filled(_modes(metrics, "tide", _TIDE))),
        Table("By size and crowding, right name too", ("F1 .50", "recall .50", "true boxes"), _buckets(metrics)),
        Table(
            f"Localisation error of matched boxes, {readout_name(choice)}",
            ("mean, bins", "median, bins", "p90, bins", "mean, px", "median, px", "p90, px", "signed bias, bins"),
            _filled(errors),
        ),
        Table(
            "True edges inside the model's central intervals, matched boxes",
            ("50 %", "80 %", "90 %", "95 %"),
            _filled([("share", tuple(metrics.cell(f"calibration.all.coverage_{level}") for level in (50, 80, 90, 95)))]),
        ),
        Table("Health of the answers", ("value",), _filled(_health(metrics))),
    ]
    return [table for table in tables if table.rows]


def _modes(metrics: Metrics, kind: str, keys: tuple[tuple[str, str], ...]) -> list[tuple[str, tuple[Cell, ...]]]:
    return [(f"{mode} scores", tuple(metrics.cell(f"{kind}.{mode}.{key}") for key, _ in keys)) for mode in ("file", "constant")]


def _buckets(metrics: Metrics) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """Buckets with a true box in them."""
    rows = []
    for name, label in _BUCKETS:
        key = f"buckets.aware.{name}"
        if metrics.value(f"{key}.n"):
            rows.append((label, (metrics.cell(f"{key}.f1.50"), metrics.cell(f"{key}.recall.50"), metrics.cell(f"{key}.n", "whole"))))
    return tuple(rows)


def _filled(rows: list[tuple[str, tuple[Cell, ...]]]) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    return tuple(row for row in rows if any(cell.text != NONE for cell in row[1]))


def _health(metrics: Metrics) -> list[tuple[str, tuple[Cell, ...]]]:
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for key in metrics.results:
        name = key.removeprefix("health.")
        if name == key:
            continue
        kind = "percent" if name.endswith("_rate") else "plain" if name.startswith("problems.") else "count"
        label = "Problem: " + name.removeprefix("problems.") if name.startswith("problems.") else name.capitalize()
        rows.append((label.replace("_", " "), (metrics.cell(key, kind),)))
    return rows


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
            tuple(metrics.cell(p.format(r), kind, best=_is_top(metrics, p, r, tops[p])) for _, p, kind in columns),
        )
        for r in names
    )
    return Table("Readouts compared", tuple(label for label, _, _ in columns), rows)


def _is_top(metrics: Metrics, pattern: str, readout: str, top: float | None) -> bool:
    return readout != "file" and top is not None and metrics.value(pattern.format(readout)) == top


def every_metric(metrics: Metrics) -> list[tuple[str, Cell]]:
    """Every number of the results by key, for the complete list."""
    own = {k: v for k, v in metrics.results.items() if k != "schema" and not k.startswith("intervals.")}
    return [(k, metrics.cell(k, "plain")) for k, v in sorted(own.items()) if v is None or _number(v) is not None]
