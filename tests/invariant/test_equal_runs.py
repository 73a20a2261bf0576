"""Settings of speed and memory, and the ways to say how long, do not move a number: weights and log are equal bit for bit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from coordexp.data.options import PackingOptions
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.positions import backbone
from coordexp.train import launch
from coordexp.train.options import TrainOptions
from coordexp.vocab.options import AdapterOptions
from tiny import fresh_model, records, template, workspace

# Seven samples in windows of four: two steps an epoch, the second one ragged; evaluated after each.
OPTIONS = TrainOptions(
    num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=2, learning_rate=1e-2,
    warmup_steps=0, logging_steps=1, eval_steps=1, save_steps=100, report_to=(),
)  # fmt: skip
KINDS = {
    "full": {},
    "lora": {"adapter": AdapterOptions(kind="lora", dropout=0.2)},
    "packed": {"packing": PackingOptions(enabled=True, length=250)},
}


def _train(run_dir, options, *, resume=False, **kind):
    """The final weights, the log without clocks, and how often a layer ran in training."""
    run_dir.mkdir(exist_ok=True)
    torch.manual_seed(7)
    model, ran = fresh_model(), []
    layer = backbone(model).language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda module, args: ran.append(1) if module.training else None)
    final = launch.train(
        options, objective=CoordObjective(sigma=4.0), model=model, template=dataclasses.replace(template(), order="random"),
        train_records=records()[:7], eval_records=records("val")[:3], run_dir=run_dir, processor_from=workspace() / "model", header={},
        seed=3, console=Console(quiet=True), resume=resume, **kind,
    )  # fmt: skip
    rows = [json.loads(line) for line in (run_dir / "logging.jsonl").read_text().splitlines()]
    kept = [{key: repr(v) for key, v in row.items() if not key.startswith(("speed/", "train_"))} for row in rows]
    (weights,) = final.glob("*.safetensors")
    return load_file(weights), kept, len(ran)


def _same(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    for name in ours[0]:
        assert torch.equal(ours[0][name], theirs[0][name]), name
    assert ours[1] == theirs[1]


@lru_cache
def _plain(kind):
    """A run without workers and without gradient checkpointing: its folder, and what it ended with."""
    folder = Path(mkdtemp(prefix="coordexp-equal-")) / "run"
    return folder, _train(folder, OPTIONS, **KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        *((kind, {"gradient_checkpointing": True}) for kind in KINDS),
        *((kind, {"dataloader_num_workers": 2}) for kind in ("lora", "packed")),
        # Two epochs of ceil(ceil(samples or packs / 2) / 2) steps.
        ("full", {"num_train_epochs": None, "max_steps": 4}),
        ("packed", {"num_train_epochs": None, "max_steps": 2}),
    ],
)
def test_a_setting_that_is_not_of_the_recipe_moves_no_bit(kind, setting, tmp_path):
    ours = _train(tmp_path / "run", dataclasses.replace(OPTIONS, **setting), **KINDS[kind])
    _same(ours, _plain(kind)[1])
    # Each layer runs once more in the backward, or nothing was saved by it.
    assert ours[2] == _plain(kind)[1][2] * (2 if "gradient_checkpointing" in setting else 1)


def test_a_run_of_epochs_resumes_within_one_with_workers_and_checkpointing(tmp_path):
    """From the step before the last, in the middle of the second epoch; histograms are taken back too."""
    options = dataclasses.replace(OPTIONS, gradient_checkpointing=True, dataloader_num_workers=2, save_steps=3, save_total_limit=None)
    whole = _train(tmp_path / "run", options, **KINDS["lora"])
    _same(whole, _plain("lora")[1])
    histograms = (tmp_path / "run" / "histograms.jsonl").read_text()
    assert json.loads(histograms.splitlines()[-1])["step"] == 4
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    rest = _train(tmp_path / "run", options, resume=True, **KINDS["lora"])
    _same(rest, whole)
    assert rest[2] < whole[2]
    assert (tmp_path / "run" / "histograms.jsonl").read_text() == histograms
