"""How often the 95 % intervals hold the truth: data sets are simulated over and over, and the truth is their mean.

    python benchmarks/coverage.py [--simulations 2000] [--no-save]

Clustered: 7 phrases a photo, all as hard as the photo. Rare: 12 classes, of which eleven are in one of 25 photos each, so 50 photos hold
two with any of them. `error` is an edge error with a long tail, `macro` the mean of F1 over classes, `ap` COCO AP with scores, `ap50` at
IoU .5. `difference` is between two arms of the same photos with the same truth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import sparse

from coordexp.evaluate.bootstrap import Ratio, by_photo, intervals, point, resampled, trials
from coordexp.evaluate.matching import THRESHOLDS
from coordexp.evaluate.ranking import ByPhoto, Ranked, ap_intervals, mean_ap
from coordexp.runs.differences import Measured, difference

RESAMPLES = 400
Simulated = Iterator[tuple[str, float, tuple[float, float] | None]]


def phrases(rng: np.random.Generator, photos: int, seed: int) -> Simulated:
    """Accuracy and mean IoU of 7 phrases a photo; a photo is as hard as it is for all of them."""
    photo = np.repeat(np.arange(photos), 7)
    right = rng.random(len(photo)) < np.repeat(rng.beta(1.0, 0.6, photos), 7)
    error = rng.gamma(2.0, 4.0, len(photo)) * np.repeat(rng.gamma(3.0, 0.4, photos), 7)
    one = np.ones((len(photo), 1))
    made = {"acc": Ratio(right[:, None].astype(float), one), "error": Ratio(error[:, None], one, rate=False)}
    grouped = {key: by_photo(ratio, photo) for key, ratio in made.items()}
    for key, found in intervals(grouped, resamples=RESAMPLES, seed=seed).items():
        yield key, point(made[key]), found.bounds


def sure(rng: np.random.Generator, photos: int, seed: int) -> Simulated:
    """A rate near 1, where many sets show no failure at all."""
    right = rng.random((photos, 1)) < 0.97
    ratio = Ratio(right.astype(float), np.ones((photos, 1)))
    yield "rate", point(ratio), intervals({"rate": ratio}, resamples=RESAMPLES, seed=seed)["rate"].bounds


def boxes(rng: np.random.Generator, photos: int, seed: int) -> Simulated:
    """F1, macro F1 and AP of photos with 1 to 9 boxes; one class in every other photo, the others in one of 25."""
    made = detections(rng, photos)
    tp, predicted, true = made.counts()
    ratios = {
        "f1": Ratio(2.0 * tp.sum(axis=1)[:, None], (predicted + true).sum(axis=1)[:, None].astype(float)),
        "macro": Ratio(2 * sparse.csr_array(tp), sparse.csr_array(predicted + true), present=sparse.csr_array(true)),
    }
    for key, found in intervals(ratios, resamples=RESAMPLES, seed=seed).items():
        yield key, point(ratios[key]), found.bounds
    values = mean_ap(made.ranked())
    for key, found in ap_intervals(made.ranked(), resamples=RESAMPLES, seed=seed).items():
        if key != "ap75":
            yield key, values[key], found.bounds


def arms(rng: np.random.Generator, photos: int, seed: int) -> Simulated:
    """The difference of two arms of 7 phrases a photo, one seed each."""
    photo = np.repeat(np.arange(photos), 7)
    hard = np.repeat(rng.beta(1.0, 0.6, photos), 7)
    measured = []
    for _ in range(2):
        ratio = by_photo(Ratio((rng.random((len(photo), 1)) < hard[:, None]).astype(float), np.ones((len(photo), 1))), photo)
        drawn = resampled({"acc": ratio}, photos, resamples=RESAMPLES, seed=seed)["acc"]
        measured.append(Measured(((0, 0),), (point(ratio),), drawn[None], photos, trials(ratio)))
    found = difference(*measured)
    yield "difference", found.value, found.interval


class detections:
    """Boxes of a set of photos: class, photo and IoU of what is found, and false boxes with lower scores."""

    def __init__(self, rng: np.random.Generator, photos: int) -> None:
        self.photos, self.classes = photos, 12
        share = np.r_[0.5, np.full(11, 0.04)]
        there = rng.random((photos, self.classes)) < share
        there[there.sum(axis=1) == 0, 0] = True
        count = there * rng.integers(1, 4, there.shape)
        photo, label = (np.repeat(index, count[there]) for index in np.nonzero(there))
        hard = rng.beta(2.0, 1.0, photos)[photo]
        found = rng.random(len(photo)) < 0.4 + 0.6 * hard
        iou = np.where(rng.random(len(photo)) < 0.8, 0.45 + 0.53 * rng.beta(2 + 3 * hard, 2), 0.3)
        extra = rng.poisson(0.8, photos)
        false = np.repeat(np.arange(photos), extra)
        self.true_photo, self.true_label = photo, label
        self.photo = np.r_[photo[found], false]
        self.label = np.r_[label[found], rng.choice(self.classes, len(false), p=share / share.sum())]
        self.iou = np.r_[iou[found], np.zeros(len(false))]
        self.score = np.r_[rng.normal(1.0 + iou[found], 0.7), rng.normal(0.5, 0.7, len(false))]

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By photo and class: right, predicted and true boxes."""

        def table(photo: np.ndarray, label: np.ndarray) -> np.ndarray:
            cells = np.bincount(photo * self.classes + label, minlength=self.photos * self.classes)
            return cells.reshape(self.photos, self.classes)

        right = self.iou >= 0.5
        return table(self.photo[right], self.label[right]), table(self.photo, self.label), table(self.true_photo, self.true_label)

    def ranked(self) -> Ranked:
        """What the intervals of AP are drawn from."""
        number = np.cumsum(np.bincount(self.true_label, minlength=self.classes) > 0)
        known = (np.diff(number, prepend=0) > 0)[self.label]
        order = np.flatnonzero(known)[np.lexsort((-self.score[known], self.label[known]))]
        hit = self.iou[order, None] >= np.array(THRESHOLDS)
        label, photo, true = number[self.label[order]] - 1, self.photo[order], number[self.true_label] - 1
        none, rank = np.zeros(hit.shape, dtype=bool), np.arange(len(label))
        places = ByPhoto(photo, self.photos), ByPhoto(self.true_photo, self.photos)
        return Ranked(
            ("coco",), int(number[-1]), self.photos, label, photo, rank, hit, none, true, self.true_photo, *places, none.any(axis=0)
        )


