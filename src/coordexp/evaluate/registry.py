"""The registry of evaluation metrics: every key of ``results.json``, what it means, its unit, which way is better, and where it is shown.

Tables, the headline, ``evaluate.expect``, ``train.save_best``, ``coordexp compare`` and the table in ``docs/metrics.md`` are made from it:
``python -m coordexp.evaluate.registry docs/metrics.md``. Imports nothing that computes.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Final, Literal

Better = Literal["higher", "lower", "neither"]

FILE_READOUT: Final = "file"
BEST: Final = "best"  # in an expectation: the readout that turns out best
# The keys of ``distribution.READOUTS``, repeated because that module imports torch; a test holds the two together.
READOUT_NAMES: Final[tuple[str, ...]] = ("argmax", "expectation", "median", "topk_mean", "window", "auto")
READOUTS: Final = (FILE_READOUT, BEST, *READOUT_NAMES)

# Names of the reported thresholds and their index in IoU .50:.05:.95; "mean" is the plain mean over all of them.
REPORTED: Final[dict[str, int]] = {"50": 0, "75": 5, "90": 8, "95": 9}
REX_OMNI: Final = ("50", "95", "mean")
ACCURACY: Final[dict[str, float]] = {"50": 0.5, "80": 0.8, "90": 0.9}
SLOTS: Final[tuple[str, ...]] = ("x1", "y1", "x2", "y2")
COVERAGE: Final[tuple[int, ...]] = (50, 80, 90, 95)
HISTOGRAM: Final = 10

# COCO's sides: small below 32 pixels, large from 96 on.
COCO_SIZES: Final[tuple[tuple[str, float, float], ...]] = (("small", 0, 32), ("medium", 32, 96), ("large", 96, math.inf))
BIN_SIZES: Final[tuple[tuple[str, float, float], ...]] = (
    ("0-8", 0, 8), ("8-16", 8, 16), ("16-32", 16, 32), ("32-64", 32, 64), ("64-128", 64, 128), ("128+", 128, math.inf)
)  # fmt: skip
# Longer side over shorter one.
ASPECTS: Final[tuple[tuple[str, float, float], ...]] = (("1-2", 1, 2), ("2-4", 2, 4), ("4-8", 4, 8), ("8+", 8, math.inf))
CROWDING: Final[tuple[tuple[str, int, int], ...]] = (("0", 0, 0), ("1-5", 1, 5), ("6-10", 6, 10), ("11-20", 11, 20), ("21+", 21, 10**9))
SHOWN: Final = ("f1.50", "f1.mean", "precision.50", "recall.50")

# Key and the engine's name.
COCO_KEYS: Final[dict[str, str]] = {
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "aps": "APs", "apm": "APm", "apl": "APl", "ar1": "AR1", "ar10": "AR10", "ar100": "AR100"
}  # fmt: skip
LVIS_KEYS: Final[dict[str, str]] = {
    **{key: COCO_KEYS[key] for key in ("ap", "ap50", "ap75", "aps", "apm", "apl")},
    "apr": "APr", "apc": "APc", "apf": "APf", "ar300": "AR@300",
}  # fmt: skip
# What is taken from the areas of the objects: of the annotations, or of their boxes where only those are known.
AREA_KEYS: Final = ("aps", "apm", "apl")
VOC_KEYS: Final = ("ap07", "ap12")
TIDE_KINDS: Final[tuple[str, ...]] = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")


@dataclass(frozen=True)
class Metric:
    """``key`` is a pattern: ``{a,b}`` stands for ``a`` and for ``b``, ``<readout>`` for every readout, ``<size>`` for every bucket of
    size. ``positions``: what it is measured on."""

    key: str
    definition: str
    positions: str
    unit: str = "share"
    better: Better = "higher"

    def names(self) -> Iterator[str]:
        """All keys that the pattern stands for."""
        sizes = [f"size.{name}" for name, *_ in COCO_SIZES] + [f"bins.{name}" for name, *_ in BIN_SIZES]
        parts = re.split(r"(\{[^}]*\}|<readout>|<size>)", self.key)
        choices = {"<readout>": READOUTS, "<size>": tuple(sizes)}
        yield from map("".join, product(*(choices.get(p) or (p[1:-1].split(",") if p.startswith("{") else (p,)) for p in parts)))


def _any(names: object) -> str:
    """A pattern of alternatives: names, or rows that begin with theirs."""
    return "{" + ",".join(str(name[0] if isinstance(name, tuple) else name) for name in names) + "}"  # type: ignore[attr-defined]


_IOU: Final = _any((*REPORTED, "mean"))
_MODE: Final = "{agnostic,aware}"
_SCORES: Final = "{constant,file}"
_TIDE: Final = _any(kind.lower() for kind in TIDE_KINDS)
_ASPECT: Final = "{" + ",".join(f"aspect.{name}" for name, *_ in ASPECTS) + "}"

_EDGES: Final = _any((*SLOTS, "all"))
_RANKED: Final = "ranked boxes"
_MATCHED: Final = "matched edges"

METRICS: Final[tuple[Metric, ...]] = (
    Metric(
        f"detection.<readout>.{_MODE}.{{f1,precision,recall}}.{_IOU}",
        "one-to-one matching at that IoU, of the most pairs possible; micro over images; `mean` over IoU .50:.05:.95; `aware` asks for an "
        "equal description; readout `file`: `bbox_2d` as it stands",
        "boxes",
    ),
    Metric(f"detection.<readout>.aware.macro_f1.{_IOU}", "mean over classes of the records; one never predicted counts as 0", "boxes"),
    Metric(
        f"detection.<readout>.aware.f1_rex_omni.{_any(REX_OMNI)}",
        "the same over the classes whose F1 is above 0, as described for Rex-Omni, whose figures LocateAnything prints beside its own; "
        "not run against their programs",
        "boxes",
    ),
    Metric(
        f"buckets.{_MODE}.<size>.{_any(SHOWN)}",
        "by the size of the box: `size` by `sqrt(area)` below 32, below 96, from 96 pixels, `bins` the same in bins of the grid. A matched "
        "box belongs to the size of its true box, any other to its own",
        "boxes",
    ),
    Metric(f"buckets.{_MODE}.<size>.n", "true boxes there", "boxes", "count", "neither"),
    Metric(f"buckets.{_MODE}.{_ASPECT}.{_any(SHOWN)}", "by the longer side over the shorter one", "boxes"),
    Metric(f"buckets.{_MODE}.{_ASPECT}.n", "true boxes there", "boxes", "count", "neither"),
    Metric(f"buckets.{_MODE}.crowding.{_any(CROWDING)}.{_any(SHOWN)}", "by the number of true boxes in the image", "boxes"),
    Metric(f"buckets.{_MODE}.crowding.{_any(CROWDING)}.{{n,images}}", "true boxes, and images, there", "boxes", "count", "neither"),
    Metric(
        f"coco.{_SCORES}.{_any(k for k in COCO_KEYS if k not in AREA_KEYS)}",
        "COCO AP. `constant`: the score 1 for every box, not comparable with detectors that score; `file`: the scores of the file, where "
        "it has them (`provenance.score_source` names them)",
        _RANKED,
    ),
    Metric(f"lvis.{_SCORES}.{_any(k for k in LVIS_KEYS if k not in AREA_KEYS)}", "LVIS AP, where records carry `neg_categories`", _RANKED),
    Metric(
        f"{{coco,lvis}}.{_SCORES}.{_any(AREA_KEYS)}",
        "small, medium and large by the `area` of the annotations, where every object states it",
        _RANKED,
    ),
    Metric(f"{{coco,lvis}}.{_SCORES}.box_area.{_any(AREA_KEYS)}", "the same by the boxes' areas, where only those are known", _RANKED),
    Metric(
        f"voc.{_SCORES}.{_any(VOC_KEYS)}",
        "Pascal VOC's AP at IoU .5: of 2007 (11 recalls) and from 2010 on, as in 2012 (area under the curve)",
        _RANKED,
    ),
    Metric(
        f"tide.{_SCORES}.dap.{_TIDE}",
        "AP50 that a kind of error costs; TIDE at IoU .5, background below .1; of the file's scores, else the constant one",
        _RANKED,
        better="lower",
    ),
    Metric(f"tide.{_SCORES}.count.{_TIDE}", "how many errors of that kind there are", _RANKED, "count", "lower"),
    Metric(
        "localisation.matched",
        "pairs matched class-agnostically at IoU .5 on `bbox_2d` as it stands: the same for every readout",
        "boxes",
        "count",
        "neither",
    ),
    Metric(f"localisation.<readout>.{_EDGES}.{{mean,median,p90}}_bins", "error", _MATCHED, "bins", "lower"),
    Metric(f"localisation.<readout>.{_EDGES}.{{mean,median,p90}}_px", "error", _MATCHED, "px", "lower"),
    Metric(f"localisation.<readout>.{_EDGES}.signed_bias_bins", "predicted minus true", _MATCHED, "bins", "neither"),
    Metric(f"localisation.<readout>.{_EDGES}.signed_bias_px", "predicted minus true", _MATCHED, "px", "neither"),
    Metric("localisation.<readout>.<size>.mean_bins", "error by the size of the true box", _MATCHED, "bins", "lower"),
    Metric("localisation.<readout>.<size>.mean_px", "error by the size of the true box", _MATCHED, "px", "lower"),
    Metric("localisation.<readout>.<size>.signed_bias_bins", "predicted minus true", _MATCHED, "bins", "neither"),
    Metric("localisation.<readout>.<size>.n", "matched pairs there", "boxes", "count", "neither"),
    Metric(
        f"calibration.{_EDGES}.{_any(f'coverage_{level}' for level in COVERAGE)}",
        "share of true edges inside the central interval of the distributions saved with the predictions; left out, with a note, where "
        "they were not saved",
        _MATCHED,
        better="neither",
    ),
    Metric(f"calibration.{_EDGES}.pit_ks", "Kolmogorov-Smirnov distance of the PIT to uniform", _MATCHED, better="lower"),
    Metric(f"calibration.{_EDGES}.pit_mean", "mean of the PIT: .5 without bias", _MATCHED, better="neither"),
    Metric(f"calibration.{_EDGES}.n", "their number", _MATCHED, "count", "neither"),
    Metric(f"calibration.pit_histogram.{_any(range(HISTOGRAM))}", "share of the PIT in that tenth", _MATCHED, better="neither"),
    Metric("calibration.rest_mean", "probability that was not saved", _MATCHED, better="lower"),
    Metric(
        f"grounding.<readout>.acc.{_any(ACCURACY)}",
        "share of answers with at least that IoU, of phrases that mean one object: RefCOCO's accuracy",
        "phrases",
    ),
    Metric("grounding.<readout>.mean_iou", "mean IoU of the same", "phrases"),
    Metric(
        "grounding.<readout>.exact.50",
        'share of all phrases whose boxes and objects match one to one at IoU .5 (gRefCOCO\'s "F1 = 1"), where some mean several objects '
        "or none",
        "phrases",
    ),
    Metric("grounding.no_target_acc", "share of phrases without an object that get no box (gRefCOCO's N-acc)", "phrases"),
    Metric("grounding.target_acc", "share of the others that get one (T-acc)", "phrases"),
    Metric("pointing.acc", "the point lies in the box or polygon, edges included", "phrases"),
    Metric(f"pointing.{_any(READOUT_NAMES)}.acc", "the same for the points of another readout", "phrases"),
    Metric("{grounding,pointing}.answered", "share of phrases with an answer", "phrases", better="neither"),
    Metric("{grounding,pointing}.n", "phrases", "phrases", "count", "neither"),
    Metric("health.parse_rate", "answers with no problem and no error, of those that state either", "answers"),
    Metric("health.empty_rate", "answers without objects", "answers", better="neither"),
    Metric("health.truncation_rate", "answers cut by the token budget", "answers", better="lower"),
    Metric("health.arity_rate", "answers with a wrong number of values", "answers", better="lower"),
    Metric("health.duplicate_rate", "boxes that repeat an earlier one: same description, IoU above .9", "boxes", better="lower"),
    Metric("health.max_repeat", "how often the most repeated box of an image occurs", "boxes", "count", "lower"),
    Metric("health.boxes_per_image", "predicted boxes an image", "images", "boxes", "neither"),
    Metric("health.true_boxes_per_image", "true boxes an image", "images", "boxes", "neither"),
    Metric("health.tokens_per_image", "tokens an answer", "answers", "tokens", "neither"),
)

# Of the probe during training: the row of a log, not of results.json.
PROBE: Final = (
    Metric("probe/{f1_50,point_acc}", "F1@.5 class-agnostic, or share of points on the object, of free answers", "probe"),
    Metric("probe/parse_rate", "answers read without a problem", "probe"),
    Metric("probe/duplicate_rate", "duplicate boxes", "probe", better="lower"),
    Metric("probe/objects_per_image", "objects an answer", "probe", "boxes", "neither"),
)


@dataclass(frozen=True)
class Headline:
    """A number that a person sees first. ``{}`` in the key is a readout; ``compared``: its place in ``coordexp compare``."""

    key: str
    label: str
    compared: Literal["headline", "secondary", ""] = ""

    @property
    def metric(self) -> Metric:
        """Its entry in the registry."""
        return by_key()[self.key.format(FILE_READOUT)]


HEADLINES: Final = (
    Headline("pointing.acc", "point on the object", "headline"),
    Headline("grounding.{}.acc.50", "grounding Acc@.5", "headline"),
    Headline("grounding.{}.acc.80", "grounding Acc@.8"),
    Headline("grounding.{}.acc.90", "grounding Acc@.9"),
    Headline("grounding.{}.mean_iou", "grounding mean IoU", "headline"),
    Headline("grounding.{}.exact.50", "grounding, exactly the objects meant", "headline"),
    Headline("grounding.no_target_acc", "phrases without an object left empty", "headline"),
    Headline("detection.{}.agnostic.f1.50", "F1@.5 class-agnostic", "headline"),
    Headline("detection.{}.agnostic.f1.mean", "F1@.5:.95 class-agnostic", "headline"),
    Headline("detection.{}.aware.f1.50", "F1@.5 class-aware", "headline"),
    Headline("detection.{}.aware.f1.mean", "F1@.5:.95 class-aware"),
    Headline("detection.{}.aware.macro_f1.50", "macro F1@.5 class-aware", "secondary"),
    Headline("coco.constant.ap", "COCO AP, constant score", "secondary"),
    Headline("coco.file.ap", "COCO AP, scores of the file", "secondary"),
    Headline("lvis.constant.ap", "LVIS AP, constant score", "secondary"),
    Headline("lvis.file.ap", "LVIS AP, scores of the file", "secondary"),
    Headline("localisation.{}.all.mean_bins", "edge error of matched boxes, bins", "headline"),
    Headline("localisation.{}.all.mean_px", "edge error of matched boxes, pixels"),
    Headline("calibration.all.coverage_80", "true edge inside the 80 % interval"),
    Headline("health.parse_rate", "answers read without a problem", "secondary"),
    Headline("health.duplicate_rate", "duplicate boxes", "secondary"),
    Headline("health.boxes_per_image", "boxes per image", "secondary"),
    Headline("health.true_boxes_per_image", "true boxes per image"),
)


@dataclass(frozen=True)
class Sheet:
    """A table of numbers: the key of a cell is that of its row, a dot, and that of its column. ``{}`` is the readout of the row.

    Rows and columns without any number are left out.
    """

    caption: str
    rows: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]


def _modes(kind: str) -> tuple[tuple[str, str], ...]:
    return ("scores of the file", f"{kind}.file"), ("constant score", f"{kind}.constant")


_AREAS: Final = (("small", "aps"), ("medium", "apm"), ("large", "apl"))
_BY_AREA: Final = (
    *((f"AP {label}", key) for label, key in _AREAS),
    *((f"AP {label}, by box", f"box_area.{key}") for label, key in _AREAS),
)
_F1: Final = (
    ("F1 .50", "f1.50"), ("F1 mean", "f1.mean"), ("precision .50", "precision.50"), ("recall .50", "recall.50"), ("true boxes", "n")
)  # fmt: skip
_IOUS: Final = (("IoU .50", "50"), (".75", "75"), (".90", "90"), (".95", "95"), ("mean .50:.95", "mean"))
SHEETS: Final = (
    Sheet(
        "Grounding of the referred object",
        (("", "grounding.{}"),),
        (("Acc .50", "acc.50"), ("Acc .80", "acc.80"), ("Acc .90", "acc.90"), ("mean IoU", "mean_iou"), ("exactly right", "exact.50")),
    ),
    Sheet(
        "Detection",
        tuple(
            (f"{name}, {mode}", f"detection.{{}}.{mode}.{key}")
            for mode in ("aware", "agnostic")
            for name, key in (
                ("F1", "f1"), ("precision", "precision"), ("recall", "recall"), ("macro F1", "macro_f1"), ("F1 as Rex-Omni", "f1_rex_omni")
            )
            if mode == "aware" or key in ("f1", "precision", "recall")
        ),
        _IOUS,
    ),
    Sheet(
        "COCO average precision and recall",
        _modes("coco"),
        (("AP", "ap"), ("AP .50", "ap50"), ("AP .75", "ap75"), *_BY_AREA, ("AR 1", "ar1"), ("AR 10", "ar10"), ("AR 100", "ar100")),
    ),
    Sheet(
        "LVIS average precision",
        _modes("lvis"),
        (
            ("AP", "ap"), ("AP .50", "ap50"), ("AP .75", "ap75"), ("AP rare", "apr"), ("AP common", "apc"), ("AP frequent", "apf"),
            *_BY_AREA, ("AR 300", "ar300"),
        ),
    ),
    Sheet("Pascal VOC average precision", _modes("voc"), (("2007, 11 recalls", "ap07"), ("2010 to 2012, area", "ap12"))),
    *(
        Sheet(
            caption,
            _modes("tide"),
            tuple(
                (label, f"{part}.{key}")
                for label, key in (
                    ("name", "cls"), ("place", "loc"), ("both", "both"), ("duplicate", "dupe"), ("nothing there", "bkg"), ("missed", "miss")
                )
            ),
        )
        for caption, part in (("AP .50 lost to each kind of error (TIDE)", "dap"), ("Errors of each kind (TIDE)", "count"))
    ),
    *(
        Sheet(caption, tuple((name, f"buckets.aware.{kind}.{name}") for name, *_ in buckets), _F1)
        for caption, kind, buckets in (
            ("By object size, class-aware", "size", COCO_SIZES),
            ("By object size in bins, class-aware", "bins", BIN_SIZES),
            ("By the longer side over the shorter one, class-aware", "aspect", ASPECTS),
            ("By true boxes in the image, class-aware", "crowding", CROWDING),
        )
    ),
    Sheet(
        "Localisation error of matched boxes",
        tuple((slot, f"localisation.{{}}.{slot}") for slot in (*SLOTS, "all")),
        tuple(
            (f"{label}, {unit}", f"{key}_{unit}")
            for unit in ("bins", "px")
            for label, key in (("mean", "mean"), ("median", "median"), ("p90", "p90"), ("signed bias", "signed_bias"))
        ),
    ),
    Sheet(
        "Localisation by size",
        (
            *((name, f"localisation.{{}}.size.{name}") for name, *_ in COCO_SIZES),
            *((f"{name} bins", f"localisation.{{}}.bins.{name}") for name, *_ in BIN_SIZES),
        ),
        (("mean, bins", "mean_bins"), ("mean, px", "mean_px"), ("signed bias, bins", "signed_bias_bins"), ("pairs", "n")),
    ),
    Sheet(
        "Coordinate calibration: true edges inside the model's central intervals, matched boxes",
        tuple((slot, f"calibration.{slot}") for slot in (*SLOTS, "all")),
        (
            *((f"{level} %", f"coverage_{level}") for level in COVERAGE),
            ("KS distance of the PIT", "pit_ks"), ("mean PIT", "pit_mean"), ("edges", "n"),
        ),
    ),
)  # fmt: skip


@cache
def by_key() -> dict[str, Metric]:
    """All keys, whatever the data, with their entries; ``best`` stands beside the readouts.

    ``health.problems.<reason>`` is left out: its reasons are the parser's, and a lower bound on a count of faults expects nothing.
    """
    return {key: metric for metric in METRICS for key in metric.names()}


def key_problem(key: str) -> str | None:
    """What is wrong with an expected key, with the nearest legal one; None if nothing is."""
    known = by_key()
    if key in known:
        return None
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"no number of results.json: {f'did you mean {near[0]}?' if near else 'docs/metrics.md lists them'}"


def markdown() -> str:
    """The table of docs/metrics.md."""
    lines = ["| key | measured on | definition | unit | better |", "|---|---|---|---|---|"]
    for m in METRICS:
        key = m.key.replace("<size>", "{size.{small,medium,large},bins." + _any(BIN_SIZES) + "}")
        lines.append(f"| `{key}` | {m.positions} | {m.definition} | {m.unit} | {'' if m.better == 'neither' else m.better} |")
    return "\n".join(lines) + "\n"


BEGIN: Final = "<!-- written by python -m coordexp.evaluate.registry docs/metrics.md -->\n"
END: Final = "<!-- end of the evaluation's -->\n"


def written_into(page: str) -> str:
    """``page`` with the registry's table between its two marks."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + markdown() + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
