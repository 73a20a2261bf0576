"""``comparison.html``: one self-contained page from the content of ``comparison.json``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, Final

import jinja2
import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coordexp.runs import charts

_DIGITS: Final = {"share": 3, "bins": 2, "nats": 3, "boxes": 2}
# Stand-ins for the page's variables --arm0 .. --arm7, replaced in the SVG.
_ARMS: Final = 8
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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coordexp.runs"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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
        "speeds": speeds,
        "provenance": _provenance(data),
        "value_text": value_text,
        "signed": signed,
    }
    return environment.get_template("comparison.html.j2").render(content) + "\n"


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
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.5}):
        figure = Figure(figsize=(3.5, 2.3))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.15, 0.19, 0.83, 0.77))
        axes.set_xlabel("step", color="#010101", labelpad=2)
        axes.grid(True, axis="y", color="#020202", linewidth=0.7)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color("#020202")
        axes.tick_params(colors="#010101", color="#020202", length=0, pad=3)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        for i, rows in enumerate(lines.values()):
            style = _STYLES[i % len(_STYLES)]
            axes.plot(
                [r[0] for r in rows],
                [r[1] for r in rows],
                color=f"#0a0a{10 + i % _ARMS:02x}",
                linestyle=style,
                linewidth=1.5,
                marker="o",
                markersize=2.4,
            )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = charts._inline(buffer.getvalue())
    for i in range(_ARMS):
        svg = svg.replace(f"#0a0a{10 + i:02x}", f"var(--arm{i})")
    return svg


def _provenance(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs = [run for arm in data["arms"].values() for run in arm["runs"]]
    commits = sorted({f"{run['git']['commit'][:12]}{' with changes' if run['git']['dirty'] else ''}" for run in runs if run["git"]})
    versions = sorted({", ".join(f"{name} {v}" for name, v in (run["versions"] or {}).items()) for run in runs})
    machines = sorted({_machine(run["hardware"] or {}) for run in runs})
    return [
        ("evaluation set, SHA-256", data["records_sha256"]),
        ("resamples of the images", str(data["resamples"])),
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