SCENES: dict[str, tuple[Callable[[np.random.Generator, int, int], Simulated], tuple[int, ...]]] = {
    "clustered": (phrases, (10, 20, 40, 150)),
    "near 1": (sure, (20, 40, 150)),
    "boxes, rare classes": (boxes, (20, 50, 100, 400)),
    "two arms, clustered": (arms, (10, 20, 40, 150)),
}


def simulate(scene: str, photos: int, simulations: int) -> dict[str, tuple[float, float]]:
    """By number: the share of intervals that hold the truth, and the share of data sets that have one."""
    make, _ = SCENES[scene]
    found: dict[str, list[tuple[float, tuple[float, float] | None]]] = {}
    for k in range(simulations):
        for key, value, bounds in make(np.random.default_rng([k, photos]), photos, k):
            found.setdefault(key, []).append((value, bounds))
    shares = {}
    for key, rows in found.items():
        truth = 0.0 if key == "difference" else 0.97 if key == "rate" else float(np.mean([value for value, _ in rows]))
        given = [bounds for _, bounds in rows if bounds is not None]
        held = sum(low <= truth <= high for low, high in given)
        shares[key] = held / max(1, len(given)), len(given) / simulations
    return shares


def main() -> None:
    """Simulate every scene and write the shares."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--simulations", type=int, default=2000)
    words.add_argument("--no-save", action="store_true", help="print only")
    options = words.parse_args()
    lines = ["scene,photos,number,simulations,covered,with_interval"]
    for scene, (_, sizes) in SCENES.items():
        for photos in sizes:
            for key, (held, given) in simulate(scene, photos, options.simulations).items():
                lines.append(f'"{scene}",{photos},{key},{options.simulations},{held:.3f},{given:.3f}')
                print(lines[-1], flush=True)
    if not options.no_save:
        (Path(__file__).parent / "results" / "coverage.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(json.dumps({"rows": len(lines) - 1}))


if __name__ == "__main__":
    main()
