"""The larger figures of a report: what the loss is made of, evaluation over training, calibration, error by size and by edge.

Each function returns None where the run does not hold what the figure needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import DataError
from coordexp.evaluate.registry import BIN_SIZES, COCO_SIZES, COVERAGE, HISTOGRAM, SLOTS
from coordexp.losses.objective import TERMS
from coordexp.runs.charts import EVAL, GRID, INK, MAX_POINTS, SERIES, TRAIN, binned, drawing, new_figure, style, to_svg
from coordexp.runs.columns import Columns
from coordexp.runs.logs import EVAL_PREFIX, RunLog
from coordexp.runs.rules.statistics import train_over_eval
from coordexp.runs.tables import Metrics, number, readout_name

Array = NDArray[np.float64]
# Inches: at the widths of the page their letters come out equally large.
_WIDE: Final = (6.0, 3.0)
_HALF: Final = (3.8, 2.9)
_RATIOS: Final = (
    ("loss", "total loss"), ("base_ce/loss", "text cross-entropy"), ("coord_dist/kl", "KL to the soft target"), ("coord_dist/crps", "CRPS")
)  # fmt: skip
# The first steps of a model that starts from nothing would flatten everything after them.
_SETTLED: Final = 0.05


@dataclass(frozen=True)
class Plot:
    """A figure: ``caption`` says what one should see, ``legend`` pairs a label with a class (``c1`` ..., ``train``, ``eval``)."""

    title: str
    caption: str
    svg: str
    description: str
    legend: tuple[tuple[str, str], ...] = ()


def read_histograms(path: Path) -> list[dict[str, Any]]:
    """Rows ``{step, <key>: {low, high, counts}}`` of a ``histograms.jsonl``; a torn last line is left out.

    Raises:
        DataError: a line that is something else, as ``file:line``.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _ = int(row.get("step", 0))
            for key, value in row.items():
                if key != "step":
                    _ = float(value["low"]), float(value["high"]), np.array(value["counts"], dtype=np.float64).reshape(-1)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if n == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"{path}:{n}: expected a row of histograms: {error}") from error
        rows.append(row)
    return rows


