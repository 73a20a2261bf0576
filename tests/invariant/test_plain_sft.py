"""The plain-CE recipe is plain supervised fine-tuning: twenty steps against a loop written with torch alone."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from coordexp.data.dataset import RecordDataset
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.order import EpochSampler
from coordexp.train.trainer import CoordTrainer
from tiny import collator, fresh_model, records, template, vocab

STEPS, SIZE, ACCUMULATE, COUNT = 20, 2, 2, 11


def _optimizer(kind, model):
    # AdamW turns rounding on zero gradients into full steps, so its weights are not compared.
    return torch.optim.SGD(model.parameters(), lr=0.02) if kind == "sgd" else torch.optim.AdamW(model.parameters(), lr=1e-3)


def _ours(tmp_path, kind):
    losses = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    options = TrainOptions(
        max_steps=STEPS, per_device_train_batch_size=SIZE, gradient_accumulation_steps=ACCUMULATE, max_grad_norm=1e9, warmup_steps=0,
        lr_scheduler_type="constant_with_warmup", logging_steps=1, eval_steps=1000, save_steps=1000, report_to=(),
    )  # fmt: skip
    model = fresh_model()
    optimizer = _optimizer(kind, model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = CoordTrainer(
        model=model, objective=CoordObjective.plain_ce(), vocab=vocab(), args=training_arguments(options, tmp_path, seed=3),
        train_dataset=RecordDataset(records()[:COUNT], template()), eval_dataset=RecordDataset(records("val"), template()),
        data_collator=collator(), callbacks=[Log()], optimizers=(optimizer, constant),
    )  # fmt: skip
    trainer.args.save_strategy = "no"
    trainer.train()
    return model, losses


def _plain(kind):
    """Samples in the run's order; each step is one batch of its whole window, mean cross-entropy over its supervised tokens."""
    model = fresh_model().train()
    optimizer = _optimizer(kind, model)
    sampler, losses, window = EpochSampler(COUNT, seed=3), [], SIZE * ACCUMULATE
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, COUNT, window):
            if len(losses) == STEPS:
                return model, losses
            batch = collator()([template().encode(records()[i]) for i in order[start : start + window]])
            names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
            logits = model(**{k: batch[k] for k in names}).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].labels.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    raise AssertionError("too few steps")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_twenty_steps_of_the_plain_recipe_are_those_of_a_plain_loop(tmp_path, kind):
    model, losses = _ours(tmp_path, kind)
    reference, expected = _plain(kind)
    assert losses == pytest.approx(expected, rel=1e-5)
    # Something was learned, or the comparison would say little.
    assert expected[-1] < expected[0] - 0.05
    if kind == "sgd":
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (ours - theirs).abs().max() <= 1e-6, name
            assert (ours - theirs).abs().mean() <= 1e-7, name
