"""Every planted fault is found by its rule; the healthy twin raises nothing severe; random healthy logs raise next to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.losses.objective import CoordObjective
from coordexp.losses.targets import soft_target
from coordexp.losses.terms import target_entropy as reference_entropy
from coordexp.runs.audit import Audit, audit, judge
from coordexp.runs.columns import Series
from coordexp.runs.logs import RunLog
from coordexp.runs.rules.base import Subject
from coordexp.runs.rules.calibration import soft_ce_floor
from coordexp.runs.rules.registry import RULES, rules_page
from coordexp.runs.rules.statistics import noise, train_over_eval, windows
from planted import HEADER, Row, Shape, change, healthy, random_shape, write_run, write_state, write_swift

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


def at_step(step: int, **values: float) -> Callable[[Row, float], None]:
    def edit(row: Row, _: float) -> None:
        if row["step"] == step:
            row.update(values)

    return edit


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
    "NaN loss": Plant("CX010", "severe", lambda r: change(r, at_step(600, loss=float("nan")))),
    "infinite gradient": Plant("CX010", "severe", lambda r: change(r, at_step(600, grad_norm=float("inf")))),
    "NaN in evaluation": Plant(
        "CX010", "severe", lambda r: change(r, lambda row, x: row.update({"eval_" + KL: float("nan")}) if x > 0.9 else None,
            evals=True, train=False)
    ),
    "filtered NaN": Plant("CX010", "warning", lambda r: change(r, lambda row, x: row.update(loss=0.0) if 0.5 < x < 0.6 else None)),
    "spike": Plant(
        "CX011", "warning", lambda r: change(r, lambda row, _: row.update(loss=4 * row["loss"]) if row["step"] == 600 else None)
    ),
    "gradient summed over micro-batches": Plant("CX012", "severe", _accumulation_jump(1.5), replace(LONG, resumed_with=2)),
    "gradient divided twice": Plant("CX012", "severe", _accumulation_jump(-0.8), replace(LONG, resumed_with=2)),
    "partial windows": Plant("CX013", "warning", lambda r: _partial(r, 3 / 8)),
    "mass falls": Plant("CX020", "severe", lambda r: both(r, course(MASS, lambda x: 1 - 0.3 * max(0.0, x - 0.5)))),
    "mass falls and stays high": Plant("CX020", "warning", lambda r: both(r, assign(MASS, lambda v, x: 0.999 - _rise(0, 0.035)(x)))),
    "mass at text slots": Plant(
        "CX021", "warning", lambda r: both(r, assign("coord_monitor/coord_vocab_mass_at_gt_text", lambda v, x: 0.01 + _rise(0, 0.1)(x)))
    ),
    "flattening": Plant("CX022", "warning", lambda r: both(r, *FLAT)),
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
}  # fmt: skip


def findings(result: Audit) -> dict[str, str]:
    return {j.rule.code: j.severity for j in result.of("finding")}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_fault_is_found_by_its_rule_and_the_healthy_twin_is_not_accused(name, tmp_path):
    plant = PLANTS[name]
    rows = healthy(plant.shape, seed=3)
    twin = findings(audit(write_run(tmp_path / "twin", rows, **(plant.beside or {}))))
    assert "severe" not in twin.values()
    assert plant.code not in twin
    faulty = findings(audit(write_run(tmp_path / "faulty", plant.fault(rows), **(plant.beside_fault or plant.beside or {}))))
    assert faulty.get(plant.code) == plant.severity
    # No second rule raises a severe alarm over the same fault.
    assert [code for code, severity in faulty.items() if severity == "severe"] in ([], [plant.code])


def test_every_rule_has_a_planted_fault():
    assert {plant.code for plant in PLANTS.values()} == {rule.code for rule in RULES}


@pytest.mark.parametrize("write", [write_swift, write_state])
def test_a_wrong_scale_is_found_in_other_trainers_logs(write, tmp_path):
    rows = [{k: v for k, v in row.items() if not k.startswith("accum/")} for row in healthy(replace(LONG, coordinates=False), seed=1)]
    path = write(tmp_path / "log", change(rows, times(8, "loss")))
    (tmp_path / "log" / "args.json").write_text('{"gradient_accumulation_steps": 8}')
    assert findings(audit(path)) == {"CX001": "severe"}


def test_old_names_are_audited_as_the_kept_ones(tmp_path):
    rows = change(healthy(LONG), lambda row, x: row.update({MASS: 0.99 - 0.3 * x}))
    old = [{k.replace("coord_softce_w1/", "coord_diag/"): v for k, v in row.items() if not k.startswith("contrib/")} for row in rows]
    assert findings(audit(write_swift(tmp_path, old)))["CX020"] == "severe"


def _subject(rows: list[Row]) -> Subject:
    is_eval = [any(key.startswith("eval_") for key in row) for row in rows]
    train = [row for row, e in zip(rows, is_eval, strict=True) if not e]
    return Subject.of(RunLog(HEADER, train, [row for row, e in zip(rows, is_eval, strict=True) if e], (), "run"))


def test_under_one_per_cent_of_random_healthy_logs_raise_something_severe():
    severe = []
    for seed in range(1000):
        subject = _subject(healthy(random_shape(np.random.default_rng(seed)), seed))
        for rule in RULES:
            # Only these can be severe; the others would make the test slow.
            if rule.severity == "severe":
                verdict = rule.check(subject)
                if verdict.outcome == "finding" and (verdict.severity or rule.severity) == "severe":
                    severe.append((seed, rule.code))
    assert len({seed for seed, _ in severe}) < 10, severe


def test_an_overfitting_run_is_not_a_wrong_scale():
    def overfit(row: Row, x: float) -> None:
        row["loss"] *= 0.02**x

    subject = _subject(change(healthy(replace(LONG, gap=0.8)), overfit))
    assert [rule.code for rule in RULES[:4] if rule.check(subject).outcome == "finding"] == []


def test_two_evaluations_are_too_few_to_judge_the_scale():
    subject = _subject(change(healthy(replace(LONG, evals=2)), times(8, "loss")))
    assert [rule.check(subject).outcome for rule in RULES[:4]] == ["not_applicable"] * 4


def test_a_mean_over_no_positions_is_not_a_fault():
    def edit(row: Row, x: float) -> None:
        if row["step"] % 100 == 0:
            row.update({"coord_softce_w1/coord_tokens": 0.0, KL: float("nan"), P_GT: float("nan")})

    rule = next(rule for rule in RULES if rule.code == "CX010")
    assert rule.check(_subject(change(healthy(LONG), edit))).outcome == "passed"


@pytest.mark.parametrize("options", [{"sigma": 2.0}, {"sigma": 1.5, "truncate": 8}, {"sigma": 8.0}, {"alpha": 0.1, "sigma_min": 0.75}])
def test_the_floor_of_soft_ce_is_below_the_entropy_of_every_target(options):
    objective = CoordObjective(**options)
    centers = torch.linspace(0, 999, 3997, dtype=torch.float64)
    extents = torch.zeros_like(centers) if objective.alpha else None
    entropy = reference_entropy(soft_target(objective, centers, 1000, extents))
    floor = soft_ce_floor({"target": "gaussian", **options})
    assert floor <= float(entropy.min()) + 1e-9
    assert floor > float(entropy.min()) - 0.05


def test_noise_and_windows_see_through_a_trend():
    rng = np.random.default_rng(0)
    values = np.linspace(0, 50, 4000) + rng.normal(0, 2.0, 4000)
    assert noise(values) == pytest.approx(2.0, rel=0.1)
    made = windows(Series(np.arange(4000), values), least=3)
    assert len(made.level) == 10
    assert made.level == pytest.approx([50 * (i + 0.5) / 10 for i in range(10)], abs=0.5)
    assert windows(Series(np.arange(11), values[:11]), least=3) is None


def test_ratio_of_losses_is_taken_beside_each_evaluation():
    steps = np.arange(1, 401)
    loss = 5.0 * np.exp(-steps / 100)
    evals = np.arange(40, 401, 40)
    found = train_over_eval(Series(steps, 8 * loss), Series(evals, 5.0 * np.exp(-evals / 100)))
    assert found.factor == pytest.approx(8.0, rel=0.02)
    assert found.matches(8.0)
    assert not found.matches(4.0)
    assert train_over_eval(Series(steps, loss - 1), Series(evals, loss[evals - 1])) is None


KNOWN = sorted({key for row in healthy(Shape(rows=4, evals=1)) for key in row} - {"step"})
ODD = st.sampled_from([0.0, -1.0, 1.0, 1e-300, 1e308, -1e308, float("nan"), float("inf"), float("-inf")])


@given(
    keys=st.lists(st.sampled_from(KNOWN), min_size=1, max_size=12, unique=True),
    count=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    odd=st.lists(st.tuples(st.integers(0, 59), ODD), max_size=8),
    fill=st.sampled_from([0.0, 1.0, -1.0, 1e308, None]),
)
@settings(max_examples=120)
def test_no_log_makes_a_rule_fail_or_its_json_illegal(keys, count, seed, odd, fill):
    rng = np.random.default_rng(seed)
    rows = [{"step": i, **{k: float(rng.normal()) if fill is None else fill for k in keys}} for i in range(count)]
    for at, value in odd:
        rows[at % count][keys[at % len(keys)]] = value
    subject = _subject(rows)
    judged = judge(subject)
    assert len(judged) == len(RULES)
    for j in judged:
        assert j.verdict.outcome in ("finding", "passed", "not_applicable")
        assert j.verdict.evidence
        json.dumps(j.row(), allow_nan=False)


def test_the_page_of_rules_is_the_registrys(request):
    page = request.config.rootpath / "docs" / "audit-rules.md"
    assert page.read_text(encoding="utf-8") == rules_page(), "run python -m coordexp.runs.rules.registry"


def test_codes_are_unique_and_in_order():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
