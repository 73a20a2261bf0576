"""Faults planted into healthy logs: what changes, which rule must find it, and how severe that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planted import Row, Shape, change

LONG = Shape(rows=120, evals=12, noise=0.04)


def times(factor: float, *keys: str) -> Callable[[Row, float], None]:
    def edit(row: Row, _: float) -> None:
        row.update({key: row[key] * factor for key in keys})

    return edit


def lower(key: str, by: float) -> Callable[[Row, float], None]:
    return lambda row, _: row.update({key: row[key] - by})


def course(key: str, value: Callable[[float], float]) -> Callable[[Row, float], None]:
    """Multiplies a key, train and eval, by a function of the share of the run."""

    def edit(row: Row, x: float) -> None:
        name = "eval_" + key if "eval_" + key in row else key
        row[name] *= value(x)

    return edit


def rises(factor: float, *keys: str) -> Callable[[Row, float], None]:
    """From two fifths of the run on, up to ``factor``."""
    return lambda row, x: row.update({key: row[key] * _rise(1, factor)(x) for key in keys})


def assign(key: str, value: Callable[[float, float], float]) -> Callable[[Row, float], None]:
    """Sets a key, train and eval, to a function of its old value and the share of the run."""

    def edit(row: Row, x: float) -> None:
        name = "eval_" + key if "eval_" + key in row else key
        row[name] = value(row[name], x)

    return edit


def both(rows: list[Row], *edits: Callable[[Row, float], None]) -> list[Row]:
    for edit in edits:
        rows = change(rows, edit, evals=True)
    return rows


def half_way(**values: float) -> Callable[[Row, float], None]:
    """Sets values in the row in the middle of the run; there is one where the number of rows is even."""
    return lambda row, x: row.update(values) if x == 0.5 else None


@dataclass(frozen=True)
class Plant:
    """``fault`` makes the faulty rows of the healthy ones; ``beside`` is what stands beside both logs."""

    code: str
    severity: str
    fault: Callable[[list[Row]], list[Row]]
    shape: Shape = LONG
    beside: dict[str, Any] | None = None
    beside_fault: dict[str, Any] | None = None


def _partial(rows: list[Row], factor: float) -> list[Row]:
    """Every 20th window is cut short; the fault scales its loss and gradient."""

    def edit(row: Row, _: float) -> None:
        if row["step"] % 200 == 0:
            row["accum/current_grad_steps"] = 3.0
            row["loss"] *= factor
            row["grad_norm"] *= factor

    return change(rows, edit)


def _memorised(rows: list[Row]) -> list[Row]:
    def edit(row: Row, x: float) -> None:
        for key in ("loss", "eval_loss"):
            if key in row:
                row[key] = 5.0 * 0.02 ** min(1.0, x) * (1 + 0.01 * np.sin(row["step"]))

    return change(rows, edit, evals=True)


def _sigma_changes(rows: list[Row]) -> list[Row]:
    return both(rows, assign("coord_softce_w1/soft_ce", lambda v, x: v - (0.29 if x > 0.5 else 0.0)))


def _keys_come_and_go(rows: list[Row]) -> list[Row]:
    def edit(row: Row, x: float) -> None:
        if x < 0.4:
            row.pop("coord_dist/kl", None)
        if x > 0.6:
            row.pop("text_token_acc", None)

    return change(rows, edit)


def _accumulation_jump(power: float) -> Callable[[list[Row]], list[Row]]:
    def fault(rows: list[Row]) -> list[Row]:
        def edit(row: Row, x: float) -> None:
            if row["accum/grad_steps"] == 2:
                row["grad_norm"] *= (2 / 8) ** power

        return change(rows, edit)

    return fault


def _rise(low: float, high: float, begin: float = 0.4) -> Callable[[float], float]:
    return lambda x: low + (high - low) * max(0.0, (x - begin) / (1 - begin))


def _two_writers(rows: list[Row]) -> list[Row]:
    """Another process logs into the same file, with losses of its own."""
    other = change(rows, lambda row, x: row.update(loss=row["loss"] * 1.013))
    return sorted([*rows, *(row for row in other if "loss" in row)], key=lambda row: row["step"])


def _repeated(rows: list[Row]) -> list[Row]:
    kept: dict[str, float] = {}

    def edit(row: Row, x: float) -> None:
        if 0.5 <= x < 0.7:
            row.update(kept or {"loss": row["loss"], "grad_norm": row["grad_norm"]})
            kept.update(loss=row["loss"], grad_norm=row["grad_norm"])

    return change(rows, edit)


def without(rows: list[Row], *keys: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key.removeprefix("eval_") not in keys} for row in rows]


P_GT, TOP5, KL = "coord_softce_w1/p_gt_mean", "coord_softce_w1/acc_top5", "coord_dist/kl"
MASS, BIAS = "coord_softce_w1/coord_vocab_mass", "coord_dist/signed_bias"
SHARP = (assign(KL, lambda v, x: 1.0 + 0.4 * max(0, x - 0.4) + 0 * v), assign(P_GT, lambda v, x: 0.1 + 0.08 * x))
FLAT = (
    assign(KL, lambda v, x: 1.0 + 0.001 * np.sin(99 * x)),
    assign(P_GT, lambda v, x: 0.16 - _rise(0, 0.08)(x)),
    assign(TOP5, lambda v, x: 0.5 - _rise(0, 0.2)(x)),
)
EXPECTATION = {"config": "decode: {readout: expectation}\n"}
GOOD_RESULTS = {
    "health.duplicate_rate": 0.01, "health.parse_rate": 0.995, "counts": {"effective": 500},
    "detection.auto.aware.f1.50": 0.5, "intervals.detection.auto.aware.f1.50": [0.46, 0.54],
}  # fmt: skip
EXPECT = "evaluate: {expect: {detection.best.aware.f1.50: 0.4}}\n"

PLANTS = {
    "ratio 8": Plant("CX001", "severe", lambda r: change(r, times(8, "loss"))),
    "ratio 2": Plant("CX001", "severe", lambda r: change(r, times(2, "loss")), replace(LONG, grad_steps=2)),
    "ratio 8, steps from args.json": Plant(
        "CX001", "severe", lambda r: change(r, lambda row, _: (row.update(loss=8 * row["loss"]), row.pop("accum/grad_steps"))),
        beside={"arguments": {"gradient_accumulation_steps": 8}},
    ),
    "ratio 1/8": Plant("CX002", "severe", lambda r: change(r, times(1 / 8, "loss"))),
    "world size": Plant("CX003", "severe", lambda r: change(r, times(4, "loss")), beside={"arguments": {"global_world_size": 4}}),
    "one over world size": Plant(
        "CX003", "severe", lambda r: change(r, times(1 / 4, "loss")),
        beside={"arguments": {"global_world_size": 4}},
    ),
    "world size times accumulation": Plant(
        "CX003", "severe", lambda r: change(r, times(32, "loss")),
        beside={"arguments": {"world_size": 4}},
    ),
    "unexplained factor": Plant("CX004", "severe", lambda r: change(r, times(5, "loss")), replace(LONG, gap=0.05)),
    "coordinates among the text tokens": Plant(
        "CX005", "warning", lambda r: change(r, times(1.9, "base_ce/loss")), replace(LONG, gap=0.02)
    ),
    "text accuracy of all tokens": Plant(
        "CX005", "warning", lambda r: change(r, lower("text_token_acc", 0.2))
    ),
    "fewer coordinates in evaluation": Plant(
        "CX005", "warning", lambda r: change(r, times(0.4, "eval_coord_softce_w1/coord_tokens"), evals=True, train=False)
    ),
    "evaluation data in training": Plant("CX006", "warning", _memorised, replace(LONG, epochs=6.0, coordinates=False)),
    "NaN loss": Plant("CX010", "severe", lambda r: change(r, half_way(loss=float("nan")))),
    "infinite gradient": Plant("CX010", "severe", lambda r: change(r, half_way(grad_norm=float("inf")))),
    "NaN in evaluation": Plant(
        "CX010", "severe", lambda r: change(r, lambda row, x: row.update({"eval_" + KL: float("nan")}) if x > 0.9 else None,
            evals=True, train=False)
    ),
    "filtered NaN": Plant("CX010", "warning", lambda r: change(r, lambda row, x: row.update(loss=0.0) if 0.5 < x < 0.6 else None)),
    "spike": Plant(
        "CX011", "warning", lambda r: change(r, lambda row, x: row.update(loss=4 * row["loss"]) if x == 0.5 else None)
    ),
    "gradient summed over micro-batches": Plant("CX012", "severe", _accumulation_jump(1.5), replace(LONG, resumed_with=2)),
    "gradient divided twice": Plant("CX012", "severe", _accumulation_jump(-0.8), replace(LONG, resumed_with=2)),
    "partial windows": Plant("CX013", "warning", lambda r: _partial(r, 3 / 8)),
    "mass falls": Plant("CX020", "severe", lambda r: both(r, course(MASS, lambda x: 1 - 0.3 * max(0.0, x - 0.5)))),
    "mass falls and stays high": Plant("CX020", "warning", lambda r: both(r, assign(MASS, lambda v, x: 0.999 - _rise(0, 0.035)(x)))),
    "leakage nine times": Plant("CX020", "warning", lambda r: both(r, assign(MASS, lambda v, x: 0.998 - _rise(0, 0.017)(x)))),
    "mass at text slots": Plant(
        "CX021", "warning", lambda r: both(r, assign("coord_monitor/coord_vocab_mass_at_gt_text", lambda v, x: 0.01 + _rise(0, 0.1)(x)))
    ),
    "flattening": Plant("CX022", "warning", lambda r: both(r, *FLAT)),
    "flattening, no top-5 accuracy": Plant("CX022", "warning", lambda r: without(both(r, *FLAT), TOP5)),
    "over-sharpening": Plant("CX023", "warning", lambda r: both(r, *SHARP)),
    "w1 by scale": Plant("CX024", "warning", lambda r: both(r, course("contrib/w1", lambda x: 0.001))),
    "w1 flat": Plant("CX024", "warning", lambda r: both(r, assign("coord_softce_w1/w1", lambda v, x: 40.0))),
    "sigma changes": Plant("CX025", "warning", _sigma_changes),
    "sigma differs in evaluation": Plant(
        "CX025", "warning", lambda r: change(r, lower("eval_coord_softce_w1/soft_ce", 0.29),
            evals=True, train=False)
    ),
    "kl below 0": Plant("CX026", "warning", lambda r: both(r, assign(KL, lambda v, x: v - 4 * x))),
    "soft_ce under its floor": Plant(
        "CX026", "warning", lambda r: both(r, assign("coord_softce_w1/soft_ce", lambda v, x: v / 4)),
        beside={"config": "objective: {sigma: 2.0}\n"}
    ),
    "overconfident": Plant("CX027", "warning", lambda r: both(r, assign("coord_dist/nll", lambda v, x: v + 2 * x))),
    "nothing learnt": Plant("CX027", "warning", lambda r: both(r, assign("coord_dist/entropy", lambda v, x: 6.85))),
    "modes and expectation": Plant(
        "CX028", "warning", lambda r: both(r, assign("coord_dist/multimodal_frac", lambda v, x: 0.2)),
        replace(LONG, rest=0.1, speed=12.0), EXPECTATION
    ),
    "nothing learnt, no nll": Plant(
        "CX027", "warning", lambda r: without(both(r, assign("coord_dist/entropy", lambda v, x: 6.85)), "coord_dist/nll")
    ),
    "bias, no error": Plant(
        "CX029", "warning", lambda r: without(both(r, assign(BIAS, lambda v, x: -1.5)), "coord_dist/median_bin_mae")
    ),
    "bias": Plant(
        "CX029", "warning", lambda r: both(r, assign(BIAS, lambda v, x: -0.5), assign("coord_dist/median_bin_mae", lambda v, x: 2.0))
    ),
    "duplicates": Plant(
        "CX030", "warning", lambda r: r,
        beside={"results": GOOD_RESULTS},
        beside_fault={"results": GOOD_RESULTS | {"health.duplicate_rate": 0.2}},
    ),
    "duplicates of a probe": Plant(
        "CX030", "warning", lambda r: change(r, lambda row, _: row.update({"eval_probe/duplicate_rate": 0.3}), evals=True, train=False)
    ),
    "parse failures": Plant(
        "CX031", "warning", lambda r: r,
        beside={"results": GOOD_RESULTS},
        beside_fault={"results": GOOD_RESULTS | {"health.parse_rate": 0.7}},
    ),
    "floor of the learning rate": Plant(
        "CX032", "info", lambda r: change(r, lambda row, x: row.update(learning_rate=1e-7) if x > 0.7 else None)
    ),
    "claim inside its interval": Plant(
        "CX033", "warning", lambda r: r, beside={"results": GOOD_RESULTS, "config": EXPECT},
        beside_fault={"results": GOOD_RESULTS, "config": EXPECT.replace("0.4", "0.5")},
    ),
    "few images": Plant(
        "CX033", "warning", lambda r: r,
        beside={"results": GOOD_RESULTS},
        beside_fault={"results": GOOD_RESULTS | {"counts": {"effective": 20}}},
    ),
    "keys appear and vanish": Plant("CX034", "warning", _keys_come_and_go),
    "over-fitting": Plant("CX040", "warning", lambda r: change(r, rises(2.6, "eval_loss"), evals=True, train=False)),
    "over-fitting, no training loss": Plant(
        "CX040", "warning", lambda r: without(change(r, rises(2.6, "eval_loss"), evals=True, train=False), "base_ce/loss")
    ),
    "divergence": Plant("CX041", "severe", lambda r: both(r, course("loss", _rise(1, 6)))),
    "flat loss": Plant("CX042", "warning", lambda r: both(r, assign("loss", lambda v, x: 2 + 0.01 * np.sin(999 * x)))),
    "learning rate 0": Plant(
        "CX043", "severe",
        lambda r: both(change(r, lambda row, _: row.update(learning_rate=0.0)), assign("loss", lambda v, x: 2 + 0.01 * np.sin(999 * x)))
    ),
    "rate rounded to 0": Plant("CX043", "warning", lambda r: change(r, lambda row, _: row.update(learning_rate=0.0))),
    "gradient 0": Plant("CX043", "severe", lambda r: change(r, lambda row, _: row.update(grad_norm=0.0))),
    "gradient 0 from the middle on": Plant(
        "CX043", "warning", lambda r: change(r, lambda row, x: row.update(grad_norm=0.0) if x > 0.5 else None)
    ),
    "first loss worse than chance": Plant("CX044", "warning", lambda r: both(r, course("base_ce/loss", lambda x: 3.0))),
    "two writers": Plant("CX045", "warning", _two_writers),
    "values repeat": Plant("CX045", "warning", _repeated),
}  # fmt: skip
