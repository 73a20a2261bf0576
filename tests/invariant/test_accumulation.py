"""Equivalent runs agree: however samples are split over micro-batches or evaluation batches."""

from __future__ import annotations

import math

import pytest
import torch

from coordexp.data.dataset import RecordDataset
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import training_arguments
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from tiny import Watch, collator, fresh_model, gradients, records, template, vocab

EVERYTHING = {"ce": 0.3, "w1": 0.05, "crps": 0.1, "text_gate": 0.2, "entropy": 0.05, "variance": 1e-4}


def _trainer(tmp_path, size, accumulate, objective, *, steps=1, eval_batch=4, count=8, watch=None):
    options = TrainOptions(
        max_steps=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        per_device_eval_batch_size=eval_batch,
        max_grad_norm=1e9,
        warmup_steps=0,
        logging_steps=1,
        eval_steps=1000,
        save_steps=1000,
        report_to=(),
    )
    return CoordTrainer(
        model=fresh_model(),
        objective=objective,
        vocab=vocab(),
        args=training_arguments(options, tmp_path / f"{size}x{accumulate}", seed=0),
        train_dataset=RecordDataset(records()[:count], template()),
        eval_dataset=RecordDataset(records("val"), template()),
        data_collator=collator(),
        callbacks=[] if watch is None else [watch],
    )


def _one_step(tmp_path, size, accumulate, objective, count=8):
    watch = Watch()
    _trainer(tmp_path, size, accumulate, objective, count=count, watch=watch).train()
    return watch.gradient, next(row for row in watch.logs if "loss" in row)


def _same_logs(a, b, rel=1e-5):
    assert a.keys() == b.keys()
    for key in a:
        if not key.startswith("accum/"):
            same = (math.isnan(a[key]) and math.isnan(b[key])) or a[key] == pytest.approx(b[key], rel=rel, abs=1e-6)
            assert same, (key, a[key], b[key])


@pytest.mark.parametrize("normalization", ["group", "token"])
def test_one_by_eight_equals_eight_by_one_in_gradient_loss_and_every_logged_value(tmp_path, normalization):
    objective = CoordObjective(normalization=normalization, sigma=4.0, **EVERYTHING)
    whole_gradient, whole_log = _one_step(tmp_path, 8, 1, objective)
    for size, accumulate in ((1, 8), (4, 2)):
        gradient, log = _one_step(tmp_path, size, accumulate, objective)
        assert (gradient - whole_gradient).norm() <= 1e-5 * whole_gradient.norm()
        _same_logs(log, whole_log)


def test_a_ragged_last_window_divides_by_its_own_counts(tmp_path):
    whole_gradient, whole_log = _one_step(tmp_path, 5, 1, CoordObjective(), count=5)
    gradient, log = _one_step(tmp_path, 2, 8, CoordObjective(), count=5)
    assert (gradient - whole_gradient).norm() <= 1e-5 * whole_gradient.norm()
    _same_logs(log, whole_log)
    assert log["accum/grad_steps"] == 8
    assert log["accum/current_grad_steps"] == 3


def test_logged_loss_is_the_sum_of_its_contributions_and_matches_a_direct_computation(tmp_path):
    objective = CoordObjective(sigma=3.0, crps=0.1)
    _, log = _one_step(tmp_path, 2, 4, objective)
    assert log["loss"] == pytest.approx(sum(v for k, v in log.items() if k.startswith("contrib/")), rel=1e-12)
    batch = collator()([template().encode(r) for r in records()[:8]])
    model = fresh_model()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        logits = model(**{k: batch[k] for k in names}).logits.double()
    labels = batch["targets"].labels
    coord = (labels >= vocab().start) & (labels < vocab().start + 1000)
    text = (labels >= 0) & ~coord
    z = logits[coord]
    q = torch.softmax(-0.5 * ((torch.arange(1000) - batch["targets"].centers[coord].double()[:, None]) / 3.0) ** 2, -1)
    log_p = z[:, vocab().start : vocab().start + 1000].log_softmax(-1)
    h = (torch.arange(1000) + 1 - batch["targets"].centers[coord].double()[:, None]).clamp(0, 1)
    expected = (
        torch.nn.functional.cross_entropy(logits[text], labels[text])
        - (q * log_p).sum(-1).mean()
        - z.log_softmax(-1)[:, vocab().start : vocab().start + 1000].exp().sum(-1).log().mean()
        + 0.1 * ((log_p.exp().cumsum(-1) - h) ** 2 + h * (1 - h)).sum(-1).mean()
    )
    assert log["loss"] == pytest.approx(expected.item(), rel=2e-6)


def test_eval_loss_and_metrics_do_not_depend_on_the_eval_batch_size(tmp_path):
    objective = CoordObjective(sigma=4.0, **EVERYTHING)
    results = [_trainer(tmp_path, 8, 1, objective, eval_batch=n).evaluate() for n in (1, 3, 8)]
    for other in results[1:]:
        _same_logs(other, results[0])


def test_training_loss_on_a_batch_equals_evaluation_loss_on_it(tmp_path):
    _, log = _one_step(tmp_path, 8, 1, CoordObjective())
    trainer = _trainer(tmp_path, 8, 1, CoordObjective())
    evaluated = trainer.evaluate(RecordDataset(records()[:8], template()))
    for key in ("loss", "coord_dist/crps", "token_acc", "coord_softce_w1/gate"):
        assert evaluated[f"eval_{key}"] == pytest.approx(log[key], rel=1e-6)


def test_plain_ce_recipe_trains_like_a_plain_torch_loop(tmp_path):
    """Three windows of 2 x 2 against token-mean cross-entropy written by hand, in gradient and logged loss."""
    watch = Watch()
    trainer = _trainer(tmp_path, 2, 2, CoordObjective.plain_ce(), watch=watch)
    sampler = list(iter(trainer.get_train_dataloader().batch_sampler))
    trainer.train()
    order = [i for batch in sampler[:2] for i in batch]
    batch = collator()([template().encode(records()[i]) for i in range(8) if i in order])
    model = fresh_model()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    logits = model(**{k: batch[k] for k in names}).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].labels.flatten(), ignore_index=-100)
    loss.backward()
    expected = gradients(model)
    got = watch.gradient
    # The order of the first window may differ between two iterations of a sampler: then this comparison is void.
    assert len(order) == 4
    assert watch.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(tmp_path):
    trainer = _trainer(tmp_path, 4, 1, CoordObjective())
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = math.nan
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"step 1 .*train-"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
