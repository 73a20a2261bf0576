"""Statistics by image that two runs can be paired on: the same images, so what an image adds by being hard cancels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from coordexp.codec import CoordCodec
from coordexp.evaluate.bootstrap import Ratio
from coordexp.evaluate.buckets import BIN_SIZES, sides_bins
from coordexp.evaluate.detection import count_matches, micro_ratio
from coordexp.evaluate.grounding import grounding_scores, pointing_scores
from coordexp.evaluate.health import is_clean, repeats, states_parsing
from coordexp.evaluate.localisation import edge_errors, matched_pairs
from coordexp.evaluate.result import Joined, join
from coordexp.evaluate.samples import FILE_READOUT, FloatArray, IntArray, Sample, flatten


def image_ratios(predictions: Path, records: Path, *, convention: str, renamed: Mapping[str, str], force: bool = False) -> dict[str, Ratio]:
    """Every statistic that a comparison resamples, by its results key; the rows of each are the records in their order.

    ``detection.<readout>.{aware,agnostic}.{f1,precision,recall}.50`` and ``.f1.mean``, ``localisation.<readout>.all.mean_bins``. Of
    the boxes as they stand ``recall.<size>.50`` (class-agnostic) and ``localisation.file.<size>.mean_bins`` by the size of the true box
    (``bins.<bucket>``, ``third.<small, middle, large>``), and ``health.{parse_rate,duplicate_rate,boxes_per_image}``. Grounding and
    pointing have their own keys. ``renamed`` is what semantic matching made of predicted descriptions, as results.json holds it.

    Raises:
        CoordexpError: files that cannot be read or do not fit together.
    """
    joined = join(predictions, records, convention, force=force)
    found: dict[str, Ratio] = {}
    if joined.task != "pointing":
        samples = joined.samples(renamed)
        found |= _boxes(joined, samples)
    if joined.task == "grounding":
        found |= {
            f"grounding.{key}": ratio for key, ratio in grounding_scores(joined.rows, joined.truth, joined.readouts).statistics.items()
        }
    if joined.task == "pointing":
        found |= {f"pointing.{key}": ratio for key, ratio in pointing_scores(joined.rows, joined.truth, joined.readouts).statistics.items()}
    stated = np.array([states_parsing(row) for row in joined.rows], dtype=np.float64)
    clean = np.array([states_parsing(row) and is_clean(row) for row in joined.rows], dtype=np.float64)
    return found | {"health.parse_rate": Ratio(clean[:, None], stated[:, None])}


def _mean(values: FloatArray) -> Ratio:
    return Ratio(values[:, None], np.ones((len(values), 1)))


def _boxes(joined: Joined, samples: Sequence[Sample]) -> dict[str, Ratio]:
    found: dict[str, Ratio] = {}
    pairs = matched_pairs(samples)
    for readout in joined.readouts:
        for mode in ("aware", "agnostic"):
            counts = count_matches(samples, readout, class_aware=mode == "aware")
            prefix = f"detection.{readout}.{mode}"
            found |= {f"{prefix}.{name}.50": micro_ratio(counts, name, first_only=True) for name in ("f1", "precision", "recall")}
            found[f"{prefix}.f1.mean"] = micro_ratio(counts, "f1")
        errors = edge_errors(samples, pairs, readout, joined.codec)
        sums = _by_image(errors.image, np.abs(errors.bins).sum(axis=1), len(samples))
        found[f"localisation.{readout}.all.mean_bins"] = Ratio(sums, 4 * _by_image(errors.image, None, len(samples)))
    found |= _by_size(samples, joined.codec)
    duplicates, predicted = repeats(samples)[0].astype(np.float64), np.array([len(s.pred_labels) for s in samples], dtype=np.float64)
    return found | {"health.duplicate_rate": Ratio(duplicates[:, None], predicted[:, None]), "health.boxes_per_image": _mean(predicted)}


def _by_size(samples: Sequence[Sample], codec: CoordCodec) -> dict[str, Ratio]:
    """Recall at IoU .5 and edge error by the size of the true box, of the boxes as they stand.

    ``bins.<bucket>`` where the data fill more than one bucket; ``third.{small,middle,large}`` always: thirds of these very objects.
    """
    flat = flatten(samples, FILE_READOUT)
    side = sides_bins(flat.true_boxes, flat.true_image, samples, codec)
    hit = count_matches(samples, FILE_READOUT, class_aware=False).pairs[0][1]
    errors = edge_errors(samples, matched_pairs(samples), FILE_READOUT, codec)
    filled = [(f"bins.{name}", low, high) for name, low, high in BIN_SIZES if ((side >= low) & (side < high)).any()]
    buckets = filled if len(filled) > 1 else []
    if side.size:
        a, b = np.quantile(side, [1 / 3, 2 / 3])
        buckets = [*buckets, ("third.small", 0.0, a), ("third.middle", a, b), ("third.large", b, np.inf)]
    found = {}
    for name, low, high in buckets:
        own, own_hit = (side >= low) & (side < high), (side[hit] >= low) & (side[hit] < high)
        found[f"recall.{name}.50"] = Ratio(
            _by_image(flat.true_image[hit[own_hit]], None, flat.images), _by_image(flat.true_image[own], None, flat.images)
        )
        inside = (errors.side_bins >= low) & (errors.side_bins < high)
        sums = _by_image(errors.image[inside], np.abs(errors.bins[inside]).sum(axis=1), flat.images)
        found[f"localisation.file.{name}.mean_bins"] = Ratio(sums, 4 * _by_image(errors.image[inside], None, flat.images))
    return found


def _by_image(image: IntArray, weights: FloatArray | None, images: int) -> FloatArray:
    return np.bincount(image, weights=weights, minlength=images).astype(np.float64)[:, None]
