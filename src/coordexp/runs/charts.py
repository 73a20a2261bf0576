"""Line charts of a run's log as inline SVG.

The SVG carries no colours of its own: every colour is a CSS variable of the page (``--ink``, ``--grid``,
``--train``, ``--eval``, ``--c1`` to ``--c6``), so a chart follows the page's light, dark and print styles. Text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coordexp.runs.logs import EVAL_PREFIX, RunLog, series
from coordexp.runs.tables import number

# matplotlib wants real colours: these stand in for the variables and are replaced in the SVG.
_STAND_INS: Final = {
    "#010101": "var(--ink)", "#020202": "var(--grid)", "#030303": "var(--train)", "#040404": "var(--eval)",
    **{f"#0{n}0{n}0{n}": f"var(--c{n - 4})" for n in range(5, 10)}, "#0a0a0a": "var(--c6)",
}  # fmt: skip
INK, GRID, TRAIN, EVAL, *_SERIES = _STAND_INS
SERIES: Final[tuple[str, ...]] = tuple(_SERIES)
_KINDS: Final = {"bins": "bins", "tokens/s": "whole", "images/s": "count"}
_SIZE: Final = (2.9, 1.95)


@dataclass(frozen=True)
class Panel:
    """One small chart: a log key, its title, its unit and, for shares, fixed limits of the vertical axis; ``zero``: it begins at 0."""

    key: str
    title: str
    unit: str
    limits: tuple[float, float] | None = None
    zero: bool = False


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
        return number(self.last_train, _KINDS.get(self.panel.unit, "ratio"))

    @property
    def eval_text(self) -> str:
        """Last evaluation value as text."""
        return number(self.last_eval, _KINDS.get(self.panel.unit, "ratio"))


LOSS_PANELS: Final = (
    Panel("loss", "Total loss", "weighted sum"),
    Panel("base_ce/loss", "Text cross-entropy", "nats"),
    Panel("coord_softce_w1/soft_ce", "Soft cross-entropy", "nats"),
    Panel("coord_softce_w1/gate", "Gate", "nats"),
)
COORD_PANELS: Final = (
    Panel("coord_dist/argmax_bin_mae", "Argmax error", "bins"),
    Panel("coord_dist/median_bin_mae", "Median error", "bins"),
    Panel("coord_expected_bin_mae", "Expected-bin error", "bins"),
    Panel("coord_dist/crps", "CRPS", "bins"),
)
DISTRIBUTION_PANELS: Final = (
    Panel("coord_dist/kl", "KL to the soft target", "nats"),
    Panel("coord_dist/entropy", "Entropy", "nats"),
    Panel("coord_dist/std", "Standard deviation", "bins"),
    Panel("coord_dist/multimodal_frac", "More than one mode", "share", (0.0, 1.0)),
    Panel("coord_softce_w1/p_gt_mean", "p of the true bin", "share"),
    Panel("coord_dist/signed_bias", "Signed bias", "bins"),
    Panel("coord_softce_w1/coord_vocab_mass", "Mass where due", "share", (0.0, 1.0)),
    Panel("coord_monitor/coord_vocab_mass_at_gt_text", "Mass at text", "share"),
)
SPEED_PANELS: Final = (
    Panel("speed/tokens_per_s", "Tokens", "tokens/s", zero=True),
    Panel("speed/supervised_tokens_per_s", "Supervised tokens", "tokens/s", zero=True),
    Panel("speed/samples_per_s", "Images", "images/s", zero=True),
    Panel("speed/loss_share", "Loss layer, part of a step", "share", zero=True),
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


# Points of a line: a chart is about 250 pixels wide.
MAX_POINTS: Final = 500


def binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most ``MAX_POINTS`` points of a long line: of each of a quarter as many stretches the first, lowest, highest and last row.

    So a spike of one row stays to be seen, and a stretch without a finite value stays a gap.
    """
    if len(values) <= MAX_POINTS:
        return list(steps), list(values)
    kept: list[int] = []
    array = np.asarray(values, dtype=np.float64)
    for part in np.array_split(np.arange(len(array)), MAX_POINTS // 4):
        finite = part[np.isfinite(array[part])]
        ends = [int(finite[np.argmin(array[finite])]), int(finite[np.argmax(array[finite])])] if len(finite) else []
        kept += sorted({int(part[0]), int(part[-1]), *ends})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _draw(panel: Panel, train: tuple[list[int], list[float]], evaluation: tuple[list[int], list[float]]) -> Chart:
    dropped = sum(not math.isfinite(v) for v in train[1] + evaluation[1])
    (train_steps, train_kept), (eval_steps, eval_kept) = binned(*train), binned(*evaluation)
    train_values, eval_values = _gaps(train_kept), _gaps(eval_kept)
    with drawing(panel.key):
        figure = new_figure(_SIZE)
        axes = figure.add_axes((0.165, 0.215, 0.815, 0.735))
        style(axes, "step")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if train_values:
            marker = "o" if len(train_values) < 3 else ""
            axes.plot(train_steps, train_values, color=TRAIN, linewidth=1.3, marker=marker, markersize=3)
        if eval_values:
            axes.plot(eval_steps, eval_values, color=EVAL, linewidth=1.3, linestyle=(0, (4, 1.6)), marker="o", markersize=3.2)
        _limit(axes, panel, [v for v in train_values + eval_values if math.isfinite(v)])
        svg = to_svg(figure)
    return Chart(panel, svg, _describe(panel, train, evaluation), _last(train[1]), _last(evaluation[1]), dropped)


def _gaps(values: list[float]) -> list[float]:
    return [v if math.isfinite(v) else math.nan for v in values]


def drawing(salt: str) -> AbstractContextManager[None]:
    """Settings under which a figure is drawn: text stays text, and the same drawing is the same SVG every time."""
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9.5, "path.simplify": True})


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` inches that becomes SVG."""
    figure = Figure(figsize=size)
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as inline SVG in the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue())


def style(axes: Any, x: str, y: str | None = None) -> None:
    """Axis labels with their units, horizontal grid lines, no frame."""
    axes.set_xlabel(x, color=INK, labelpad=2)
    if y:
        axes.set_ylabel(y, color=INK, labelpad=3)
    axes.grid(True, axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.tick_params(colors=INK, color=GRID, length=0, pad=3)


def _limit(axes: Any, panel: Panel, values: list[float]) -> None:
    """Start the axis at zero where that does not flatten the curve, so that heights can be compared."""
    if panel.limits is not None:
        axes.set_ylim(panel.limits[0], panel.limits[1] * 1.03)
        axes.set_yticks([panel.limits[0] + (panel.limits[1] - panel.limits[0]) * i / 4 for i in range(5)])
    elif values and 0 <= min(values) <= (1.0 if panel.zero else 0.6) * max(values):
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
    # Coordinates need no more than two decimals; the text of labels stays as it is.
    body = re.sub(r'="[^"]*"', lambda found: re.sub(r"(\d\.\d\d)\d+", r"\1", found[0]), body)
    for stand_in, variable in _STAND_INS.items():
        body = body.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", body).strip()
