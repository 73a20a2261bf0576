"""Average precision as a function of the photos drawn: detections are matched and ranked once, for all classes together.

Kinds of AP: ``coco`` (101 recalls, IoU .5:.95), ``ap07`` (11 recalls) and ``ap12`` (area under the envelope), both at IoU .5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from coordexp.evaluate.bootstrap import Interval, percentiles, same, share_interval
from coordexp.evaluate.matching import THRESHOLDS, Candidates, candidates, star_pairs
from coordexp.evaluate.samples import BoolArray, Flat, FloatArray, IntArray, places

# AP is ranked anew for every draw, so it gets fewer of them than the ratios do,
AP_DRAWS: Final = 200
# and a draw of a large set holds about this many true boxes.
_BOXES: Final = 20_000


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

    ``label``, ``photo`` ``[D]``; ``hit`` and ``ignored`` ``[D, T]``, over THRESHOLDS (``coco``) or IoU .5 alone. ``true_label`` and
    ``true_photo`` ``[N]`` are the true boxes that are to be found. Labels run from 0 to ``classes - 1``.
    """

    kinds: tuple[str, ...]
    classes: int
    photos: int
    label: IntArray
    photo: IntArray
    hit: BoolArray
    ignored: BoolArray
    true_label: IntArray
    true_photo: IntArray
    by_photo: ByPhoto
    true_by_photo: ByPhoto
    any_ignored: BoolArray


def rank(flat: Flat, pairs: Candidates, ignored: BoolArray, *, constant: bool, lvis: bool = False) -> Ranked:
    """Detections as COCO ranks and matches them: all sizes, 100 boxes an image and class.

    ``pairs`` are candidates of equal labels, ``ignored [P, T]`` boxes that do not count where they have no match. With ``lvis``
    300 boxes of an image count, of whatever class.
    """
    order = _order(flat, constant)
    group = flat.pred_image if lvis else flat.pred_image * max(1, len(flat.labels)) + flat.pred_label
    kept = best_of_group(group, order, 300 if lvis else 100)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    pairs = pairs.where(kept[pairs.pred])
    hit = np.zeros((len(order), len(THRESHOLDS)), dtype=bool)
    for t, threshold in enumerate(THRESHOLDS):
        hit[_greedy(pairs.where(pairs.iou >= threshold), place), t] = True
    return _ranked(("coco",), flat, order[kept[order]], hit, ignored & ~hit, np.ones(len(flat.true_label), dtype=bool))


def rank_voc(flat: Flat, *, constant: bool) -> Ranked:
    """Detections as Pascal VOC matches them at IoU .5: each looks at the one true box of its class that it overlaps most.

    The best-ranked of those that look at one box finds it, the others are false. What looks at a difficult object counts for nothing,
    and difficult objects need not be found. Crowds do not exist in VOC and are left out. Boxes are edges: there is no pixel added to
    width and height.
    """
    flat, hard = _with_difficult(flat)
    pairs = candidates(flat)
    pairs = pairs.where(flat.pred_label[pairs.pred] == flat.true_label[pairs.true])
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
    return _ranked(("ap07", "ap12"), flat, order, hit, ignored, ~hard)


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


def _ranked(kinds: tuple[str, ...], flat: Flat, order: IntArray, hit: BoolArray, ignored: BoolArray, wanted: BoolArray) -> Ranked:
    number = np.cumsum(np.bincount(flat.true_label[wanted], minlength=len(flat.labels)) > 0)
    own = order[(np.diff(number, prepend=0) > 0)[flat.pred_label[order]]]
    own = own[np.argsort(flat.pred_label[own], kind="stable")]
    photos = int(flat.photo.max(initial=-1)) + 1
    photo, true_photo = flat.photo[flat.pred_image[own]], flat.photo[flat.true_image[wanted]]
    return Ranked(
        kinds, int(number[-1]) if number.size else 0, photos, number[flat.pred_label[own]] - 1, photo, hit[own], ignored[own],
        number[flat.true_label[wanted]] - 1, true_photo, ByPhoto(photo, photos), ByPhoto(true_photo, photos),
        np.asarray(ignored[own].any(axis=0), dtype=bool),
    )  # fmt: skip


