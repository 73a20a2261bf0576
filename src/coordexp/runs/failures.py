"""What went wrong in the answers: problems of the parser by kind and by how much the image asked for, and names confused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coordexp.data.records import Record
from coordexp.evaluate.localisation import matched_pairs
from coordexp.evaluate.predictions import Prediction
from coordexp.evaluate.samples import make_samples

# What the parser expected where it counted a problem of this kind.
EXPECTED: Final[Mapping[str, str]] = {
    "no_answer": 'an answer that begins with {"objects": [',
    "truncated": "the end of the list before the token limit",
    "bad_object": "a whole object: a description and one geometry with a list of coordinate tokens",
    "bad_arity": "4 values of a box, 2 of a point, an even number from 6 on of a polygon",
    "bin_out_of_range": "coordinates of the grid",
    "degenerate_box": "x1 < x2 and y1 < y2",
    "trailing_text": "nothing after the end of the list",
    "other_geometry": "objects of the kind that was asked for: boxes, points or polygons",
    "spelled_value": "a coordinate's own token, not its digits",
    "error": "an image that can be opened",
}
_ASKED: Final = ((0, 0, "0"), (1, 1, "1"), (2, 2, "2"), (3, 3, "3"), (4, 6, "4 to 6"), (7, 12, "7 to 12"), (13, 10**9, "13 and more"))


@dataclass(frozen=True)
class Failure:
    """A kind of problem: its ``count``, the ``images`` that have it, and those as shares by the true objects of the image."""

    kind: str
    expected: str
    count: int
    images: int
    cells: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Failures:
    """``columns`` are ``(label, images)`` by number of true objects; ``clean`` of ``answers`` were read without a problem."""

    columns: tuple[tuple[str, int], ...]
    rows: tuple[Failure, ...]
    clean: int
    answers: int


@dataclass(frozen=True)
class Confusion:
    """Names of matched boxes: ``wrong`` pairs ``(true, predicted, boxes, share of the true name's matched boxes)``, most frequent first."""

    matched: int
    right: int
    kinds: int
    wrong: tuple[tuple[str, str, int, float], ...]


def parse_failures(records: Sequence[Record], predictions: Mapping[str, Prediction]) -> Failures | None:
    """Problems of the answers by kind and by the number of true objects; None where no row states any."""
    rows = [(record, p) for record in records if (p := predictions.get(record.image_id)) is not None]
    stated = [(record, p) for record, p in rows if p.problems is not None or p.states_error]
    if not stated:
        return None
    asked = {record.image_id: next(label for low, high, label in _ASKED if low <= len(record.objects) <= high) for record, _ in stated}
    sizes = Counter(asked.values())
    columns = tuple((label, sizes[label]) for *_, label in _ASKED if sizes[label])
    totals: Counter[str] = Counter()
    images: dict[str, Counter[str]] = {}
    clean = 0
    for record, prediction in stated:
        found = {kind: count for kind, count in (prediction.problems or {}).items() if count}
        if prediction.error is not None:
            found["error"] = 1
        totals.update(found)
        for kind in found:
            images.setdefault(kind, Counter())[asked[record.image_id]] += 1
        clean += not found
    made = tuple(
        Failure(
            kind.replace("_", " "), EXPECTED.get(kind, ""), total, images[kind].total(),
            tuple((images[kind][label], images[kind][label] / size) for label, size in columns),
        )
        for kind, total in totals.most_common()
    )  # fmt: skip
    return Failures(columns, made, clean, len(stated))


def name_confusion(records: Sequence[Record], predictions: Mapping[str, Prediction], *, limit: int = 12) -> Confusion | None:
    """Which names are given to boxes that are in the right place (IoU .5, whatever the name); None where no box is matched.

    Raises:
        ComparisonError: sizes that differ between records and predictions, or records with points.
    """
    paired = [(p, record) for record in records if (p := predictions.get(record.image_id)) is not None]
    if not paired:
        return None
    samples = make_samples([p for p, _ in paired], [record for _, record in paired], ())
    pairs: Counter[tuple[str, str]] = Counter()
    for sample, (predicted, true) in zip(samples, matched_pairs(samples), strict=True):
        pairs.update((sample.true_labels[t], sample.pred_labels[p]) for p, t in zip(predicted.tolist(), true.tolist(), strict=True))
    if not pairs:
        return None
    of_name: Counter[str] = Counter()
    for (true_name, _), count in pairs.items():
        of_name[true_name] += count
    wrong = sorted(((t, p, n, n / of_name[t]) for (t, p), n in pairs.items() if t != p), key=lambda row: (-row[2], -row[3], row[0], row[1]))
    right = sum(n for (t, p), n in pairs.items() if t == p)
    return Confusion(pairs.total(), right, len(wrong), tuple(wrong[:limit]))
