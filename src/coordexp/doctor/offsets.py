"""A systematic offset of predicted edges, and which pair of conventions explains it. numpy only.

A checkpoint that learned bins under one convention and is read back under another is off by a line: with ``t`` the true place as a
share of the side, bins ``t * s`` (less half a bin, on average, where the encoder rounds down) are read as ``b / s'``, so

    (predicted - true) / side = a + c t,   c = s / s' - 1,   a = -1 / (2 s') after rounding down, else 0.

``a`` and ``c`` are fitted to the edges of matched boxes by least squares, with a covariance clustered by image (the sandwich of Liang and
Zeger), and every pair ``(encode, decode)`` is tested against them: chi-squared with two degrees of freedom.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coordexp.codec import CONVENTIONS
from coordexp.data.records import read_records
from coordexp.doctor.base import Check
from coordexp.evaluate.localisation import matched_pairs
from coordexp.evaluate.predictions import read_predictions
from coordexp.evaluate.samples import FILE_READOUT, check_sizes, in_order, make_samples, normalise

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CODE: Final = "D04"
NAME: Final = "systematic offset"
LIMIT: Final = 9.21  # 99 % of chi-squared with two degrees of freedom
LEAST_IMAGES: Final = 20


@dataclass(frozen=True)
class Line:
    """``offset`` a and ``slope`` c in shares of the side, with their 2 x 2 ``covariance``; fitted to ``edges`` of ``images``."""

    offset: float
    slope: float
    covariance: FloatArray
    edges: int
    images: int

    def distance(self, offset: float, slope: float) -> float:
        """Chi-squared of another line."""
        gap = np.array([self.offset - offset, self.slope - slope])
        return float(gap @ np.linalg.solve(self.covariance, gap))


def fit_line(true: FloatArray, predicted: FloatArray, image: IntArray) -> Line:
    """Least squares of ``predicted - true`` on ``true``, both ``[E]`` in shares of the side; ``image`` ``[E]`` names the cluster.

    Raises:
        ValueError: fewer than two different true places.
    """
    design = np.stack([np.ones_like(true), true], axis=1)
    normal = design.T @ design
    if np.linalg.matrix_rank(normal) < 2:
        raise ValueError("expected edges at two places at least")
    inverse = np.linalg.inv(normal)
    error = predicted - true
    beta = inverse @ design.T @ error
    residual = error - design @ beta
    _, cluster = np.unique(image, return_inverse=True)
    count = int(cluster.max()) + 1
    scores = np.zeros((count, 2))
    np.add.at(scores, cluster, design * residual[:, None])
    # A floor of 1e-12 of the side squared: edges read back exactly leave no residual, and no covariance to divide by.
    covariance = inverse @ (scores.T @ scores) @ inverse * count / max(count - 1, 1) + 1e-12 * np.eye(2)
    return Line(float(beta[0]), float(beta[1]), covariance, len(true), count)


def pairs() -> dict[tuple[str, str], tuple[float, float]]:
    """``(offset, slope)`` by ``(encode, decode)``, of every two named conventions."""
    lines = {}
    for encode, written in CONVENTIONS.items():
        for decode, read in CONVENTIONS.items():
            lines[encode, decode] = (-0.5 / read.scale if written.floor else 0.0, written.scale / read.scale - 1)
    return lines


def explain(line: Line) -> list[tuple[str, str, float]]:
    """``(encode, decode, chi-squared)`` of the pairs that the edges do not rule out, the nearest first."""
    found = [(encode, decode, line.distance(*expected)) for (encode, decode), expected in pairs().items()]
    return sorted((item for item in found if item[2] < LIMIT), key=lambda item: item[2])


def matched_edges(predictions: Path, records: Path) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """``(true, predicted, side, image)``, each ``[E]``: the four edges of every matched pair, in pixels.

    Raises:
        DataError, ComparisonError: files that cannot be read or do not fit together.
    """
    rows, truth = read_predictions(predictions), read_records(records, check_images=False).records
    rows = in_order(rows, truth, predictions, records)
    check_sizes(rows, truth)
    samples = make_samples(rows, truth, [], normalise)
    columns: list[list[Any]] = [[], [], [], []]
    for i, (sample, (p, t)) in enumerate(zip(samples, matched_pairs(samples), strict=True)):
        sides = np.tile([sample.width, sample.height] * 2, len(p)).astype(np.float64)
        parts = (sample.true_boxes[t].ravel(), sample.pred_boxes[FILE_READOUT][p].ravel(), sides, np.full(4 * len(p), i))
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    true, predicted, side, image = (np.concatenate([np.zeros(0), *column]) for column in columns)
    return true, predicted, side, image.astype(np.int64)


def check_offset(predictions: Path, records: Path) -> Check:
    """Are predicted edges where the true ones are, on average, everywhere along the side? See the module.

    Raises:
        DataError, ComparisonError: as :func:`matched_edges`.
    """
    true, predicted, side, image = matched_edges(predictions, records)
    images = len(np.unique(image))
    if images < LEAST_IMAGES:
        return Check(
            CODE, NAME, "skipped", f"{images} images have a predicted box with IoU .5 to a true one; {LEAST_IMAGES} are needed",
            "boxes that are far off, or in other units, meet none: look at the convention of each file above", {"images": images},
        )  # fmt: skip
    line = fit_line(true / side, predicted / side, image)
    bias = float((predicted - true).mean())
    errors = np.sqrt(np.diag(line.covariance))
    values: dict[str, Any] = {
        "edges": line.edges, "images": line.images, "mean_px": bias,
        "offset": line.offset, "offset_se": float(errors[0]), "slope": line.slope, "slope_se": float(errors[1]),
    }  # fmt: skip
    seen = (
        f"{line.edges} edges of {line.images} images: offset {line.offset * 1000:+.2f} ± {errors[0] * 2000:.2f}, growing by "
        f"{line.slope * 1000:+.2f} ± {errors[1] * 2000:.2f} along the side (in thousandths of it; mean {bias:+.2f} px)"
    )
    possible = explain(line)
    values["pairs"] = [{"encode": encode, "decode": decode, "chi_squared": chi} for encode, decode, chi in possible]
    none = line.distance(0.0, 0.0)
    if none < LIMIT:
        finest = float(errors[1] * 2000)
        sharp = (
            ""
            if finest < 0.5
            else f"; conventions differ by 1 in a thousand or less and need more images to be told apart (± {finest:.2f})"
        )
        return Check(CODE, NAME, "ok", f"{seen}: none that can be told from chance{sharp}", "", values)
    if not possible:
        return Check(
            CODE, NAME, "warning", f"{seen}: no pair of named conventions explains it",
            "a resize that rounds differently, boxes counted in an image of another size, or a model drawn to the middle", values,
        )  # fmt: skip
    encode, decode, _ = possible[0]
    named = ", ".join(f"{first} read as {second}" for first, second, _ in possible)
    return Check(
        CODE, NAME, "fail", f"{seen}: as of bins made by {encode} and read back by {decode} (not ruled out: {named})",
        f"{remedy(encode, decode)}: left is {_left(true, predicted, side, encode, decode):+.3f} px on average", values,
    )  # fmt: skip


def remedy(encode: str, decode: str) -> str:
    """What removes the offset of a pair."""
    written = CONVENTIONS[encode]
    half = "(bin + 0.5)" if written.floor else "bin"
    return f"read the bins as {half} / {written.scale:g} * side ({encode}) instead of bin / {CONVENTIONS[decode].scale:g} * side ({decode})"


def _left(true: FloatArray, predicted: FloatArray, side: FloatArray, encode: str, decode: str) -> float:
    bins = predicted / side * CONVENTIONS[decode].scale
    written = CONVENTIONS[encode]
    again = (bins + (0.5 if written.floor else 0.0)) / written.scale * side
    return float((again - true).mean())
