"""Line charts of a run's log as inline SVG.

The SVG carries no colours of its own: every colour is a CSS variable of the page (``--ink``, ``--grid``,
``--train``, ``--eval``), so a chart follows the page's light, dark and print styles. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coordexp.runs.logs import EVAL_PREFIX, RunLog, series
from coordexp.runs.tables import number

# matplotlib wants real colours: these stand in for the variables and are replaced in the SVG.
_STAND_INS: Final = {"#010101": "var(--ink)", "#020202": "var(--grid)", "#030303": "var(--train)", "#040404": "var(--eval)"}
_INK, _GRID, _TRAIN, _EVAL = _STAND_INS
_SIZE: Final = (2.9, 1.95)


@dataclass(frozen=True)
class Panel:
    """One small chart: a log key, its title, its unit and, for shares, fixed limits of the vertical axis."""

    key: str
    title: str
    unit: str
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A drawn panel: the SVG, a sentence that says what it shows, and the last values (None where there is none)."""

    panel: Panel
    svg: str
    description: str
    last_train: float | None
    last_eval: float | None
    dropped: int

    @property
    def train_text(self) -> str:
        """Last training value as text."""
        return number(self.last_train, "bins" if self.panel.unit == "bins" else "ratio")

    @property
    def eval_text(self) -> str:
        """Last evaluation value as text."""
        return number(self.last_eval, "bins" if self.panel.unit == "bins" else "ratio")


LOSS_PANELS: Final = (
    Panel("loss", "Total loss", "weighted sum"),
    Panel("base_ce/loss", "Text cross-entropy", "nats"),
    Panel("coord_softce_w1/loss", "Coordinate loss", "weighted sum"),
    Panel("coord_softce_w1/soft_ce", "Soft cross-entropy", "nats"),
    Panel("coord_softce_w1/gate", "Gate", "nats"),
    Panel("coord_dist/kl", "KL to the soft target", "nats"),
    Panel("coord_dist/crps", "CRPS", "bins"),
)
COORD_PANELS: Final = (
    Panel("coord_dist/argmax_bin_mae", "Argmax error", "bins"),
    Panel("coord_dist/median_bin_mae", "Median error", "bins"),
    Panel("coord_expected_bin_mae", "Expected-bin error", "bins"),
    Panel("coord_softce_w1/coord_vocab_mass", "Coordinate mass", "share", (0.0, 1.0)),
)


def draw_panels(log: RunLog, panels: Sequence[Panel]) -> tuple[list[Chart], list[Panel]]:
    """The charts of the panels that the log has values for, and the panels it has none for.

    Values that are not finite leave a gap in the line and are counted in ``dropped``.

    Raises:
        DataError: a value in the log that is not a number.
    """
    charts: list[Chart] = []
    absent: list[Panel] = []
    for panel in panels:
        train, evaluation = series(log.train, panel.key), series(log.eval, EVAL_PREFIX + panel.key)
        if train[0] or evaluation[0]:
            charts.append(_draw(panel, train, evaluation))
        else:
            absent.append(panel)
    return charts, absent


def _draw(panel: Panel, train: tuple[list[int], list[float]], evaluation: tuple[list[int], list[float]]) -> Chart:
    dropped = sum(not math.isfinite(v) for v in train[1] + evaluation[1])
    train_values, eval_values = _gaps(train[1]), _gaps(evaluation[1])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.key, "font.size": 9.5, "path.simplify": True}):
        figure = Figure(figsize=_SIZE)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.165, 0.215, 0.815, 0.735))
        _style(axes, panel)
        if train_values:
            marker = "o" if len(train_values) < 3 else ""
            axes.plot(train[0], train_values, color=_TRAIN, linewidth=1.3, marker=marker, markersize=3)
        if eval_values:
            axes.plot(evaluation[0], eval_values, color=_EVAL, linewidth=1.3, linestyle=(0, (4, 1.6)), marker="o", markersize=3.2)
        _limit(axes, panel, [v for v in train_values + eval_values if math.isfinite(v)])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Chart(panel, _inline(buffer.getvalue()), _describe(panel, train, evaluation), _last(train[1]), _last(evaluation[1]), dropped)


def _gaps(values: list[float]) -> list[float]:
    return [v if math.isfinite(v) else math.nan for v in values]


def _style(axes: Any, panel: Panel) -> None:
    axes.set_xlabel("step", color=_INK, labelpad=2)
    axes.grid(True, axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)
    axes.tick_params(colors=_INK, color=_GRID, length=0, pad=3)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _limit(axes: Any, panel: Panel, values: list[float]) -> None:
    """Start the axis at zero where that does not flatten the curve, so that heights can be compared."""
    if panel.limits is not None:
        axes.set_ylim(panel.limits[0], panel.limits[1] * 1.03)
        axes.set_yticks([panel.limits[0] + (panel.limits[1] - panel.limits[0]) * i / 4 for i in range(5)])
    elif values and 0 <= min(values) <= 0.6 * max(values):
        axes.set_ylim(0, max(values) * 1.06)


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None


def _describe(panel: Panel, train: tuple[list[int], list[float]], evaluation: tuple[list[int], list[float]]) -> str:
    parts = []
    for name, (steps, values) in (("training", train), ("evaluation", evaluation)):
        finite = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        if finite:
            parts.append(f"{name} from {finite[0][1]:.4g} at step {finite[0][0]} to {finite[-1][1]:.4g} at step {finite[-1][0]}")
    return f"{panel.title} ({panel.unit}) over steps: {'; '.join(parts) or 'no finite value'}."


def _inline(svg: str) -> str:
    """The ``<svg>`` element alone, without namespaces, metadata, unused ids and colours of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    # A style element inside an inline SVG would apply to the whole page; the page's own sheet has this rule.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) version="[^"]*"', r'\1 aria-hidden="true" focusable="false"', body, count=1)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)
    # Shorter places, in attributes alone: a tick label keeps its digits.
    body = re.sub(r'"[^"]*"', lambda quoted: re.sub(r"(\d\.\d\d)\d+", r"\1", quoted[0]), body)
    for stand_in, variable in _STAND_INS.items():
        body = body.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", body).strip()
