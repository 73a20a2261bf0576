"""Checkpoints are whole or not there, and every hook of transformers that this relies on is still what it was."""

from __future__ import annotations

import inspect
import os
import pickletools
import zipfile

import pytest
from transformers import Trainer, TrainerCallback, trainer_callback

from coordexp.errors import ConfigError
from coordexp.train import checkpoint as module
from coordexp.train.checkpoint import ResumableTrainer, check_identity, checkpoints, publish, remove_partial, rotate
from coordexp.train.trainer import CoordTrainer
from tiny import workspace

# method -> parameters we rely on, by name
HOOKS = {
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_get_output_dir": ["self", "trial"],
    "_determine_best_metric": ["self", "metrics", "trial"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_get_train_sampler": ["self", "train_dataset"],
    "_get_eval_sampler": ["self", "eval_dataset"],
    "_save": ["self", "output_dir", "state_dict"],
    "save_model": ["self", "output_dir", "_internal_call"],
    "store_flos": ["self"],
    "log": ["self", "logs", "start_time"],
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_hook_exists_with_its_parameters(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[: len(HOOKS[name])] == HOOKS[name]


def _source(name):
    return inspect.getsource(getattr(Trainer, name))


def test_trainer_calls_the_hooks_where_the_continuation_needs_them():
    loop, epoch, after = _source("_inner_training_loop"), _source("_run_epoch"), _source("_maybe_log_save_evaluate")
    assert "self._run_epoch(\n                model=model,\n                epoch=epoch," in loop
    # Our epoch is set before the batches are drawn; the random state is loaded after the first ones, or before where none are skipped.
    assert epoch.index("self._load_rng_state(resume_from_checkpoint)") < epoch.index("iter(train_dataloader)")
    assert epoch.rindex("self._load_rng_state") > epoch.index("self.get_batch_samples(")
    # Agreement of the ranks comes after the last backward and before the optimizer.
    order = [
        epoch.index(part) for part in ("self.training_step(", "self._get_grad_norm(", "self.optimizer.step()", "_maybe_log_save_evaluate(")
    ]
    assert order == sorted(order)
    # What is logged and evaluated at a step is in its checkpoint.
    order = [after.index(part) for part in ("self.log(", "self._evaluate(", "self._determine_best_metric(", "self._save_checkpoint(")]
    assert order == sorted(order)
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in _source("_prepare_for_training")


def test_trainer_reads_pickled_state_as_plain_data_only():
    for name in ("_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler"):
        text = _source(name)
        assert text.count("torch.load(") == text.count("weights_only=True")


def test_callbacks_that_carry_state_are_known_by_the_class_we_ask_for():
    assert issubclass(trainer_callback.TrainerControl, trainer_callback.ExportableState)
    assert "control.should_log = False" in inspect.getsource(trainer_callback.CallbackHandler.on_log)
    assert issubclass(CoordTrainer, ResumableTrainer)
    assert hasattr(TrainerCallback, "on_step_end")


def _make(folder, *steps):
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")


def test_checkpoints_are_in_order_of_step_and_unfinished_ones_are_none(tmp_path):
    _make(tmp_path, 9, 10, 100)
    for name in ("checkpoint-200.tmp", "checkpoint-5.old.tmp", "final", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-9", "checkpoint-x", "final"]
    assert checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (1, 1, [1, 4]), (1, 4, [4]), (3, 3, [2, 3, 4]), (9, 1, [1, 2, 3, 4])],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, keep, left):
    _make(tmp_path, 1, 2, 3, 4)
    rotate(tmp_path, limit=limit, keep=keep)
    assert [int(path.name[11:]) for path in checkpoints(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_save_that_breaks_leaves_the_older_checkpoint_and_no_new_one(tmp_path, monkeypatch, broken):
    _make(tmp_path, 1)
    staging = tmp_path / "checkpoint-2.tmp"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"half")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        publish(staging, tmp_path / "checkpoint-2")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]


def test_everything_is_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    staging = tmp_path / "checkpoint-2.tmp"
    (staging / "sub").mkdir(parents=True)
    (staging / "a").write_text("a")
    (staging / "sub" / "b").write_text("b")
    seen = []
    real_fsync, real_replace = module._fsync, os.replace
    monkeypatch.setattr(module, "_fsync", lambda path: (seen.append(path.name), real_fsync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("renamed"), real_replace(a, b)))
    publish(staging, tmp_path / "checkpoint-2")
    cut = seen.index("renamed")
    assert set(seen[:cut]) == {"a", "b", "sub", "checkpoint-2.tmp"}
    assert seen[cut + 1 :] == [tmp_path.name]


def test_another_number_of_processes_or_a_foreign_folder_is_refused(tmp_path):
    _make(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"checkpoint-3: not a checkpoint of coordexp \(resume.json missing\)"):
        check_identity(tmp_path / "checkpoint-3", {"processes": 1})
    (tmp_path / "checkpoint-3" / "resume.json").write_text('{"processes": 2, "data": "x"}')
    check_identity(tmp_path / "checkpoint-3", {"processes": 2, "data": "x"})
    with pytest.raises(ConfigError, match=r"processes: made with 2, this start has 1"):
        check_identity(tmp_path / "checkpoint-3", {"processes": 1, "data": "x"})


def test_a_checkpoint_holds_no_pickle_that_names_code_of_ours_or_of_transformers(tmp_path):
    from test_train_callbacks import _launch

    final = _launch(tmp_path / "run", max_steps=1, eval_steps=1, save_steps=1, logging_steps=1)
    folder = final.with_name("checkpoint-1")
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in names
    assert not {"training_args.bin", "pytorch_model.bin"} & names
    assert not (final / "training_args.bin").exists()
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        with zipfile.ZipFile(path) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            code = [str(arg) for op, arg, _ in pickletools.genops(archive.read(member)) if op.name == "GLOBAL"]
        assert all(name.split(" ")[0].split(".")[0] in {"torch", "collections", "numpy", "_codecs"} for name in code), (path.name, code)
    assert (folder / "preprocessor_config.json").read_text() == (workspace() / "model" / "preprocessor_config.json").read_text()
