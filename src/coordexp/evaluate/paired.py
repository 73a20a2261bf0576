"""Statistics by photo that two runs can be paired on: the same photos, so what a photo adds by being hard cancels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.evaluate.bootstrap import Ratio, by_photo
from coordexp.evaluate.buckets import sides_bins
from coordexp.evaluate.join import join
from coordexp.evaluate.localisation import edge_errors, matched
from coordexp.evaluate.ranking import Ranked
from coordexp.evaluate.registry import BIN_SIZES, FILE_READOUT
from coordexp.evaluate.samples import Flat
from coordexp.evaluate.scoring import rankings, score_modes, statistics


@dataclass(frozen=True)
class Paired:
    """``ratios`` and ``ranked`` by results key (of the latter by prefix); their rows are ``photos`` photos of ``records`` records."""

    ratios: dict[str, Ratio]
    ranked: dict[str, Ranked]
    photos: int
    records: int


def paired(predictions: Path, records: Path, *, convention: str, renamed: Mapping[str, str], force: bool = False) -> Paired:
    """Every statistic that a comparison resamples, the photos in the order of the records.

    Those that an evaluation gives intervals, and of the boxes as they stand ``recall.<size>.50`` (class-agnostic) and
    ``localisation.file.<size>.mean_bins`` by the size of the true box (``bins.<bucket>``, ``third.<small, middle, large>``).
    ``renamed`` is what semantic matching made of predicted descriptions, as results.json holds it.

    Raises:
        CoordexpError: files that cannot be read or do not fit together.
    """
    joined = join(predictions, records, convention, force=force)
    flat = joined.renamed(dict(renamed))
    found = statistics(joined, flat).statistics
    if joined.task != "pointing":
        found |= _by_size(flat, joined.codec)
    ranked: dict[str, Ranked] = {}
    if joined.task == "detection":
        for mode in score_modes(flat):
            ranked |= rankings(flat, mode)
    return Paired({key: by_photo(ratio, flat.photo) for key, ratio in found.items()}, ranked, int(flat.photo.max()) + 1, flat.images)


def _by_size(flat: Flat, codec: CoordCodec) -> dict[str, Ratio]:
    """Recall at IoU .5 and edge error by the size of the true box, of the boxes as they stand.

    ``bins.<bucket>`` where the data fill more than one bucket; ``third.{small,middle,large}`` always: thirds of these very objects.
    """
    side = sides_bins(flat.true_boxes, flat.true_image, flat, codec)
    pairs = matched(flat)
    hit = pairs[1]
    errors = edge_errors(flat, pairs, FILE_READOUT, codec)
    filled = [(f"bins.{name}", low, high) for name, low, high in BIN_SIZES if ((side >= low) & (side < high)).any()]
    buckets = filled if len(filled) > 1 else []
    if side.size:
        a, b = np.quantile(side, [1 / 3, 2 / 3])
        buckets = [*buckets, ("third.small", 0.0, a), ("third.middle", a, b), ("third.large", b, np.inf)]
    found = {}
    for name, low, high in buckets:
        own, own_hit = (side >= low) & (side < high), (side[hit] >= low) & (side[hit] < high)
        counts = [flat.by_image(flat.true_image[boxes])[:, None] for boxes in (hit[own_hit], own)]
        found[f"recall.{name}.50"] = Ratio(counts[0], counts[1])
        inside = ((errors.side_bins >= low) & (errors.side_bins < high)).astype(np.float64)
        found[f"localisation.file.{name}.mean_bins"] = Ratio(
            flat.by_image(errors.image, np.abs(errors.bins).sum(axis=1) * inside)[:, None],
            4 * flat.by_image(errors.image, inside)[:, None],
            rate=False,
        )
    return found
