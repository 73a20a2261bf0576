"""Packed and unpacked training of the same samples agree in loss, gradient and every logged value, however packs are split."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordexp.data.dataset import RecordDataset
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from packs import pack_collator, packed
from tiny import Watch, collator, fresh_model, records, template, vocab, workspace

EVERYTHING = {"ce": 0.3, "w1": 0.05, "crps": 0.1, "text_gate": 0.2, "entropy": 0.05, "variance": 1e-4}
OBJECTIVE = CoordObjective(sigma=4.0, **EVERYTHING)


def make_trainer(tmp_path, train, objective, *, size=1, accumulate=1, steps=1, evaluation=None, eval_batch=4, single_row=False):
    options = TrainOptions(
        max_steps=steps, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, per_device_eval_batch_size=eval_batch,
        max_grad_norm=1e9, warmup_steps=0, logging_steps=1, eval_steps=1000, save_steps=1000, report_to=(),
    )  # fmt: skip
    model, watch = fresh_model(), Watch()
    trainer = CoordTrainer(
        model=model,
        objective=objective,
        vocab=vocab(),
        args=training_arguments(options, tmp_path / "out", seed=0),
        train_dataset=train,
        eval_dataset=train if evaluation is None else evaluation,
        data_collator=collator() if isinstance(train, RecordDataset) else pack_collator(model, single_row),
        callbacks=[watch],
    )
    return trainer, watch


def _same(a, b, rel=1e-5):
    assert a.keys() == b.keys()
    for key in a.keys() - {k for k in a if k.startswith("accum/")}:
        same = (math.isnan(a[key]) and math.isnan(b[key])) or a[key] == pytest.approx(b[key], rel=rel, abs=1e-6)
        assert same, (key, a[key], b[key])


def _step(*args, **kwargs):
    trainer, watch = make_trainer(*args, **kwargs)
    trainer.train()
    return watch.gradient, next(row for row in watch.logs if "loss" in row)


@pytest.mark.parametrize("normalization", ["group", "token"])
def test_packed_equals_unpacked_in_gradient_loss_and_every_logged_value_for_any_split(tmp_path, normalization):
    objective = CoordObjective(normalization=normalization, sigma=4.0, **EVERYTHING)
    chosen = records()[:10]
    gradient, log = _step(tmp_path, RecordDataset(chosen, template()), objective, size=10)
    assert log["pack/num_samples"] == 10
    # One pack a micro-batch; two with a ragged last one; all at once; ranks that would need fillers; one row for all.
    splits = [
        {"length": 250, "size": 1, "accumulate": 16},
        {"length": 250, "size": 2, "accumulate": 8},
        {"length": 2000, "size": 1, "accumulate": 1},
        {"length": 250, "size": 1, "accumulate": 16, "ranks": 8},
        {"length": 400, "size": 8, "accumulate": 1, "single_row": True},
    ]
    for split in splits:
        schedule = {name: split.pop(name) for name in ("length", "ranks") if name in split}
        data = packed(chosen, batch=split["size"], accumulate=split["accumulate"], **schedule)
        assert data.schedule.slots > len(data.schedule.plan.packs) or "ranks" not in schedule
        got, row = _step(tmp_path, data, objective, **split)
        assert (got - gradient).norm() <= 1e-5 * gradient.norm(), split
        assert (got - gradient).abs().mean() <= 1e-5 * gradient.abs().mean(), split
        _same(row, log)


def test_packed_evaluation_equals_unpacked_evaluation_for_any_batch_size(tmp_path):
    objective = CoordObjective(sigma=4.0, **EVERYTHING)
    plain = RecordDataset(records("val"), template())
    trainer, _ = make_trainer(tmp_path, RecordDataset(records(), template()), objective, evaluation=plain)
    expected = trainer.evaluate()
    for length, batch in ((150, 1), (250, 2), (2000, 8)):
        data = packed(records("val"), length=length, batch=batch, ranks=2, shuffle=False)
        trainer, _ = make_trainer(tmp_path, packed(records()), objective, evaluation=data, eval_batch=batch)
        _same(trainer.evaluate(), expected)


def test_an_epoch_takes_the_planned_steps_and_every_sample_once(tmp_path):
    data = packed(records(), length=250, batch=1, accumulate=2)
    steps = data.schedule.steps
    trainer, watch = make_trainer(tmp_path, data, CoordObjective(), accumulate=2, steps=2 * steps)
    seen = []
    run = trainer.run_batch

    def watched(model, inputs, normalizer):
        if model.training:
            seen.extend(inputs["targets"].image_ids)
        return run(model, inputs, normalizer)

    trainer.run_batch = watched
    trainer.train()
    rows = [row for row in watch.logs if "loss" in row]
    assert [row["epoch"] for row in rows][steps - 1 :: steps] == [1.0, 2.0]
    first, second = seen[: len(records())], seen[len(records()) :]
    assert sorted(first) == sorted(second) == sorted(r.image_id for r in records())
    assert first != second
    assert sum(row["pack/num_samples"] for row in rows) == 2 * len(records())


def test_two_processes_with_a_filler_equal_one_without(tmp_path):
    one = packed(records()[:10], batch=1, accumulate=16)
    held_out = packed(records("val"), batch=2, shuffle=False)
    trainer, watch = make_trainer(tmp_path, one, OBJECTIVE, accumulate=16, evaluation=held_out, eval_batch=2)
    trainer.train()
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *sys.path]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", here / "packed_ranks.py"]
    subprocess.run(
        [*command, workspace(), tmp_path],
        check=True,
        timeout=300,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    slots, gradient, logs = torch.load(tmp_path / "rank0.pt")
    assert slots == len(one) + 1
    assert (gradient - watch.gradient).norm() <= 1e-5 * watch.gradient.norm()
    compared = 0
    for row, expected in zip(logs, watch.logs, strict=True):
        if "train_runtime" not in row:
            _same(row, expected)
            compared += 1
    assert compared >= 2
