"""A run that is stopped and resumed ends like the one that was not: weights, optimizer, log, bit for bit."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from coordexp.data.options import PackingOptions
from coordexp.errors import ConfigError, RunStopped
from coordexp.losses.objective import CoordObjective
from coordexp.runs.logs import read_log
from coordexp.train import launch
from coordexp.train.options import TrainOptions
from tiny import fresh_model, records, template, workspace

# Windows of 4 over 11 samples: three steps an epoch, the last one ragged. Rows are written every 3 steps, checkpoints every 4.
OPTIONS = TrainOptions(
    max_steps=11, per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=4, learning_rate=1e-3,
    warmup_steps=2, logging_steps=3, eval_steps=5, save_steps=4, save_total_limit=None, report_to=(),
)  # fmt: skip
PACKING = PackingOptions(enabled=True, length=250)


class _Stop(TrainerCallback):
    """Asks a run to stop while step ``step`` is made, as a signal would."""

    def __init__(self, request, step):
        self.request, self.step = request, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(self.request)


def _train(run_dir, options=OPTIONS, *, resume=False, stop_at=None, signum=signal.SIGTERM, packing=None, count=11, monkeypatch=None):
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(7)
    if stop_at is not None:
        real = launch.ProgressBar
        monkeypatch.setattr(launch, "ProgressBar", lambda console: _With(real(console), _Stop(signum, stop_at)))
    try:
        return launch.train(
            options, objective=CoordObjective(sigma=4.0, crps=0.1), model=fresh_model(),
            template=dataclasses.replace(template(), order="random"),
            train_records=records()[:count], eval_records=records("val")[:3], run_dir=run_dir, processor_from=workspace() / "model",
            header={"config_sha256": "x"}, seed=3, console=Console(quiet=True), packing=packing, resume=resume,
        )  # fmt: skip
    finally:
        if stop_at is not None:
            monkeypatch.undo()


class _With(TrainerCallback):
    """Two callbacks in the place of one."""

    def __init__(self, bar, stop):
        self.bar, self.on_step_begin = bar, stop.on_step_begin

    def close(self):
        self.bar.close()


def _weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _rows(run_dir):
    log = read_log(run_dir / "logging.jsonl")
    assert not log.notes
    return [{k: repr(v) for k, v in row.items() if not k.startswith("speed/")} for row in (*log.train, *log.eval)]


def _equal(run_dir, whole):
    ours, theirs = _weights(run_dir / "checkpoints" / "final"), _weights(whole / "checkpoints" / "final")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert _rows(run_dir) == _rows(whole)
    last = f"checkpoints/checkpoint-{OPTIONS.max_steps}"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (run_dir / last / name).read_bytes() == (whole / last / name).read_bytes(), name


@pytest.fixture(scope="module", params=[None, PACKING], ids=["plain", "packed"])
def whole(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    _train(run_dir, packing=request.param)
    return run_dir, request.param


@pytest.mark.parametrize("steps", [(3, 8), (11,)], ids=["ends of an epoch and within one", "last step"])
def test_a_run_stopped_and_resumed_ends_like_the_one_left_alone(whole, steps, tmp_path, monkeypatch):
    uninterrupted, packing = whole
    for number, step in enumerate(steps):
        with pytest.raises(RunStopped) as stopped:
            _train(tmp_path / "run", packing=packing, resume=number > 0, stop_at=step, monkeypatch=monkeypatch)
        assert stopped.value.signum == signal.SIGTERM
        assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}").is_dir()
        assert not (tmp_path / "run" / "checkpoints" / "final").exists()
    _train(tmp_path / "run", packing=packing, resume=True)
    _equal(tmp_path / "run", uninterrupted)


def test_an_older_checkpoint_gives_the_same_end_and_later_rows_are_taken_back(whole, tmp_path):
    import shutil

    uninterrupted, packing = whole
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    for name in ("final", "checkpoint-8", "checkpoint-11"):
        shutil.rmtree(run_dir / "checkpoints" / name)
    with (run_dir / "logging.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while writing
    # A save that was killed half-way is no checkpoint.
    shutil.copytree(run_dir / "checkpoints" / "checkpoint-4", run_dir / "checkpoints" / "checkpoint-8.tmp")
    (run_dir / "checkpoints" / "checkpoint-8.tmp" / "optimizer.pt").unlink()
    _train(run_dir, packing=packing, resume=True)
    _equal(run_dir, uninterrupted)
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_ctrl_c_is_told_from_sigterm(tmp_path, monkeypatch):
    with pytest.raises(RunStopped) as stopped:
        _train(tmp_path / "run", stop_at=2, signum=signal.SIGINT, monkeypatch=monkeypatch)
    assert stopped.value.signum == signal.SIGINT


def test_other_data_or_another_packing_plan_is_refused_before_training(whole, tmp_path):
    import shutil

    uninterrupted, packing = whole
    shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"packing plan was|checkpoint-11: data"):
        _train(tmp_path / "run", packing=packing, resume=True, count=10)


def test_grouping_by_length_resumes_in_a_later_epoch(tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, train_sampling_strategy="group_by_length")
    _train(tmp_path / "whole", options)
    with pytest.raises(RunStopped):
        _train(tmp_path / "run", options, stop_at=7, monkeypatch=monkeypatch)
    _train(tmp_path / "run", options, resume=True)
    _equal(tmp_path / "run", tmp_path / "whole")
