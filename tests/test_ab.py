"""``coordexp ab``: the plan that a file means, the order runs are made in, and a whole small A/B that is stopped and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from test_experiment import SMALL

from command import call
from coordexp import ab
from coordexp.config.arms import load_ab
from coordexp.errors import ConfigError, RunStopped
from coordexp.runs.logs import read_log, series
from coordexp.runs.manifest import read_manifest

FILE = """
data: {kind: synth}
arms:
  seeds: [0, 1]
  warmup: {train: {max_steps: 2}}
  baseline: soft
  variants:
    soft: {}
    hard: {objective: {ce: 1.0, soft_ce: 0.0}}
"""
SHIPPED = sorted(path for path in (Path(__file__).parent.parent / "experiments").glob("ab_*.yaml") if path.stem != "ab_base")


def _plan(tmp_path, *overrides, text=FILE):
    (tmp_path / "x.yaml").write_text(text)
    return load_ab(tmp_path / "x.yaml", list(overrides))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_ab_is_a_plan_whose_arms_differ_as_they_say(path):
    plan = load_ab(path)
    assert len(plan.seeds) >= 3
    for name in plan.arms:
        assert bool(plan.changed[name]) == (name != plan.baseline)


def test_the_shipped_abs_with_a_warm_up_share_it():
    plans = [plan for path in SHIPPED if (plan := load_ab(path)).warmup is not None]
    assert len(plans) >= 3
    folders = [[t.folder for t in ab.tasks_of(plan, Path("runs") / plan.name) if t.arm is None] for plan in plans]
    assert all(found == folders[0] for found in folders)


def test_a_seed_changes_the_start_and_the_order_and_not_the_scenes(tmp_path):
    plan = _plan(tmp_path)
    a, b = (next(t for t in ab.tasks_of(plan, tmp_path) if t.arm is None and t.seed == seed).config for seed in (0, 1))
    assert (b.seed, b.model.tiny.seed, b.vocab.seed) == (1, 1, 1)
    assert a.data == b.data


def test_an_arm_goes_on_from_the_warm_up_of_its_seed(tmp_path):
    for task in ab.tasks_of(_plan(tmp_path), tmp_path / "runs" / "x"):
        if task.arm is None:
            assert task.resolved().train.max_steps == 2
            continue
        config = task.resolved()
        assert task.needs.seed == task.seed
        assert config.model.path == str(task.needs.folder / "checkpoints" / "final")
        assert (config.data.kind, config.data.source) == ("jsonl", str(task.needs.folder / "data"))
        assert not config.vocab.extend


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("objective.sgima=3", "did you mean objective.sigma?"),
        ("arms.variants.hard.objective.w2=1", "arms.variants.hard: objective.w2: unknown key: did you mean objective.w1?"),
        ("arms.baseline=x", "arms.baseline: expected one of soft, hard"),
        ("arms.variants.hard.data.order=random", "arms.variants.hard: data: is the same in every arm"),
        ("arms.variants.hard.train.max_steps=3", "train.max_steps: is the same in every arm"),
        ("arms.seeds=[0, 0]", "arms.seeds: expected distinct whole numbers"),
        ("arms.variants.hard={}", "arms.variants.hard: is the same as soft"),
        ("arms.variants={soft: {}}", "arms.variants: expected at least two arms"),
        ("arms.variants={soft: {}, a/b: {seed: 1}}", "arms.variants.a/b: expected a name of letters"),
        ("arms.foo=3", "arms.foo: unknown key"),
        ("arms.warmup.train.max_steps=0", "arms.warmup: train.max_steps: expected at least 1"),
        ("arms=null", "arms: expected a section"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path, override, says):
    with pytest.raises(ConfigError) as error:
        _plan(tmp_path, override)
    assert says in str(error.value)


def test_run_and_ab_name_each_other_for_the_other_kind_of_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.yaml").write_text(FILE)
    code, _, err = call(monkeypatch, capsys, "run", tmp_path / "x.yaml")
    assert code == 2
    assert "coordexp ab" in err
    (tmp_path / "y.yaml").write_text("data: {kind: synth}\n")
    code, _, err = call(monkeypatch, capsys, "ab", tmp_path / "y.yaml")
    assert code == 2
    assert "coordexp run" in err


def _pool(tasks, root, places=2):
    return ab._Pool(tasks, root, ("",) * places, False, Console(quiet=True), lambda: None)


def _fake(monkeypatch, codes, seen=None, hold=None):
    """Runs that only say which they were; ``codes`` by label, else 0."""

    def start(self, task, place, log):
        log.write_text("error: no such thing\n")
        if seen is not None:
            seen.append(task.label)
        if hold is not None:
            hold(self, task)
        return codes.get(task.label, 0)

    monkeypatch.setattr(ab._Pool, "_start", start)


def test_every_run_waits_for_its_warm_up_and_runs_once(tmp_path, monkeypatch):
    tasks, seen = ab.tasks_of(_plan(tmp_path), tmp_path / "runs" / "x"), []
    (tmp_path / "runs" / "x").mkdir(parents=True)
    _fake(monkeypatch, {}, seen)
    _pool(tasks, tmp_path / "runs" / "x").run()
    assert sorted(seen) == sorted(task.label for task in tasks)
    for task in tasks:
        assert task.state == "complete"
        if task.needs is not None:
            assert seen.index(task.needs.label) < seen.index(task.label)


def test_a_failed_warm_up_fails_its_arms_and_no_others(tmp_path, monkeypatch):
    tasks, seen = ab.tasks_of(_plan(tmp_path), tmp_path), []
    _fake(monkeypatch, {"warm-up, seed 0": 1}, seen)
    _pool(tasks, tmp_path).run()
    assert {task.label: task.state for task in tasks if task.seed == 0} == dict.fromkeys(
        ("warm-up, seed 0", "soft, seed 0", "hard, seed 0"), "failed"
    )
    assert {task.state for task in tasks if task.seed == 1} == {"complete"}
    assert "soft, seed 0" not in seen


def test_a_users_mistake_in_one_run_stops_the_ab_with_its_own_words(tmp_path, monkeypatch):
    tasks = ab.tasks_of(_plan(tmp_path), tmp_path)
    _fake(monkeypatch, {"warm-up, seed 0": 2})
    with pytest.raises(ConfigError, match="warm-up, seed 0: no such thing"):
        _pool(tasks, tmp_path, places=1).run()
    assert sum(task.state == "waiting" for task in tasks) >= 4


def test_a_signal_starts_nothing_more(tmp_path, monkeypatch):
    tasks = ab.tasks_of(_plan(tmp_path), tmp_path)
    _fake(monkeypatch, {"warm-up, seed 0": 143}, hold=lambda pool, task: pool._stop(signal.SIGTERM))
    with pytest.raises(RunStopped):
        _pool(tasks, tmp_path, places=1).run()
    assert [task.state for task in tasks].count("waiting") == len(tasks) - 1
    assert tasks[0].state == "stopped"


def test_each_gpu_is_seen_by_one_run_at_a_time(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text('#!/bin/sh\necho "57"\n')
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(ab, "_POLL_SECONDS", 0.05)
    busy: dict[str, int] = {}
    most, lock, real = [0], threading.Lock(), subprocess.Popen

    def popen(command, **kwargs):
        if "coordexp" not in command:
            return real(command, **kwargs)
        place = kwargs["env"]["CUDA_VISIBLE_DEVICES"]
        with lock:
            busy[place] = busy.get(place, 0) + 1
            most[0] = max(most[0], busy[place])
        child = real([sys.executable, "-c", "import time; time.sleep(0.2)"], **kwargs)
        wait = child.poll

        def poll():
            code = wait()
            if code is not None:
                with lock:
                    busy[place] = 0
            return code

        child.poll = poll
        return child

    monkeypatch.setattr(ab.subprocess, "Popen", popen)
    tasks = ab.tasks_of(_plan(tmp_path), tmp_path)
    ab._Pool(tasks, tmp_path, ("0", "3"), False, Console(quiet=True), lambda: None).run()
    assert set(busy) == {"0", "3"}
    assert most == [1]
    assert {value for task in tasks for value in task.utilisation} == {0.57}


def test_a_second_ab_in_the_same_folder_is_refused(tmp_path):
    with ab._alone(tmp_path), pytest.raises(ConfigError, match="another coordexp ab is at work"), ab._alone(tmp_path):
        pass


def _small(folder):
    sections: dict = yaml.safe_load(FILE)
    for pair in SMALL:
        key, _, value = pair.partition("=")
        node = sections
        *parts, last = key.split(".")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value)
    sections["arms"]["seeds"] = [0]
    sections["output_dir"] = str(folder / "runs")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_an_ab_that_was_stopped_goes_on_and_ends_with_a_comparison(tmp_path, monkeypatch, capsys):
    path, root = _small(tmp_path), tmp_path / "runs" / "small"
    child = subprocess.Popen(
        [sys.executable, "-m", "coordexp", "ab", str(path), "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs" / "warmup").glob("*/manifest.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (143, "stopping (1 running): each run saves a checkpoint first; once more kills it\nterminated\n")
    assert "the same command goes on" in out
    (warm,) = (path.parent for path in (tmp_path / "runs" / "warmup").glob("*/manifest.json"))
    assert read_manifest(warm)["status"] == "interrupted"

    code, out, err = call(monkeypatch, capsys, "ab", path, "--jobs", 2)
    assert (code, err) == (0, "")
    assert "3/3" in out
    assert read_manifest(warm)["status"] == "complete"
    data = json.loads((root / "comparison.json").read_text())
    assert data["arms"]["hard"]["changed"] == ["objective.ce: 0.0 -> 1.0", "objective.soft_ce: 1.0 -> 0.0"]
    assert data["arms"]["soft"]["speed"]["steps_per_s"] > 0
    assert data["arms"]["soft"]["speed"]["peak_memory_host_mib"] > 100
    # The same samples in the same order: the same tokens of text in every step.
    tokens = [series(read_log(root / arm / "seed0").train, "base_ce/noncoord_tokens") for arm in ("soft", "hard")]
    assert tokens[0] == tokens[1]
    assert len(tokens[0][0]) == 3

    before = {file: file.stat().st_mtime_ns for file in (root / "soft").rglob("*.json*")}
    code, out, _ = call(monkeypatch, capsys, "ab", path)
    assert code == 0
    assert "3 runs, 3 complete" in out
    assert before == {file: file.stat().st_mtime_ns for file in (root / "soft").rglob("*.json*")}

    code, _, err = call(monkeypatch, capsys, "ab", path, "--set", "train.learning_rate=0.01")
    assert code == 2
    assert "was run with another configuration: train.learning_rate" in err