def last_histogram(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[int, Array, Array, str] | None:
    """Step, edges ``[n + 1]``, counts ``[n]`` and ``evaluation`` or ``training`` of the latest histogram of a name; evaluation first."""
    for prefix, kind in ((EVAL_PREFIX, "evaluation"), ("", "training")):
        for row in reversed(rows):
            found = row.get(f"{prefix}coord_dist/{name}")
            if found is not None and sum(found["counts"]) > 0:
                counts = np.array(found["counts"], dtype=np.float64)
                return int(row.get("step", 0)), np.linspace(found["low"], found["high"], len(counts) + 1), counts, kind
    return None


def loss_plot(log: RunLog) -> Plot | None:
    """What the loss is made of: ``contrib/*`` of training, stacked, with the evaluation's total on the same axis."""
    columns = Columns(log.train)
    parts = {term: s for term in TERMS if (s := columns.raw(f"contrib/{term}")) is not None and np.any(s.finite().values != 0)}
    if not parts:
        return None
    first = next(iter(parts.values()))
    shared = [s for s in parts.values() if np.array_equal(s.steps, first.steps)]
    if len(shared) < len(parts) or len(first) < 2 or any((s.finite().values < 0).any() for s in shared):
        return None
    names, steps, values = list(parts), first.steps, np.array([s.values for s in parts.values()])
    whole = np.isfinite(values).all(axis=0)
    lost = int((~whole).sum())
    steps, values = steps[whole], values[:, whole]
    if len(steps) < 2:
        return None
    total = Columns(log.eval, EVAL_PREFIX).series("loss").finite()
    summed = values.sum(axis=0)
    settled = steps >= steps[0] + _SETTLED * (steps[-1] - steps[0])
    top = 1.12 * max(float(summed[settled].max()), float(total.values.max(initial=0.0)))
    with drawing("loss"):
        figure = new_figure(_WIDE)
        axes = figure.add_axes((0.09, 0.17, 0.88, 0.795))
        style(axes, "step", "weighted contribution to the loss")
        colors = [SERIES[i % len(SERIES)] for i in range(len(names))]
        axes.stackplot(*_averaged(steps, values), colors=colors, alpha=0.75, linewidth=0)
        if len(total):
            held_out = binned(total.steps.tolist(), total.values.tolist())
            axes.plot(*held_out, color=INK, linewidth=0, marker="D", markersize=4.2, clip_on=False)
        axes.set_ylim(0, top)
        axes.set_xlim(int(steps[0]), int(steps[-1]))
        svg = to_svg(figure)
    shares = {name: float(v[-1] / summed[-1]) if summed[-1] > 0 else math.nan for name, v in zip(names, values, strict=True)}
    cut = f" The first rows are cut off: they reach {summed.max():.3g}." if summed.max() > top else ""
    cut += f" Rows with a part that is no finite number are left out: {lost}." if lost else ""
    same = (
        " The diamonds should lie on the upper edge: far above it is over-fitting, a constant factor is a wrong scale."
        if len(total)
        else ""
    )
    return Plot(
        "What the loss is made of",
        f"Each band is one term's part of the training loss, its weight included; their sum is the loss.{same}{cut}",
        svg,
        "Parts of the training loss at the last row: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + ".",
        (
            *((f"{name} {share:.0%}".replace("%", " %"), f"c{i % len(SERIES) + 1}") for i, (name, share) in enumerate(shares.items())),
            *((("evaluation, total", "diamond"),) if len(total) else ()),
        ),
    )


def _averaged(steps: NDArray[np.int64], values: Array) -> tuple[Array, Array]:
    """Rows of a long stack in stretches: their mean step ``[n]`` and mean parts ``[terms, n]``, which still add up."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS // 2))
    return np.array([steps[g].mean() for g in groups]), np.stack([values[:, g].mean(axis=1) for g in groups], axis=1)


def ratio_plot(log: RunLog) -> Plot | None:
    """Evaluation over training of the same metric, at every evaluation; 1.0 marked."""
    train, evaluation = Columns(log.train), Columns(log.eval, EVAL_PREFIX)
    found = []
    for key, label in _RATIOS:
        ratio = train_over_eval(train.series(key), evaluation.series(key))
        if ratio is not None:
            found.append((label, ratio.steps, np.exp(-ratio.logs)))
    if not found:
        return None
    everything = np.concatenate([values for *_, values in found])
    low, high = min(0.75, 0.97 * float(everything.min())), max(1.33, 1.03 * float(everything.max()))
    with drawing("ratio"):
        figure = new_figure(_WIDE)
        axes = figure.add_axes((0.1, 0.17, 0.87, 0.795))
        style(axes, "step", "evaluation / training")
        axes.axhline(1.0, color=INK, linewidth=1.1)
        for i, (_, steps, values) in enumerate(found):
            axes.plot(*binned(steps.tolist(), values.tolist()), color=SERIES[i], linewidth=1.3, marker="o", markersize=3.4)
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        marks = (
            (0.75, 0.9, 1.0, 1.1, 1.33)
            if high < 2 * low
            else (0.001, 0.01, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 100.0, 1000.0)
        )
        ticks = [t for t in marks if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        svg = to_svg(figure)
    last = ", ".join(f"{label} {values[-1]:.3g}" for label, _, values in found)
    return Plot(
        "Evaluation over training",
        "Each point compares an evaluation with the training rows around it, over the same kind of tokens. Near 1 is sound; a line that "
        "starts at 1 and climbs is over-fitting; one that sits at a constant like 8 or 1/8 is a loss scaled wrongly.",
        svg,
        f"Ratio of evaluation to training, last: {last}.",
        tuple((label, f"c{i + 1}") for i, (label, *_) in enumerate(found)),
    )


def pit_plot(rows: Sequence[Mapping[str, Any]], metrics: Metrics) -> Plot | None:
    """PIT histograms as densities: teacher-forced from the log, and of matched predicted boxes from the results."""
    forced = last_histogram(rows, "pit")
    shares = [metrics.value(f"calibration.pit_histogram.{k}") for k in range(HISTOGRAM)]
    predicted = None if any(v is None for v in shares) else np.array(shares, dtype=np.float64) * HISTOGRAM
    if forced is None and predicted is None:
        return None
    legend: list[tuple[str, str]] = []
    with drawing("pit"):
        figure = new_figure(_HALF)
        axes = figure.add_axes((0.135, 0.185, 0.825, 0.785))
        style(axes, "PIT of the true edge", "density")
        if forced is not None:
            _, _, counts, kind = forced
            groups = 20 if len(counts) % 20 == 0 else len(counts)
            density = counts.reshape(groups, -1).sum(axis=1) / counts.sum() * groups
            axes.stairs(density, np.linspace(0, 1, groups + 1), color=TRAIN, fill=True, alpha=0.35, linewidth=0)
            legend.append((f"{kind} data, teacher forced", "train"))
        if predicted is not None:
            axes.stairs(predicted, np.linspace(0, 1, HISTOGRAM + 1), color=EVAL, linewidth=1.6, baseline=None)
            legend.append(("test data, matched predicted boxes", "eval"))
        axes.axhline(1.0, color=INK, linewidth=1.1, linestyle=(0, (2, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", pad=6)
        svg = to_svg(figure)
    return Plot(
        "PIT histogram",
        "PIT is the share of the predicted distribution below the true edge. Flat at 1 is calibrated. A hump in the middle: distributions "
        "wider than the errors, as a soft target teaches. A U: too narrow. A slope: shifted to one side.",
        svg,
        "Histogram of the probability integral transform against the flat line of a calibrated model.",
        tuple(legend),
    )


def coverage_plot(log: RunLog, metrics: Metrics) -> Plot | None:
    """Share of true edges inside central intervals against the nominal share."""
    evaluation = Columns(log.eval, EVAL_PREFIX)
    logged = [(level, s.values[-1]) for level in (50, 80, 95) if len(s := evaluation.series(f"coord_dist/coverage_{level}").finite())]
    measured = [(level, v) for level in COVERAGE if (v := metrics.value(f"calibration.all.coverage_{level}")) is not None]
    if not logged and not measured:
        return None
    legend: list[tuple[str, str]] = []
    with drawing("coverage"):
        figure = new_figure(_HALF)
        axes = figure.add_axes((0.135, 0.185, 0.825, 0.785))
        style(axes, "central interval of the distribution, %", "true edges inside, %")
        axes.plot([40, 100], [40, 100], color=INK, linewidth=1.1, linestyle=(0, (2, 2)))
        for points, color, label, key in ((logged, TRAIN, "evaluation data, teacher forced", "train"),
                                          (measured, EVAL, "test data, matched predicted boxes", "eval")):  # fmt: skip
            if points:
                axes.plot([p[0] for p in points], [100 * p[1] for p in points], color=color, linewidth=1.4, marker="o", markersize=4)
                legend.append((label, key))
        axes.set_xlim(45, 100)
        axes.set_ylim(min([40.0, *(100 * p[1] - 5 for p in logged + measured)]), 102)
        svg = to_svg(figure)
    told = "; ".join(f"{level} % interval: {number(v, 'percent')}" for level, v in measured or logged)
    return Plot(
        "Coverage of central intervals",
        "On the dotted line an interval holds what it promises. Above it the model is less sure than it could be, below it too sure.",
        svg,
        f"Coverage: {told}.",
        tuple(legend),
    )


def error_curve(rows: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Share of edges whose median lies within so many bins of the truth, teacher forced."""
    found = last_histogram(rows, "abs_err")
    if found is None:
        return None
    step, edges, counts, kind = found
    shares = np.cumsum(counts) / counts.sum()
    marks = {level: float(edges[1:][np.searchsorted(shares, level / 100)]) for level in (50, 90)}
    with drawing("error"):
        figure = new_figure(_HALF)
        axes = figure.add_axes((0.135, 0.185, 0.825, 0.785))
        style(axes, "error of the median, bins", "edges within it, %")
        axes.plot(edges[1:], 100 * shares, color=EVAL if kind == "evaluation" else TRAIN, linewidth=1.5)
        for level, at in marks.items():
            axes.plot([at, at], [0, level], color=GRID, linewidth=1.2)
            axes.plot([at], [level], color=INK, linewidth=0, marker="o", markersize=3.6)
        axes.set_xscale("log")
        ticks = (1, 3, 10, 30, 100, 300)
        axes.set_xticks([t for t in ticks if edges[1] <= t <= edges[-1]], [f"{t:g}" for t in ticks if edges[1] <= t <= edges[-1]])
        axes.minorticks_off()
        axes.set_xlim(edges[1], edges[-1])
        axes.set_ylim(0, 102)
        svg = to_svg(figure)
    return Plot(
        "How far off the edges are",
        f"{kind.capitalize()} data at step {step}, teacher forced. The steeper and further left, the better: half of the edges lie within "
        f"{marks[50]:.3g} bins, 90 % within {marks[90]:.3g}.",
        svg,
        f"Half of the edges lie within {marks[50]:.3g} bins of the truth, 90 % within {marks[90]:.3g}.",
        ((f"{kind} data", "eval" if kind == "evaluation" else "train"),),
    )


def size_plot(metrics: Metrics) -> Plot | None:
    """Mean error of matched boxes by the size of the true box and by readout, in pixels."""
    readouts = _own_readouts(metrics)
    if not readouts:
        return None
    choices = []
    for kind, buckets, unit in (("bins", BIN_SIZES, "bins"), ("size", COCO_SIZES, "px")):
        groups = []
        for name, low, high in buckets:
            count = metrics.value(f"localisation.{readouts[0]}.{kind}.{name}.n")
            if count:
                span = f"under {high:g}" if low == 0 else f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"
                groups.append((f"{kind}.{name}", f"{span} {unit}\n{count:.0f} boxes"))
        choices.append(groups)
    groups = max(choices, key=len)
    if not groups:
        return None
    return _bars(
        "Error by size of the true box", metrics, readouts, groups, "mean_px", "mean error of an edge, px",
        "side of the true box (root of its area)",
        "Matched boxes of the test set. Bars of one group read the same distributions in different ways; a readout that is better on "
        "small objects shows here.",
    )  # fmt: skip


def edge_plot(metrics: Metrics) -> Plot | None:
    """Mean error of matched boxes by edge and by readout, in bins."""
    readouts = _own_readouts(metrics)
    groups = [(slot, slot) for slot in SLOTS if readouts and metrics.value(f"localisation.{readouts[0]}.{slot}.mean_bins") is not None]
    if not groups:
        return None
    return _bars(
        "Error by edge", metrics, readouts, groups, "mean_bins", "mean error, bins", "edge",
        "The four edges should be alike. Later ones are conditioned on the earlier, so x2 and y2 inherit their errors; one edge alone "
        "that stands out is a fault of that edge.",
    )  # fmt: skip


def _own_readouts(metrics: Metrics) -> list[str]:
    """Readouts with localisation errors; ``file`` only where it is alone, as it repeats another."""
    found = [r for r in metrics.readouts() if metrics.value(f"localisation.{r}.all.mean_bins") is not None]
    return [r for r in found if r != "file"] or found


def _bars(
    title: str, metrics: Metrics, readouts: Sequence[str], groups: Sequence[tuple[str, str]], stat: str, y: str, x: str, caption: str
) -> Plot:  # fmt: skip
    width = 0.8 / len(readouts)
    told = []
    with drawing(title):
        figure = new_figure(_WIDE)
        axes = figure.add_axes((0.09, 0.21, 0.88, 0.76))
        style(axes, x, y)
        for i, readout in enumerate(readouts):
            values = [metrics.value(f"localisation.{readout}.{key}.{stat}") for key, _ in groups]
            heights = [math.nan if v is None else v for v in values]
            at = [g + (i - (len(readouts) - 1) / 2) * width for g in range(len(groups))]
            axes.bar(at, heights, width=0.88 * width, color=SERIES[i % len(SERIES)])
            told.append(f"{readout_name(readout)} " + ", ".join(number(v, "px") for v in values))
        axes.set_xticks(range(len(groups)), [label for _, label in groups])
        axes.set_xlim(-0.55, len(groups) - 0.45)
        svg = to_svg(figure)
    names = ", ".join(label.replace("\n", ", ") for _, label in groups)
    legend = tuple((readout_name(r), f"c{i % len(SERIES) + 1}") for i, r in enumerate(readouts))
    return Plot(title, caption, svg, f"{y} for {names}: {'; '.join(told)}.", legend)
