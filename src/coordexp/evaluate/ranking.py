"""Average precision as a function of the photos drawn: detections are matched and ranked once, for all classes together.

Kinds of AP: ``coco`` (101 recalls, IoU .5:.95), ``ap07`` (11 recalls) and ``ap12`` (area under the envelope), both at IoU .5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from coordexp.evaluate.bootstrap import Interval, percentiles, same, share_interval
from coordexp.evaluate.detection import ignorable
from coordexp.evaluate.matching import THRESHOLDS, Candidates, candidates, same_label, star_pairs
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray, places

# AP is ranked anew for every draw, so it gets fewer of them than the ratios do,
AP_DRAWS: Final = 200
# and a draw of a large set holds about this many true boxes.
_BOXES: Final = 10_000


def _grid(points: int) -> tuple[FloatArray, BoolArray]:
    """The recalls, and which of them lie above the fraction that they stand for."""
    grid = np.linspace(0.0, 1.0, points)
    return grid, np.asarray(grid > np.arange(points) / (points - 1), dtype=bool)


_RECALLS: Final = {"coco": _grid(101), "ap07": _grid(11)}


class ByPhoto:
    """Where the items of each photo are, given the photo of each."""

    def __init__(self, photo: IntArray, photos: int) -> None:
        self._order = np.argsort(photo, kind="stable")
        self._count = np.bincount(photo, minlength=photos)

    def of(self, chosen: IntArray) -> IntArray:
        """Indices of the items of the photos ``chosen``."""
        return np.asarray(self._order[places(self._count, chosen)])


@dataclass(frozen=True)
class Ranked:
    """Detections of the classes that have a true box: class by class, each in rank order.

    ``label``, ``photo`` and ``within`` ``[D]``, the place among the boxes of its image and class; ``hit`` and ``ignored`` ``[D, T]``,
    over THRESHOLDS (``coco``) or IoU .5 alone. ``true_label`` and ``true_photo`` ``[N]`` are the true boxes that are to be found.
    Labels run from 0 to ``classes - 1``.
    """

    kinds: tuple[str, ...]
    classes: int
    photos: int
    label: IntArray
    photo: IntArray
    within: IntArray
    hit: BoolArray
    ignored: BoolArray
    true_label: IntArray
    true_photo: IntArray
    by_photo: ByPhoto
    true_by_photo: ByPhoto
    any_ignored: BoolArray


def rank(flat: Flat, pairs: Candidates | None = None, *, constant: bool, lvis: bool = False) -> Ranked:
    """Detections as COCO ranks and matches them: all sizes, 100 boxes an image and class.

    ``pairs`` (of equal labels) may be handed in by a caller that has them. With ``lvis`` 300 boxes of an image count, of whatever class,
    and boxes of classes that are not judged there do not.
    """
    pairs = same_label(flat, candidates(flat)) if pairs is None else pairs
    ignored = ignorable(flat, class_aware=True, federated=lvis)
    order = _order(flat, constant)
    group = flat.pred_image if lvis else flat.pred_image * max(1, len(flat.labels)) + flat.pred_label
    within = place_in_group(group, order)
    kept = within < (300 if lvis else 100)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    pairs = pairs.where(kept[pairs.pred])
    hit = np.zeros((len(order), len(THRESHOLDS)), dtype=bool)
    for t, threshold in enumerate(THRESHOLDS):
        hit[_greedy(pairs.where(pairs.iou >= threshold), place), t] = True
    return _ranked(("coco",), flat, order[kept[order]], within, hit, ignored & ~hit, np.ones(len(flat.true_label), dtype=bool))


def rank_voc(flat: Flat, *, constant: bool) -> Ranked:
    """Detections as Pascal VOC matches them at IoU .5: each looks at the one true box of its class that it overlaps most.

    The best-ranked of those that look at one box finds it, the others are false. What looks at a difficult object counts for nothing,
    and difficult objects need not be found. Crowds do not exist in VOC and are left out. Boxes are edges: there is no pixel added to
    width and height.
    """
    flat, hard = _with_difficult(flat)
    pairs = same_label(flat, candidates(flat))
    order = _order(flat, constant)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    best = pairs.pred[(by := np.lexsort((pairs.true, -pairs.iou, pairs.pred)))]
    first = np.concatenate([[True], best[1:] != best[:-1]]) if best.size else np.zeros(0, dtype=bool)
    pred, true = best[first], pairs.true[by][first]
    by_place = np.lexsort((place[pred], true))
    leads = np.concatenate([[True], np.diff(true[by_place]) != 0]) if true.size else np.zeros(0, dtype=bool)
    hit, ignored = (np.zeros((len(order), 1), dtype=bool) for _ in range(2))
    hit[pred[by_place][leads], 0] = True
    hit[pred[hard[true]], 0], ignored[pred[hard[true]], 0] = False, True
    return _ranked(("ap07", "ap12"), flat, order, place, hit, ignored, ~hard)


def _with_difficult(flat: Flat) -> tuple[Flat, BoolArray]:
    """The arrays with the difficult objects among the true ones, and which they are."""
    hard = flat.difficult
    image = np.concatenate([flat.true_image, flat.crowd_image[hard]])
    order = np.argsort(image, kind="stable")
    label = np.concatenate([flat.true_label, flat.crowd_label[hard]])[order]
    boxes = np.concatenate([flat.true_boxes, flat.crowd_boxes[hard]])[order]
    return replace(flat, true_image=image[order], true_label=label, true_boxes=boxes), order >= len(flat.true_image)


def _order(flat: Flat, constant: bool) -> IntArray:
    """Predicted boxes from the best score down, equal ones in the order of the file."""
    scores = flat.scores
    if constant or scores is None:
        return np.arange(len(flat.pred_image))
    return np.argsort(-scores, kind="stable")


def _ranked(
    kinds: tuple[str, ...], flat: Flat, order: IntArray, within: IntArray, hit: BoolArray, ignored: BoolArray, wanted: BoolArray
) -> Ranked:
    number = np.cumsum(np.bincount(flat.true_label[wanted], minlength=len(flat.labels)) > 0)
    own = order[(np.diff(number, prepend=0) > 0)[flat.pred_label[order]]]
    own = own[np.argsort(flat.pred_label[own], kind="stable")]
    photos = int(flat.photo.max(initial=-1)) + 1
    photo, true_photo = flat.photo[flat.pred_image[own]], flat.photo[flat.true_image[wanted]]
    return Ranked(
        kinds, int(number[-1]) if number.size else 0, photos, number[flat.pred_label[own]] - 1, photo, within[own], hit[own], ignored[own],
        number[flat.true_label[wanted]] - 1, true_photo, ByPhoto(photo, photos), ByPhoto(true_photo, photos),
        np.asarray(ignored[own].any(axis=0), dtype=bool),
    )  # fmt: skip


def place_in_group(group: IntArray, order: IntArray) -> IntArray:
    """How many boxes of its group are ranked before each predicted box."""
    by_group = np.argsort(group[order], kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order[by_group]] = _count(group[order][by_group]) - 1
    return place


def _greedy(pairs: Candidates, place: IntArray) -> IntArray:
    """Predicted boxes with a match: in rank order each takes the free true box with the highest IoU, of equal ones the last."""
    at_true, at_pred = star_pairs(pairs.true, pairs.pred), star_pairs(pairs.pred, pairs.true)
    shared = pairs.where(at_true)
    # Around one true box the best-ranked box takes it; a box alone with several true boxes always gets one.
    first = shared.pred[np.argsort(place[shared.pred], kind="stable")]
    true = shared.true[np.argsort(place[shared.pred], kind="stable")]
    winners = first[np.unique(true, return_index=True)[1]]
    rest = pairs.where(~(at_true | at_pred))
    order = np.lexsort((-rest.true, -rest.iou, place[rest.pred]))
    matched: set[int] = set()
    taken: set[int] = set()
    for pred, true_ in zip(rest.pred[order].tolist(), rest.true[order].tolist(), strict=True):
        if pred not in matched and true_ not in taken:
            matched.add(pred)
            taken.add(true_)
    return np.concatenate([winners, np.unique(pairs.pred[at_pred]), np.array(sorted(matched), dtype=np.int64)])


def mean_ap(ranked: Ranked, chosen: IntArray | None = None) -> dict[str, float]:
    """AP of the photos ``chosen``, each once (None: all), as means over the classes with a true box there: ``ap``, ``ap50``, ``ap75``, or
    ``ap07``, ``ap12``; NaN without one.

    AP of a class is the sum over its hits of the precision after it, made non-increasing from the last hit back, times the share of
    recalls that the hit is the first to reach; a class without a hit adds 0.
    """
    true_label, label, hit, ignored = ranked.true_label, ranked.label, ranked.hit, ranked.ignored
    if chosen is not None:
        true_label = true_label[ranked.true_by_photo.of(chosen)]
        kept = np.sort(ranked.by_photo.of(chosen))
        label, hit, ignored = label[kept], hit[kept], ignored[kept]
    true = np.bincount(true_label, minlength=ranked.classes)
    classes = int((true > 0).sum())
    place = _count(label)
    values = np.full((hit.shape[1], len(ranked.kinds)), np.nan)
    for t in range(hit.shape[1]) if classes else ():
        of_class = label[at := np.flatnonzero(hit[:, t])]
        found, below = _count(of_class), place[at]
        if ranked.any_ignored[t]:
            before = np.concatenate([[0], np.cumsum(ignored[:, t])])
            below = below - (before[at] - before[at + 1 - place[at]])
        # One accumulation for all classes: from the back, each class lies higher than the one behind it by more than any precision.
        lift = 2.0 * (ranked.classes - of_class)
        envelope = np.maximum.accumulate((found / below + lift)[::-1])[::-1] - lift
        for k, kind in enumerate(ranked.kinds):
            reached = _recalls(kind, found, true[of_class])
            gained = np.where(found > 1, reached - np.concatenate([[0.0], reached[:-1]]), reached)
            values[t, k] = (envelope * gained).sum() / classes
    if ranked.kinds == ("coco",):
        return {"ap": float(values.mean()), "ap50": float(values[0, 0]), "ap75": float(values[5, 0])}
    return dict(zip(ranked.kinds, values[0].tolist(), strict=True))


def _count(label: IntArray) -> IntArray:
    """How many of its label each is, from 1 on; equal labels stand together."""
    place = np.arange(len(label))
    first = np.concatenate([[True], label[1:] != label[:-1]])[: len(label)]
    return np.asarray(place + 1 - np.maximum.accumulate(np.where(first, place, 0)), dtype=np.int64)


def _recalls(kind: str, found: IntArray, true: IntArray) -> FloatArray:
    """The share of the recalls that ``found`` (at least 1) of ``true`` boxes reach."""
    if kind == "ap12":
        return np.asarray(found / true)
    grid, late = _RECALLS[kind]
    whole, rest = np.divmod((len(grid) - 1) * found, true)
    # As the engine compares in floating point: where the grid's number lies above k/(n - 1), that recall is not reached yet.
    return np.asarray((whole + 1 - ((rest == 0) & late[whole])) / len(grid))


def recall_of_best(ranked: Ranked, most: int) -> float | None:
    """COCO's AR: the share of true boxes found by the ``most`` best-ranked boxes of each image and class, mean over classes and IoU."""
    if not ranked.classes:
        return None
    found = [np.bincount(ranked.label[ranked.hit[:, t] & (ranked.within < most)], minlength=ranked.classes) for t in range(len(THRESHOLDS))]
    return float((np.stack(found) / np.bincount(ranked.true_label, minlength=ranked.classes)).mean())


