"""The ``train`` section: every field of ``TrainingArguments`` is taken or refused by name; what cannot work is one line at the start."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from command import call
from coordexp.config.load import dump_config, load_config
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.train import arguments, launch, refused
from coordexp.train.options import BY_METRIC, OPTIMIZERS, OWN, REFUSED_OPTIMIZERS, REPORTERS, Scheduler, TrainOptions
from tiny import fresh_model, records, template, workspace

# Where the default is not that of transformers; None there is chosen by transformers for the machine or by the strategy.
OTHER_DEFAULTS = {
    "num_train_epochs", "max_steps", "per_device_eval_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "adam_beta2", "gradient_checkpointing", "logging_steps", "report_to", "eval_strategy", "eval_steps", "save_steps", "save_total_limit",
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory", "ddp_find_unused_parameters",
}  # fmt: skip


def test_every_field_of_the_installed_class_is_taken_under_its_name_or_refused_with_a_reason():
    """A new version of transformers cannot add one silently."""
    theirs = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    taken = {item.name: item.default for item in dataclasses.fields(TrainOptions) if item.name not in OWN}
    assert theirs.keys() == refused.REFUSED.keys() | taken.keys()
    assert not refused.why_refused().keys() & (taken.keys() | OWN)
    assert {name for name in taken if taken[name] != theirs[name]} == OTHER_DEFAULTS
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    assert refused.written_into(page) == page, "run: python -m coordexp.train.refused docs/training.md"


def test_every_optimizer_schedule_and_logger_of_the_installed_version_is_known():
    names = {item.value for item in OptimizerNames}
    assert {name for name in names if not name.startswith(tuple(REFUSED_OPTIMIZERS))} == OPTIMIZERS.keys()
    assert set(Scheduler.__args__) == {item.value for item in SchedulerType}
    assert REPORTERS.keys() == INTEGRATION_TO_CALLBACK.keys()


def _load(tmp_path, *sets):
    path = tmp_path / "x.yaml"
    path.write_text("data: {kind: synth}\ntrain: {max_steps: 5}\n")
    return load_config(path, list(sets))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.tf32=yes", "train.tf32: expected true or false, got 'yes'"),
        ("train.ddp_static_graph=1", "train.ddp_static_graph: expected true or false, got 1"),
        ("train.warmup_steps=soon", "train.warmup_steps: expected a number, got 'soon'"),
        ("train.eval_steps=0", "train.eval_steps: expected a number of steps from 1, or a share of all steps below 1, got 0"),
        ("train.eval_steps=1.5", "train.eval_steps: expected a number of steps from 1, or a share of all steps below 1, got 1.5"),
        ("train.logging_strategy=no", "train.logging_strategy: expected 'steps' or 'epoch', got 'no'"),
        ("train.lr_scheduler_kwargs=5", "train.lr_scheduler_kwargs: expected a mapping of keys, got 5"),
        ("train.num_train_epochs=2", "train.num_train_epochs: train: expected one of num_train_epochs and max_steps, got both: set"),
        ("train.optim=adamw_tourch", "train.optim: adamw_tourch: did you mean adamw_torch?"),
        ("train.optim=galore_adamw_layerwise", "train.optim: galore_adamw_layerwise: refused: it makes parameter groups of its own"),
        ("train.optim=schedule_free_sgd", "train.optim: schedule_free_sgd: refused: it evaluates and saves other weights"),
        ("train.report_to=wandbb", "train.report_to: wandbb: did you mean wandb?"),
        ("train.report_to=[tensorboard, all]", "train.report_to: all: expected one of tensorboard, wandb"),
        ("train.patience=2", "train.patience: 2 follows a metric: name it in train.save_best"),
        ("train.lr_scheduler_type=greedy", "train.lr_scheduler_type: greedy follows a metric: name it in train.save_best"),
        ("train.save_strategy=best", "train.save_strategy: best needs a metric: name it in train.save_best"),
        ("train={max_steps: 1, save_best: loss, eval_strategy: 'no'}", "train.eval_strategy: no is not possible with train.save_best"),
        ("train.gradient_checkpointing_kwargs={use_reentrant: true}", "train.gradient_checkpointing_kwargs: use_reentrant=true leaves an"),
        ("train.save_bst=loss", "train.save_bst: unknown key: did you mean train.save_best?"),
        *((f"train.{old}=1", f"train.{old}: is train.{new} now") for old, new in refused.RENAMED.items()),
        *((f"train.{other}=1", f"train.{other}: is train.{new} here") for other, new in refused.ELSEWHERE.items()),
        ("train.warmup_steps=2.5", "train.warmup_steps: expected a number of steps from 1, or a share of all steps below 1, got 2.5"),
        ("data.prompt='Locate {phras}.'", "data.prompt: {phras} is no field of it: expected {phrase}"),
        ("objective={text_ce: 0, soft_ce: 0, gate: 0}", "objective: expected a term with a weight, got 0 for all of them"),
        *((f"train.{key}=1", f"train.{key}: refused: {reason}") for key, reason in refused.REFUSED.items()),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(override, problem, tmp_path):
    with pytest.raises(ConfigError) as error:
        _load(tmp_path, override)
    (line,) = error.value.problems
    assert line.removeprefix("--set ").removeprefix("train: ").startswith(problem)


def test_every_kind_of_value_survives_the_resolved_form_and_reaches_transformers(tmp_path):
    sets = [
        "train.max_steps=null", "train.num_train_epochs=2.5", "train.optim=adafactor", "train.lr_scheduler_type=cosine_with_min_lr",
        "train.lr_scheduler_kwargs={min_lr_rate: 0.1}", "train.warmup_steps=0.05", "train.eval_steps=0.25", "train.report_to=none",
        "train.gradient_checkpointing=true", "train.deepspeed=null", "train.ddp_bucket_cap_mb=60", "train.run_name=2026-11-25",
        "train.trackio_static_space_id=false", "train.dataloader_num_workers=2", "train.dataloader_prefetch_factor=3",
    ]  # fmt: skip
    config = _load(tmp_path, *sets)
    (tmp_path / "again.yaml").write_text(dump_config(dataclasses.replace(config, name="again")))
    again = load_config(tmp_path / "again.yaml")
    assert again.train == config.train
    args = arguments.training_arguments(again.train, tmp_path, seed=3)
    for name in ("num_train_epochs", "warmup_steps", "eval_steps", "ddp_bucket_cap_mb", "run_name", "dataloader_prefetch_factor"):
        assert getattr(args, name) == getattr(config.train, name)
    assert (args.max_steps, args.report_to, args.seed, args.data_seed, args.optim, args.dataloader_persistent_workers) == (
        -1, [], 3, 3, OptimizerNames.ADAFACTOR, True,
    )  # fmt: skip
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert config.train.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_workers_are_chosen_for_the_machine_and_can_be_set(monkeypatch):
    monkeypatch.setattr(arguments.os, "cpu_count", lambda: 16)
    assert arguments.loading(TrainOptions(), gpu=False)["dataloader_num_workers"] == 0
    found = arguments.loading(TrainOptions(), gpu=True)
    assert found == {"dataloader_num_workers": 4, "dataloader_persistent_workers": True, "dataloader_pin_memory": True}
    for processes, count in ((8, 2), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert arguments.loading(TrainOptions(), gpu=True)["dataloader_num_workers"] == count
    assert arguments.loading(TrainOptions(dataloader_num_workers=7), gpu=True)["dataloader_num_workers"] == 7


def _run(tmp_path, monkeypatch, capsys, *sets):
    experiment = tmp_path / "small.yaml"
    experiment.write_text(
        f"data: {{kind: jsonl, source: {workspace() / 'data'}}}\nmodel: {{path: {workspace() / 'model'}}}\nvocab: {{extend: false}}\n"
    )
    words = [word for pair in sets for word in ("--set", pair)]
    return call(monkeypatch, capsys, "run", experiment, "--output-dir", tmp_path / "run", *words)


def test_every_missing_package_is_a_line_with_the_command_before_anything_is_written(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    gone = {"wandb", "comet_ml", "flash_attn", "bitsandbytes", "deepspeed", "liger_kernel"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else real(name, *rest))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    code, _, err = _run(
        tmp_path, monkeypatch, capsys, "train.report_to=[tensorboard, wandb, comet_ml]", "model.attn_implementation=flash_attention_2",
        "train.optim=paged_adamw_8bit", "train.max_steps=1", "model.quantization=int8", "adapter.kind=lora", "model.liger=true",
    )  # fmt: skip
    assert code == 2
    assert [line.removeprefix("error: ") for line in err.splitlines()] == [
        "train.optim: paged_adamw_8bit needs a package that is not installed: pip install bitsandbytes",
        "train.report_to: wandb needs a package that is not installed: pip install wandb",
        "train.report_to: comet_ml needs a package that is not installed: pip install comet-ml",
        "train.deepspeed: a DeepSpeed set-up needs a package that is not installed: pip install 'coordexp[deepspeed]'",
        "model.attn_implementation: flash_attention_2 needs a package that is not installed: pip install flash-attn --no-build-isolation",
        "model.quantization: int8 needs a package that is not installed: pip install 'coordexp[quantization]'",
        "model.liger: true needs a package that is not installed: pip install 'coordexp[liger]'",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="it shards here")
@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ([], "train: expected one of num_train_epochs and max_steps, got neither"),
        (["train.fsdp=true"], "train.fsdp: accelerate shards on accelerators only"),
        (["train.deepspeed={zero_optimization: {stage: 3}}"], "train.deepspeed: "),
        (["train.fsdp_config={cpu_ram_efficient_loading: true}"], "train.fsdp_config: with cpu_ram_efficient_loading the ranks"),
        (["train.tf32=true"], "train: --tf32 requires Ampere"),
        (["train.optim=sgd", "train.optim_args=momentum"], "train.optim: "),
        (["train.optim_args='betas=(0.9, 0.9'"], "train.optim: "),
        (["train.lr_scheduler_type=warmup_stable_decay"], "train.lr_scheduler_kwargs: "),
        (["train.lr_scheduler_kwargs={min_lr_rate: 0.1}"], "train.lr_scheduler_kwargs: "),
        (["model.quantization=int8"], "small.yaml: model.quantization: weights in int8 cannot be trained: set adapter.kind to lora"),
        (["model.quantization=nf4", "adapter.kind=lora"], "model.quantization: nf4 is trained on a GPU only"),
        (["model.quantization=int8", "adapter.kind=lora", "train.fsdp=true"], "model.quantization: every GPU holds the whole"),
        (["model.liger=true"], "model.liger: its kernels run on a GPU, and there is none here"),
        (["train.fsdp_config=none.json"], "train.fsdp_config: expected a mapping of keys or a JSON file, there is no file none.json"),
    ],
)
def test_what_transformers_would_refuse_later_is_one_line_before_anything_is_written(sets, problem, tmp_path, monkeypatch, capsys):
    if sets:
        sets = [*sets, "train.max_steps=1"]
    real = importlib.util.find_spec
    here = {"bitsandbytes", "liger_kernel"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: real("json") if name in here else real(name, *rest))
    code, _, err = _run(tmp_path, monkeypatch, capsys, *sets)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(("error: ", "error: --set ")), err
    assert problem.removeprefix("small.yaml: ") in err
    assert not (tmp_path / "run").exists()


def _train(run_dir, resume=False, probe=None, **options):
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(1)
    settings = {"per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-3, "report_to": (), "logging_steps": 1}
    launch.train(
        TrainOptions(**settings | options), objective=CoordObjective(), model=fresh_model(), template=template(),
        train_records=records()[:5], eval_records=records("val")[:2], run_dir=run_dir, processor_from=workspace() / "model", header={},
        seed=0, console=Console(quiet=True), resume=resume, probe=probe,
    )  # fmt: skip
    return [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]


ARGS = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr_rate": 0.1}, "polynomial": {"lr_end": 1e-5}}


@pytest.mark.parametrize(
    ("optim", "schedule"),
    [("adafactor", "polynomial"), ("sgd", "warmup_stable_decay"), ("adagrad", "reduce_lr_on_plateau"), ("rmsprop", "greedy")],
)
def test_other_optimizers_and_schedules_train_and_resume_to_the_same_weights(optim, schedule, tmp_path):
    options = {
        "max_steps": 4, "optim": optim, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": ARGS.get(schedule), "eval_steps": 1,
        "save_steps": 2, "save_total_limit": None, "save_best": "loss" if schedule in BY_METRIC else None,
    }  # fmt: skip
    rows = _train(tmp_path / "run", **options)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert all(map(math.isfinite, losses))
    weights = (tmp_path / "run/checkpoints/final/model.safetensors").read_bytes()
    assert weights != (workspace() / "model/model.safetensors").read_bytes()
    for name in ("final", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run/checkpoints" / name, ignore_errors=True)
    _train(tmp_path / "run", resume=True, **options)
    assert (tmp_path / "run/checkpoints/final/model.safetensors").read_bytes() == weights


def test_training_ends_when_patience_is_used_up_and_does_not_go_on_when_resumed(tmp_path, monkeypatch):
    options = {"num_train_epochs": 9, "eval_steps": 1, "save_steps": 100, "learning_rate": 0.5, "patience": 2}
    options["save_best"] = "eval_coord_dist/crps"
    rows = _train(tmp_path / "run", **options)
    scores = [row["eval_coord_dist/crps"] for row in rows if "eval_loss" in row]
    best = scores.index(min(scores))
    # An independent count: it stopped at the first evaluation that is the second one in a row without a new minimum.
    waits = [n - max(i for i in range(n + 1) if scores[i] == min(scores[: i + 1])) for n in range(len(scores))]
    assert waits[-1] == 2
    assert 2 not in waits[:-1]
    assert len(scores) < 27
    state = json.loads((tmp_path / f"run/checkpoints/checkpoint-{len(scores)}/trainer_state.json").read_text())
    assert state["best_global_step"] == best + 1
    final = tmp_path / "run/checkpoints/final"
    weights = (final / "model.safetensors").read_bytes()
    shutil.rmtree(final)
    monkeypatch.setattr(launch.CoordTrainer, "train", lambda *args, **kwargs: pytest.fail("went on"))
    _train(tmp_path / "run", resume=True, **options)
    assert (final / "model.safetensors").read_bytes() == weights


def test_the_probe_runs_at_the_last_step_so_that_the_last_evaluation_has_its_value(tmp_path):
    values = iter([0.1, 0.3])
    options = {"max_steps": 3, "eval_steps": 2, "save_steps": 100, "probe_steps": 2, "skip_memory_metrics": False}
    options["save_best"] = "probe/f1_50"

    def probe(model, **_):
        return {"probe/f1_50": next(values), "probe/objects_per_image": 1.0, "probe/parse_rate": 1.0}

    rows = _train(tmp_path / "run", probe=probe, **options)
    assert [(row["step"], row["probe/f1_50"]) for row in rows if "probe/f1_50" in row] == [(2, 0.1), (3, 0.3)]
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (3, 0.3)
    assert "train_mem_cpu_peaked_delta" in rows[-1]
    _train(tmp_path / "short", probe=lambda model, **_: {"probe/f1_50": 0.0, "probe/objects_per_image": 0.0, "probe/parse_rate": 0.0},
           **options | {"max_steps": 1})  # fmt: skip
