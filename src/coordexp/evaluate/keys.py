"""Every dotted key of ``results.json`` that holds a metric, as a registry: what a file may expect, checked before a run starts.

``health.problems.<reason>`` is left out: its reasons are the parser's, and a lower bound on a count of faults expects nothing.
A test compares it with the results of real evaluations, so a new metric cannot be forgotten here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Final

from coordexp.evaluate.buckets import ASPECTS, BIN_SIZES, COCO_SIZES, CROWDING, SHOWN
from coordexp.evaluate.calibration import COVERAGE, HISTOGRAM
from coordexp.evaluate.coco import AREA_KEYS, COCO_KEYS, LVIS_KEYS, TIDE_KINDS
from coordexp.evaluate.detection import REPORTED, REX_OMNI
from coordexp.evaluate.grounding import ACCURACY
from coordexp.evaluate.localisation import SLOTS
from coordexp.evaluate.predictions import READOUT_NAMES
from coordexp.evaluate.samples import FILE_READOUT

BEST: Final = "best"  # in an expectation: the readout that turns out best
READOUTS: Final = (FILE_READOUT, BEST, *READOUT_NAMES)
HEALTH: Final = (
    "parse_rate", "empty_rate", "truncation_rate", "arity_rate", "duplicate_rate", "max_repeat", "boxes_per_image",
    "true_boxes_per_image", "tokens_per_image",
)  # fmt: skip


def result_keys() -> frozenset[str]:
    """All keys, whatever the data; ``best`` stands beside the readouts."""
    return frozenset(_detection()) | frozenset(_average_precision()) | frozenset(_edges()) | frozenset(_answers())


def _detection() -> Iterator[str]:
    ends = (*REPORTED, "mean")
    for readout in READOUTS:
        for mode in ("aware", "agnostic"):
            kinds = ("f1", "precision", "recall", *(("macro_f1",) if mode == "aware" else ()))
            yield from (f"detection.{readout}.{mode}.{kind}.{end}" for kind in kinds for end in ends)
        yield from (f"detection.{readout}.aware.f1_rex_omni.{end}" for end in REX_OMNI)
    for mode in ("aware", "agnostic"):
        sizes = [*(f"size.{name}" for name, *_ in COCO_SIZES), *(f"bins.{name}" for name, *_ in BIN_SIZES)]
        sizes += [f"aspect.{name}" for name, *_ in ASPECTS]
        yield from (f"buckets.{mode}.{name}.{key}" for name in sizes for key in (*SHOWN, "n"))
        yield from (f"buckets.{mode}.crowding.{name}.{key}" for name, *_ in CROWDING for key in (*SHOWN, "n", "images"))


def _average_precision() -> Iterator[str]:
    for mode in ("constant", "file"):
        for kind, keys in (("coco", COCO_KEYS), ("lvis", LVIS_KEYS)):
            yield from (f"{kind}.{mode}.{key}" for key in keys)
            yield from (f"{kind}.{mode}.box_area.{key}" for key in AREA_KEYS)
        yield from (f"voc.{mode}.{key}" for key in ("ap07", "ap12"))
        yield from (f"tide.{mode}.{part}.{kind.lower()}" for part in ("dap", "count") for kind in TIDE_KINDS)


def _edges() -> Iterator[str]:
    yield "localisation.matched"
    sizes = [*(f"size.{name}" for name, *_ in COCO_SIZES), *(f"bins.{name}" for name, *_ in BIN_SIZES)]
    for readout in READOUTS:
        prefix = f"localisation.{readout}"
        for slot in ("all", *SLOTS):
            yield from (f"{prefix}.{slot}.{kind}_{unit}" for kind in ("mean", "median", "p90", "signed_bias") for unit in ("bins", "px"))
        yield from (f"{prefix}.{name}.{key}" for name in sizes for key in ("mean_bins", "mean_px", "signed_bias_bins", "n"))
    names = (*(f"coverage_{level}" for level in COVERAGE), "pit_ks", "pit_mean", "n")
    yield from (f"calibration.{slot}.{name}" for slot in ("all", *SLOTS) for name in names)
    yield from (f"calibration.pit_histogram.{k}" for k in range(HISTOGRAM))
    yield "calibration.rest_mean"


def _answers() -> Iterator[str]:
    for readout in READOUTS:
        yield from (f"grounding.{readout}.{key}" for key in (*(f"acc.{end}" for end in ACCURACY), "mean_iou", "exact.50"))
    yield from ("grounding.no_target_acc", "grounding.target_acc")
    yield from (f"{task}.{key}" for task in ("grounding", "pointing") for key in ("answered", "n"))
    yield "pointing.acc"
    yield from (f"pointing.{readout}.acc" for readout in READOUT_NAMES)
    yield from (f"health.{key}" for key in HEALTH)


def key_problem(key: str) -> str | None:
    """What is wrong with an expected key, with the nearest legal one; None if nothing is."""
    known = result_keys()
    if key in known:
        return None
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return f"no number of results.json: {f'did you mean {near[0]}?' if near else 'docs/metrics.md lists them'}"
