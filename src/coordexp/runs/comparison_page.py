"""``comparison.html``: one self-contained page from the content of ``comparison.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from coordexp.runs import charts
from coordexp.runs.pages import render_page

_DIGITS: Final = {"share": 3, "bins": 2, "nats": 3, "boxes": 2}
# The baseline in ink; with more arms than colours the line style tells them apart.
_COLORS: Final = (charts.INK, *charts.SERIES)
_COLOR_NAMES: Final = ("ink", *(f"c{i + 1}" for i in range(len(charts.SERIES))))
_STYLES: Final = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_LABELS: Final = {
    "coord_dist/crps": ("CRPS", "bins"),
    "coord_dist/nll": ("NLL in the slice", "nats"),
    "coord_expected_bin_mae": ("Expectation error", "bins"),
    "coord_softce_w1/coord_vocab_mass": ("Coordinate mass", "share"),
    "base_ce/loss": ("Text cross-entropy", "nats"),
}
_SPEED_ROWS: Final = (
    ("steps_per_s", "steps/s", 3),
    ("samples_per_s", "samples/s", 2),
    ("tokens_per_s", "tokens/s", 0),
    ("supervised_tokens_per_s", "supervised tokens/s", 0),
    ("loss_share", "loss layer's share of the step", 3),
    ("peak_memory_host_mib", "peak memory, host, MiB", 0),
    ("peak_memory_device_mib", "peak memory, devices, MiB", 0),
    ("device_utilisation", "device utilisation", 3),
)


def value_text(value: float | None, unit: str) -> str:
    """A value with the digits of its unit."""
    return "undefined" if value is None else f"{value:.{_DIGITS[unit]}f}"


def signed(value: float, unit: str) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    text = f"{value:+.{_DIGITS[unit]}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def page(data: Mapping[str, Any]) -> str:
    """The page of a comparison."""
    speeds = [
        (label, [_speed_text(arm["speed"].get(key), digits) for arm in data["arms"].values()])
        for key, label, digits in _SPEED_ROWS
        if any(arm["speed"].get(key) is not None for arm in data["arms"].values())
    ]
    content = {
        "data": data,
        "forests": [_forest(data, key) for key in data["headline"]],
        "secondary": [key for key in data["metrics"] if key not in data["headline"]],
        "curves": _curves(data),
        "colors": {arm: _COLOR_NAMES[i % len(_COLOR_NAMES)] for i, arm in enumerate(data["arms"])},
        "speeds": speeds,
        "provenance": _provenance(data),
        "value_text": value_text,
        "signed": signed,
    }
    return render_page("comparison.html.j2", **content)


def _speed_text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _forest(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Rows of one metric with the places (0 to 100) of difference and interval on a common axis that holds 0."""
    metric = data["metrics"][key]
    found = {arm: rows[key] for arm, rows in data["differences"].items()}
    ends = [0.0]
    for d in found.values():
        ends += [d["value"], *(d["interval"] or ())]
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    rows = []
    for arm, d in found.items():
        rows.append({
            "arm": arm, "mean": value_text(data["arms"][arm]["metrics"][key]["mean"], metric["unit"]),
            "difference": signed(d["value"], metric["unit"]),
            "interval": None if d["interval"] is None else [signed(v, metric["unit"]) for v in d["interval"]],
            "at": place(d["value"]), "span": None if d["interval"] is None else [place(v) for v in d["interval"]],
            "p": _p_text(d["p_holm"]), "detectable": None if d["detectable"] is None else value_text(d["detectable"], metric["unit"]),
            "verdict": d["verdict"], "by_seed": [signed(v, metric["unit"]) for v in d["by_seed"]],
        })  # fmt: skip
    baseline = data["arms"][data["baseline"]]["metrics"][key]
    return {"key": key, "metric": metric, "zero": place(0.0), "rows": rows, "baseline": value_text(baseline["mean"], metric["unit"])}


def _p_text(p: float | None) -> str | None:
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _curves(data: Mapping[str, Any]) -> list[dict[str, str]]:
    drawn = []
    for key, (title, unit) in _LABELS.items():
        lines = {arm: content["curves"][key] for arm, content in data["arms"].items() if content["curves"].get(key)}
        if lines:
            drawn.append({"title": title, "unit": unit, "svg": _draw(lines, key), "description": _describe(lines, title, unit)})
    return drawn


def _describe(lines: Mapping[str, list[list[float]]], title: str, unit: str) -> str:
    return f"{title} ({unit}) of evaluations: " + "; ".join(f"{arm} ends at {rows[-1][1]:.4g}" for arm, rows in lines.items())


def _draw(lines: Mapping[str, list[list[float]]], salt: str) -> str:
    with charts.drawing(salt):
        figure = charts.new_figure((3.5, 2.3))
        axes = figure.add_axes((0.15, 0.19, 0.83, 0.77))
        charts.style(axes, "step")
        for i, rows in enumerate(lines.values()):
            steps, values = charts.binned([int(row[0]) for row in rows], [row[1] for row in rows])
            style = _STYLES[i % len(_STYLES)]
            axes.plot(steps, values, color=_COLORS[i % len(_COLORS)], linestyle=style, linewidth=1.5, marker="o", markersize=2.4)
        return charts.to_svg(figure)


def _provenance(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs = [run for arm in data["arms"].values() for run in arm["runs"]]
    commits = sorted({f"{run['git']['commit'][:12]}{' with changes' if run['git']['dirty'] else ''}" for run in runs if run["git"]})
    versions = sorted({", ".join(f"{name} {v}" for name, v in (run["versions"] or {}).items()) for run in runs})
    machines = sorted({_machine(run["hardware"] or {}) for run in runs})
    return [
        ("evaluation set, SHA-256", data["records_sha256"]),
        ("resamples of the photos", str(data["resamples"])),
        ("code", ", ".join(commits) or "not recorded"),
        ("versions", "; ".join(versions)),
        ("hardware", "; ".join(machines)),
    ]


def _machine(hardware: Mapping[str, Any]) -> str:
    devices = ", ".join(str(d["name"]) for d in hardware.get("cuda", []))
    memory = hardware.get("memory_gib", math.nan)
    return f"{hardware.get('processor', hardware.get('machine', 'unknown'))}, {hardware.get('cpu_count')} cores, {memory} GiB" + (
        f", {devices}" if devices else ""
    )
