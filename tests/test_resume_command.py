"""``--resume`` on the command line: exit codes, what the manifest says, what is refused."""

from __future__ import annotations

import json
import signal

import pytest
from test_experiment import SMALL, _experiment, _sets

from command import call
from coordexp.runs.logs import read_log
from coordexp.runs.manifest import read_manifest
from coordexp.train import launch


def _interrupted_at(monkeypatch, step, signum):
    """Raises the signal while a step is made; returns how to take that back."""
    real = launch.ProgressBar.on_step_begin if hasattr(launch.ProgressBar, "on_step_begin") else None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == step:
            signal.raise_signal(signum)

    monkeypatch.setattr(launch.ProgressBar, "on_step_begin", on_step_begin)
    return lambda: monkeypatch.setattr(launch.ProgressBar, "on_step_begin", real)


@pytest.mark.parametrize(("signum", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")])
def test_a_signal_saves_leaves_with_its_own_code_and_resume_finishes_the_run(tmp_path, monkeypatch, capsys, signum, code, word):
    run_dir, experiment = tmp_path / "run", _experiment(tmp_path)
    words = ["run", experiment, "--output-dir", run_dir, *_sets(*SMALL)]
    undo = _interrupted_at(monkeypatch, 1, signum)
    got, out, err = call(monkeypatch, capsys, *words)
    assert (got, err) == (code, f"{word}\n")
    assert "--resume goes on" in out
    manifest = read_manifest(run_dir)
    assert (manifest["status"], manifest["stage"]) == ("interrupted", "train")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert read_log(run_dir / "logging.jsonl").train[-1]["step"] == 1
    undo()

    got, _, err = call(monkeypatch, capsys, *words, "--resume", "--set", "train.learning_rate=5e-4", "--set", "objective.sigma=3")
    assert got == 2
    lines = err.splitlines()
    assert len(lines) == 2
    assert "objective.sigma: 2.0 -> 3.0" in lines[0]
    assert "train.learning_rate: 0.0001 -> 0.0005" in lines[1]
    assert read_manifest(run_dir)["status"] == "interrupted"

    got, out, err = call(monkeypatch, capsys, *words, "--resume")
    assert (got, err) == (0, "")
    assert "[3/6] train" in out
    assert "[1/6]" not in out
    assert "resuming from checkpoint-1" in out
    manifest = read_manifest(run_dir)
    assert manifest["status"] == "complete"
    assert [(entry["status"], entry["stage"]) for entry in manifest["resumed"]] == [("interrupted", "train")]
    log = read_log(run_dir / "logging.jsonl")
    assert log.notes == ()
    assert [row["step"] for row in log.train] == [1, 2, 3]
    assert json.loads((run_dir / "results.json").read_text())["counts"]["effective"] == 4

    got, out, _ = call(monkeypatch, capsys, *words, "--resume")
    assert got == 0
    assert "nothing to resume" in out


@pytest.mark.parametrize("stage", ["data", "model", "predict"])
def test_a_stage_that_was_stopped_half_way_is_made_again(tmp_path, monkeypatch, capsys, stage):
    import coordexp.experiment as module

    run_dir, experiment = tmp_path / "run", _experiment(tmp_path)
    words = ["run", experiment, "--output-dir", run_dir, *_sets(*SMALL, "train.max_steps=1")]
    real = getattr(module._Chain, stage)

    def half(self):
        real(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module._Chain, stage, half)
    assert call(monkeypatch, capsys, *words)[0] == 143
    assert read_manifest(run_dir)["stage"] == stage
    monkeypatch.setattr(module._Chain, stage, real)
    got, out, err = call(monkeypatch, capsys, *words, "--resume")
    assert (got, err) == (0, "")
    assert f"] {stage}\n" in out
    assert read_manifest(run_dir)["status"] == "complete"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume", "--set", "train.max_steps=1"], "no run to resume"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--set", "train.save_best=crps"], "did you mean coord_dist/crps"),
        (["--set", "train.save_best=probe/f1_50"], "train.probe_steps to 100"),
        (["--set", "train.on_nonfinite=ignore"], "train.on_nonfinite: expected"),
        (["--set", "train.probe_steps=0"], "train.probe_steps: expected at least 1"),
    ],
)
def test_what_cannot_work_is_one_line_at_the_start_and_writes_nothing(tmp_path, monkeypatch, capsys, words, message):
    experiment = _experiment(tmp_path)
    code, _, err = call(monkeypatch, capsys, "train", experiment, "--output-dir", tmp_path / "run", *words)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not (tmp_path / "run").exists()
