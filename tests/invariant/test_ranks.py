"""Two processes give what one gives: loss, gradient, every logged value; also with a rank that has no coordinates, and on a ragged end."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coordexp.data.dataset import RecordDataset
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.order import EpochSampler
from coordexp.train.trainer import CoordTrainer
from tiny import Watch, collator, fitted_folder, fresh_model, records, template, vocab, workspace

OBJECTIVE = CoordObjective(sigma=4.0, ce=0.3, w1=0.05, crps=0.1, text_gate=0.2, entropy=0.05, variance=1e-4)


class _Watch(Watch):
    def __init__(self):
        super().__init__()
        self.stop_signal = None

    def on_step_begin(self, args, state, control, **kwargs):
        if self.stop_signal is not None and args.process_index == 1:
            self.stop_signal.signum = signal.SIGTERM


def make_trainer(folder, samples, *, size, accumulate):
    options = TrainOptions(
        num_train_epochs=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, per_device_eval_batch_size=4,
        max_grad_norm=1e9, warmup_steps=0, logging_steps=1, eval_steps=2, save_steps=2, report_to=(),
    )  # fmt: skip
    watch = _Watch()
    trainer = CoordTrainer(
        model=fresh_model(), objective=OBJECTIVE, vocab=vocab(), args=training_arguments(options, folder, seed=0),
        train_dataset=RecordDataset(samples, template()), eval_dataset=RecordDataset(records("val"), template()),
        data_collator=collator(), callbacks=[watch],
    )  # fmt: skip
    return trainer, watch


def mixed_records():
    """Eight samples; those of the second rank's first micro-batch have no object, so no coordinate."""
    empty = list(EpochSampler(8, seed=0))[2:4]
    return [dataclasses.replace(r, objects=()) if i in empty else r for i, r in enumerate(records()[:8])]


def counted(batches):
    """Text and coordinate positions of batches, counted by hand."""
    labels = torch.cat([batch["targets"].labels.flatten() for batch in batches])
    coord = ((labels >= vocab().start) & (labels < vocab().start + 1000)).sum()
    return (labels >= 0).sum() - coord, coord


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    fitted_folder()  # two processes would write it at once
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", here / "plain_ranks.py"]
    done = subprocess.run(
        [*command, workspace(), out],
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "rank0.pt")


def _compare(seen, trainer, watch):
    gradient, logs, _ = seen
    assert (gradient - watch.gradient).norm() <= 1e-5 * watch.gradient.norm()
    assert (gradient - watch.gradient).abs().mean() <= 1e-5 * watch.gradient.abs().mean()
    got = [row for row in logs if "train_runtime" not in row]
    expected = [row for row in watch.logs if "train_runtime" not in row]
    for a, b in zip(got, expected, strict=False):
        assert a.keys() == b.keys()
        for key in a.keys() - {k for k in a if k.startswith(("accum/", "eval_accum/"))}:
            assert (math.isnan(a[key]) and math.isnan(b[key])) or a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
    return len(got)


def test_two_ranks_of_two_by_two_equal_one_process_with_all_eight_at_once(two_ranks, tmp_path):
    trainer, watch = make_trainer(tmp_path, mixed_records(), size=8, accumulate=1)
    trainer.train()
    # Two training rows and an evaluation of six samples, which two ranks of four a batch do not divide.
    assert _compare(two_ranks["mixed"], trainer, watch) == 3


def test_a_ragged_step_counts_no_sample_twice(two_ranks, tmp_path):
    trainer, watch = make_trainer(tmp_path, records()[:5], size=5, accumulate=1)
    trainer.train()
    assert _compare(two_ranks["ragged"], trainer, watch) >= 1
    assert two_ranks["ragged"][1][0]["pack/num_samples"] == 5


def test_a_signal_on_one_rank_stops_all_after_the_same_step(two_ranks):
    _, logs, stopped_by = two_ranks["ragged"]
    assert stopped_by == signal.SIGTERM
    assert [row["epoch"] for row in logs if "loss" in row] == [1.0]
    assert two_ranks["mixed"][2] == 0


def test_one_rank_writes_the_model_and_each_its_own_random_state(two_ranks):
    names = [Path(name) for name in two_ranks["files"]]
    assert {name.parent.name for name in names} == {"checkpoint-2"}
    assert sum(name.suffix == ".safetensors" for name in names) == 1
    own = {"rng_state_0.pth", "rng_state_1.pth", "window_0.pt", "window_1.pt"}
    assert own <= {name.name for name in names}
    assert not [name for name in names if name.name == "training_args.bin"]


def test_a_sharded_model_has_the_gradient_of_one_process(two_ranks):
    sharded, whole = two_ranks["sharded"], two_ranks["whole"]
    assert (sharded - whole).norm() <= 1e-5 * whole.norm()


def test_ranks_that_share_the_images_of_the_probe_have_the_values_of_one(two_ranks):
    from plain_ranks import probe_values

    assert two_ranks["probe"] == probe_values()
    assert two_ranks["probe"]["probe/parse_rate"] > 0


def test_every_term_alone_has_the_gradient_of_one_process_under_both_normalisations(two_ranks):
    assert len(two_ranks["terms"]) == 18
    for name, (got, expected) in two_ranks["terms"].items():
        assert expected.norm() > 0, name
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name
