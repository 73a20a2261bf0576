"""Non-finite steps, the generation probe, the best checkpoint, throughput: what training does beside training."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from coordexp.data.dataset import RecordDataset
from coordexp.decode.options import DecodeOptions
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.predicting import probe
from coordexp.train import launch
from coordexp.train.best import PROBE_KEYS, check_best, rankable
from coordexp.train.checkpoint import checkpoints
from coordexp.train.launch import training_arguments
from coordexp.train.nonfinite import NonFiniteError
from coordexp.train.options import TrainOptions
from coordexp.train.speed import KEYS, SpeedMeter
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.options import AdapterOptions
from tiny import collator, fresh_model, records, template, vocab, workspace


class _Rows(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({"step": state.global_step, **logs})


class _Poison(CoordTrainer):
    """NaN in the micro-batch that holds one sample: in its pixels and so in every hidden state, in its loss, or in a gradient alone."""

    victim = None
    where = "loss"

    def run_batch(self, model, inputs, normalizer):
        struck = model.training and self.victim in inputs["targets"].image_ids
        if struck and self.where == "pixels":
            inputs = {**inputs, "pixel_values": inputs["pixel_values"] * math.nan}
        output = super().run_batch(model, inputs, normalizer)
        if struck and self.where == "gradient":
            output.loss.register_hook(lambda g: g * math.nan)
        elif struck and self.where == "loss":
            object.__setattr__(output, "loss", output.loss * math.nan)
        return output


def _trainer(folder, *, kind=CoordTrainer, callbacks=(), steps=3, accumulate=2, optimizers=None, **kwargs):
    options = TrainOptions(
        max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, warmup_steps=0, logging_steps=1,
        eval_steps=1000, save_steps=1000, report_to=(),
    )  # fmt: skip
    return kind(
        model=fresh_model(), objective=CoordObjective(), vocab=vocab(), args=training_arguments(options, folder / "out", seed=0),
        train_dataset=RecordDataset(records()[:12], template()), eval_dataset=RecordDataset(records("val"), template()),
        data_collator=collator(), callbacks=list(callbacks), **kwargs,
    )  # fmt: skip


def _second_step_victim(trainer):
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    return trainer.train_dataset.records[order[6]].image_id, [trainer.train_dataset.records[i].image_id for i in order]


@pytest.mark.parametrize("where", ["pixels", "loss", "gradient"])
def test_stop_names_the_samples_and_leaves_the_weights_of_the_step_before(tmp_path, where):
    after_one = _trainer(tmp_path, steps=3)
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            kept.setdefault(state.global_step, {k: v.clone() for k, v in model.state_dict().items()})

    after_one.add_callback(Keep())
    after_one.train()
    trainer = _trainer(tmp_path, kind=_Poison, nonfinite_path=tmp_path / "nonfinite.jsonl")
    trainer.victim, order = _second_step_victim(trainer)
    trainer.where = where
    with pytest.raises(NonFiniteError, match=r"is nan at step 2 .*nonfinite\.jsonl.*on_nonfinite=skip"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, kept[1][name]), name
    (row,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    # The micro-batch at fault, or the whole step where no loss gives it away.
    assert row["samples"] == (order[4:8] if where == "gradient" else order[6:8])
    assert (row["step"], row["skipped"], len(row["losses"])) == (2, False, 2)


@pytest.mark.parametrize("where", ["pixels", "loss"])
def test_skip_leaves_the_step_out_of_weights_optimizer_and_metrics_and_counts_it(tmp_path, where):
    watch = _Rows()
    trainer = _trainer(tmp_path, kind=_Poison, on_nonfinite="skip", nonfinite_path=tmp_path / "n.jsonl", callbacks=[watch])
    trainer.where = where
    trainer.victim, _ = _second_step_victim(trainer)
    before = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            before[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}

    trainer.add_callback(Keep())
    trainer.train()
    assert all(torch.equal(before[1][name], before[2][name]) for name in before[1])
    assert not all(torch.equal(before[2][name], before[3][name]) for name in before[2])
    moments = trainer.optimizer.state_dict()["state"][0]
    assert moments["step"] == 2
    rows = [row for row in watch.rows if "accum/grad_steps" in row]
    assert [row["accum/skipped_steps"] for row in rows] == [0, 1, 1]
    assert "loss" not in rows[1]
    assert math.isfinite(rows[2]["loss"])
    assert json.loads((tmp_path / "n.jsonl").read_text())["skipped"] is True


def _launch(run_dir, adapter=None, **options):
    run_dir.mkdir()
    decode = DecodeOptions(max_new_tokens=8, batch_size=2)
    return launch.train(
        TrainOptions(per_device_train_batch_size=2, warmup_steps=0, report_to=(), **options), objective=CoordObjective(),
        model=fresh_model(), template=template(), train_records=records()[:8], eval_records=records("val"), run_dir=run_dir,
        processor_from=workspace() / "model", header={}, seed=0, console=Console(quiet=True),
        probe=partial(probe, template=template(), records=list(records("val")[:3]), options=decode), adapter=adapter,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:The PEFT config's")
@pytest.mark.parametrize("kind", ["none", "lora"])
def test_a_probed_run_logs_its_values_beside_the_steps_own_row_and_trains_like_one_without(tmp_path, kind):
    schedule = {"max_steps": 4, "logging_steps": 2, "eval_steps": 4, "save_steps": 4, "adapter": AdapterOptions(kind=kind)}
    probed = _launch(tmp_path / "a", probe_steps=2, probe_samples=3, **schedule)
    plain = _launch(tmp_path / "b", **schedule)
    weights = "model.safetensors" if kind == "none" else "adapter_model.safetensors"
    assert (probed / weights).read_bytes() == (plain / weights).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a" / "logging.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "probe/f1_50" in row] == [2, 4]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]
    # A model that writes boxes has no accuracy of points.
    assert all(set(PROBE_KEYS) - {"probe/point_acc"} <= row.keys() for row in rows if "probe/f1_50" in row)
    assert "probe" not in (tmp_path / "b" / "logging.jsonl").read_text()


def test_the_probe_scores_perfect_and_doubled_answers_as_such(monkeypatch):
    """Answers are put in the model's mouth: the truth, and the truth said twice."""
    from coordexp.decode.generate import Generated, Generator
    from coordexp.grammar import render

    chosen, start = list(records("val")[:3]), vocab().start

    def answers(double):
        def generate(_, prompts, **__):
            found = []
            for record in chosen[generate.done : generate.done + len(prompts)]:
                instances = template().instances(record)[0] * (2 if double else 1)
                ids = template().tokenizer(render(instances).text, add_special_tokens=False)["input_ids"]
                bins = [i - start for i in ids if start <= i < start + 1000]
                logits = torch.full((len(bins), 1000), -1e4).scatter_(1, torch.tensor(bins).view(-1, 1), 0.0)
                found.append(Generated(ids, logits, truncated=False, log_probs=[0.0] * len(ids)))
            generate.done += len(prompts)
            return found

        generate.done = 0
        return generate

    true = sum(len(r.objects) for r in chosen)
    for double, f1, share in ((False, 1.0, 0.0), (True, 2 / 3, 0.5)):
        monkeypatch.setattr(Generator, "__call__", answers(double))
        values = probe(None, template(), chosen, DecodeOptions(batch_size=2))
        assert values["probe/parse_rate"] == 1.0
        assert values["probe/f1_50"] == pytest.approx(f1)
        assert values["probe/duplicate_rate"] == pytest.approx(share)
        assert values["probe/objects_per_image"] == pytest.approx((1 + double) * true / 3)