def best_of_group(group: IntArray, order: IntArray, most: int) -> BoolArray:
    """Predicted boxes that are among the ``most`` best-ranked of their group."""
    kept = np.zeros(len(order), dtype=bool)
    if order.size:
        by_group = np.argsort(group[order], kind="stable")
        ordered = group[order][by_group]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        within = np.arange(ordered.size) - np.repeat(starts, np.diff([*starts, ordered.size]))
        kept[order[by_group]] = within < most
    return kept


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


def class_ap(ranked: Ranked, chosen: IntArray | None = None) -> FloatArray:
    """AP ``[C, T, kinds]`` of the photos ``chosen``, each once (None: all); NaN for a class without a true box there.

    Of every class the precision after each hit, made non-increasing from the last hit back, times the share of recalls that the hit is
    the first to reach.
    """
    true_label, kept = ranked.true_label, np.arange(len(ranked.label))
    if chosen is not None:
        true_label = true_label[ranked.true_by_photo.of(chosen)]
        kept = np.sort(ranked.by_photo.of(chosen))
    true = np.bincount(true_label, minlength=ranked.classes)
    label, hit, ignored = ranked.label[kept], ranked.hit[kept], ranked.ignored[kept]
    place = np.arange(1, len(label) + 1) - np.searchsorted(label, np.arange(ranked.classes))[label]
    result = np.full((ranked.classes, hit.shape[1], len(ranked.kinds)), np.nan)
    for t in range(hit.shape[1]):
        of_class = label[at := np.flatnonzero(hit[:, t])]
        found = np.arange(1, len(at) + 1) - np.searchsorted(of_class, np.arange(ranked.classes))[of_class]
        below = place[at]
        if ranked.any_ignored[t]:
            before = np.concatenate([[0], np.cumsum(ignored[:, t])])
            below = below - (before[at] - before[np.searchsorted(label, np.arange(ranked.classes))][of_class])
        # One accumulation for all classes: from the back, each class lies higher than the one behind it by more than any precision.
        lift = 2.0 * (ranked.classes - of_class)
        envelope = np.maximum.accumulate((found / below + lift)[::-1])[::-1] - lift
        for k, kind in enumerate(ranked.kinds):
            share = _recalls(kind, found, true[of_class]) - _recalls(kind, found - 1, true[of_class])
            result[:, t, k] = np.bincount(of_class, weights=envelope * share, minlength=ranked.classes)
    result[true == 0] = np.nan
    return result


def _recalls(kind: str, found: IntArray, true: IntArray) -> FloatArray:
    """The share of the recalls that ``found`` of ``true`` boxes reach: none where nothing is found."""
    if kind == "ap12":
        return np.asarray(found / true)
    grid, late = _RECALLS[kind]
    whole, rest = np.divmod((len(grid) - 1) * found, true)
    # As the engine compares in floating point: where the grid's number lies above k/(n - 1), that recall is not reached yet.
    return np.where(found > 0, (whole + 1 - ((rest == 0) & late[whole])) / len(grid), 0.0)


def mean_ap(ranked: Ranked, chosen: IntArray | None = None) -> dict[str, float]:
    """The numbers with an interval, means of :func:`class_ap` over the classes with a true box: ``ap``, ``ap50``, ``ap75``, or ``ap07``,
    ``ap12``; NaN without one."""
    by_class = class_ap(ranked, chosen)
    there = ~np.isnan(by_class[:, 0, 0])
    values = by_class[there].mean(axis=0) if there.any() else np.full(by_class.shape[1:], np.nan)
    if ranked.kinds == ("coco",):
        return {"ap": float(values.mean()), "ap50": float(values[0, 0]), "ap75": float(values[5, 0])}
    return dict(zip(ranked.kinds, values[0].tolist(), strict=True))


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

    A draw is half of the photos without replacement, or a smaller part m of G where half would hold more than 20,000 true boxes;
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
