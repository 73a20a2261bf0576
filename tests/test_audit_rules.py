"""Every planted fault is found by its rule; the healthy twin raises nothing severe; random healthy logs raise next to nothing."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

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
from coordexp.runs.rules.registry import RATES, RULES, read_rates, rules_page
from coordexp.runs.rules.statistics import noise, train_over_eval, windows
from planted import HEADER, TWINS, Row, Shape, change, healthy, twin, write_run, write_state, write_swift
from plants import KL, LONG, MASS, P_GT, PLANTS, times


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


@pytest.mark.parametrize("kind", TWINS)
def test_no_healthy_log_raises_something_severe(kind):
    # 2,000 of them in benchmarks/bench_audit_rules.py.
    for seed in range(40):
        rows, arguments = twin(kind, seed)
        subject = replace(_subject(rows), arguments=arguments)
        for rule in RULES:
            # Only these can be severe; the others would make the test slow.
            if rule.severity == "severe":
                verdict = rule.check(subject)
                assert verdict.outcome != "finding" or verdict.severity not in (None, "severe"), (seed, rule.code, verdict.evidence)


@pytest.mark.parametrize(("accuracy", "severity"), [(None, "warning"), (0.05, "warning"), (0.0, None), (0.2, "passed")])
def test_half_the_evaluation_loss_is_a_wrong_scale_only_where_equal_accuracies_say_so(accuracy, severity):
    keys = {"loss": 0.476} | ({} if accuracy is None else {"token_acc": 0.7 + accuracy})
    rows = [{"step": step, **keys, "accum/grad_steps": 2.0} for step in range(1, 61)]
    held_out = {"eval_loss": 1.0} | ({} if accuracy is None else {"eval_token_acc": 0.7})
    rows = sorted([*rows, *({"step": step, **held_out} for step in range(10, 61, 10))], key=lambda row: row["step"])
    subject = replace(_subject(rows), arguments={"world_size": 2})
    for code in ("CX002", "CX004"):
        verdict = next(rule for rule in RULES if rule.code == code).check(subject)
        assert verdict.outcome == {"passed": "passed"}.get(severity, "finding" if code == "CX002" else "not_applicable"), code
        assert verdict.severity == (severity if verdict.outcome == "finding" else None)


@pytest.mark.parametrize(
    ("rows", "fp16", "outcome"), [(3, None, "passed"), (3, True, "passed"), (3, False, "finding"), (30, None, "finding")]
)
def test_overflows_at_the_beginning_are_the_search_for_fp16s_loss_scale(rows, fp16, outcome):
    edit = lambda row, x: row.update(grad_norm=float("inf")) if row["step"] <= rows * 10 else None  # noqa: E731
    subject = replace(_subject(change(healthy(LONG), edit)), arguments={} if fp16 is None else {"fp16": fp16})
    assert next(rule for rule in RULES if rule.code == "CX010").check(subject).outcome == outcome


def test_a_spike_is_one_on_the_losss_own_scale():
    def edit(row: Row, x: float) -> None:
        row["loss"] = (2.0 if x < 0.5 else 1e-4) * (3.0 if row["step"] in (300, 1000) else 1.0)

    rule = next(rule for rule in RULES if rule.code == "CX011")
    found = rule.check(_subject(change(healthy(LONG), edit)))
    assert [item.values["step"] for item in found.evidence] == [300]  # at step 1000 the loss is 1e-4


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
    root = request.config.rootpath
    page = root / "docs" / "audit-rules.md"
    assert page.read_text(encoding="utf-8") == rules_page(read_rates(root / RATES)), "run python -m coordexp.runs.rules.registry"


def test_the_table_of_rates_holds_every_planted_fault_and_no_healthy_log_was_accused(request):
    root = request.config.rootpath
    rates = {row["fault"]: row for row in read_rates(root / RATES)}
    assert {name: row["code"] for name, row in rates.items()} == {name: plant.code for name, plant in PLANTS.items()}
    with (root / "benchmarks" / "results" / "audit_twins.csv").open() as file:
        twins = list(csv.DictReader(file))
    assert sum(int(row["logs"]) for row in twins) >= 2000
    assert {row["severe"] for row in twins} == {"0"}


def test_codes_are_unique_and_in_order():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