def ap_intervals(ranked: Ranked, *, resamples: int, seed: int) -> dict[str, Interval]:
    """95 % intervals by name, within 0 and 1, from :func:`ap_draws`."""
    if ranked.photos < 2 or not ranked.classes:
        why = "none: no true box" if not ranked.classes else f"none: {ranked.photos} photo"
        return dict.fromkeys(mean_ap(ranked), Interval(None, why))
    drawn, note = ap_draws(ranked, resamples=resamples, seed=seed)
    whole, counted = mean_ap(ranked), ranked_trials(ranked)
    found = {}
    for key, values in drawn.items():
        bounds = percentiles(values, counted)
        if bounds is None or same(float(np.nanmin(values)), float(np.nanmax(values))):
            found[key] = share_interval(whole[key], values, counted) if bounds is not None else Interval(None, "none: too few photos count")
        else:
            found[key] = Interval((max(0.0, bounds[0]), min(1.0, bounds[1])), note)
    return found


def ranked_trials(ranked: Ranked) -> float:
    """As :func:`coordexp.evaluate.bootstrap.trials`: ``K^2 / sum_k(1/n_k)`` for K classes with true boxes in n_k photos."""
    cells = np.unique(ranked.true_label * ranked.photos + ranked.true_photo)
    by_class = np.bincount(cells // ranked.photos, minlength=ranked.classes)
    return float(min(ranked.photos, ranked.classes**2 / (1 / by_class).sum()))


def ap_draws(ranked: Ranked, *, resamples: int, seed: int) -> tuple[dict[str, FloatArray], str]:
    """AP over draws of the photos, by name ``[R]``, moved so that the number itself is their mean, and how; R is at most 200.

    A draw is half of the photos without replacement, or a smaller part m of G where half would hold more than 10,000 true boxes;
    deviations from the mean of the draws count ``sqrt(m / (G - m))``-fold, which gives them the variance of G photos. Draws with
    replacement would not do: a photo drawn twice puts its boxes twice in a row, and the AP of such a ranking is too high.
    """
    rng = np.random.default_rng(seed)
    part = max(1, min(ranked.photos // 2, int(ranked.photos * _BOXES / max(1, len(ranked.true_label)))))
    drawn = [mean_ap(ranked, rng.choice(ranked.photos, part, replace=False)) for _ in range(min(resamples, AP_DRAWS))]
    scale = math.sqrt(part / (ranked.photos - part))
    moved = {}
    for key, whole in mean_ap(ranked).items():
        values = np.array([one[key] for one in drawn])
        moved[key] = whole + scale * (values - np.nanmean(values))
    return moved, f"{len(drawn)} draws of {part} of {ranked.photos} photos"