def test_the_best_checkpoint_outlives_the_newer_ones(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 1.5, 4.0])
    real = CoordTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        return {**real(self, *args, **kwargs), "eval_coord_dist/crps": next(values)}

    monkeypatch.setattr(CoordTrainer, "evaluate", evaluate)
    _launch(
        tmp_path / "run", max_steps=5, eval_steps=1, save_steps=2, save_total_limit=1, logging_steps=5, save_best="coord_dist/crps"
    )  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-2", "checkpoint-5"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text())
    assert (state["best_metric"], state["best_global_step"]) == (1.0, 2)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("crps", "did you mean coord_dist/crps"),
        ("eval_coord_dist/crsp", "did you mean coord_dist/crps"),
        ("probe/f1", "did you mean probe/f1_50"),
        ("coord_dist/entropy", "can rank"),
        ("base_ce/noncoord_tokens", "can rank"),
        ("probe/f1_50", "train.probe_steps to 100"),
    ],
)
def test_a_metric_that_cannot_rank_is_refused_with_the_nearest_that_can(key, message):
    with pytest.raises(ConfigError, match=f"train.save_best: .*{message}"):
        check_best(TrainOptions(save_best=key))


def test_every_rankable_metric_is_one_that_an_evaluation_or_the_probe_gives(tmp_path):
    metrics = _trainer(tmp_path).evaluate()
    assert {f"eval_{key}" for key in rankable()} <= metrics.keys() | {f"eval_{key}" for key in PROBE_KEYS}
    assert check_best(TrainOptions(save_best="eval_coord_dist/crps")) is False
    assert check_best(TrainOptions(save_best="token_acc")) is True


def test_throughput_counts_real_tokens_and_the_loss_share_is_a_share(tmp_path):
    watch = _Rows()
    trainer = _trainer(tmp_path, callbacks=[watch], steps=3)
    trainer.speed = SpeedMeter(trainer.model.get_output_embeddings(), cuda=False)
    trainer.train()
    rows = [row for row in watch.rows if "loss" in row]
    examples = [template().encode(r) for r in records()[:12]]
    tokens = sum(len(e.input_ids) for e in examples)
    supervised = sum(role > 0 for e in examples for role in e.roles)
    # Rates of one window have one clock, so their ratios are exact.
    seconds = [row["pack/num_samples"] / row["speed/samples_per_s"] for row in rows]
    assert sum(s * row["speed/tokens_per_s"] for s, row in zip(seconds, rows, strict=True)) == pytest.approx(tokens)
    assert sum(s * row["speed/supervised_tokens_per_s"] for s, row in zip(seconds, rows, strict=True)) == pytest.approx(supervised)
    assert all(set(KEYS) <= row.keys() and 0 < row["speed/loss_share"] < 1 for row in rows)
