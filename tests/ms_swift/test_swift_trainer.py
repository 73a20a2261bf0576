"""The plugin's trainer against ``CoordTrainer`` on the same batches, and what it does with ms-swift's own data path. In one process."""

from __future__ import annotations

import importlib
import math
import os
import sys

import pytest
import torch

from coordexp.data.dataset import RecordDataset
from coordexp.errors import ConfigError
from coordexp.integrations.ms_swift import contract
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import training_arguments
from coordexp.train.nonfinite import NonFiniteError
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from sft import PLUGIN, arguments, environment
from tiny import Watch, collator, fresh_model, gradients, records, template, vocab, workspace

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
]

EVERYTHING = {"ce": 0.3, "w1": 0.05, "crps": 0.1, "text_gate": 0.2, "entropy": 0.05, "variance": 1e-4, "sigma": 4.0, "temperature": 0.8}
# What CoordTrainer's batches hold; the model makes its own positions from them.
OURS = (
    "input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "targets",
)  # fmt: skip


@pytest.fixture
def build(tmp_path, monkeypatch):
    """``build(objective, **arguments)``: the trainer that ``swift sft`` would train with."""

    def made(objective=None, **changes):
        for name, value in environment(objective, tmp_path).items():
            monkeypatch.setenv(name, value)
        if objective is None:
            monkeypatch.delenv("COORDEXP_CONFIG", raising=False)
        from swift.pipelines.train.sft import SwiftSft
        from swift.trainers import TrainerFactory

        pipeline = SwiftSft(arguments(tmp_path / "out", **changes))
        train, evaluation = pipeline._prepare_dataset()
        model = pipeline.prepare_model(pipeline.args, pipeline.model, template=pipeline.template, train_dataset=train)
        # As SwiftSft.run does it.
        trainer = TrainerFactory.get_trainer_cls(pipeline.args)(
            model=model, args=pipeline.args.training_args, template=pipeline.template, train_dataset=train, eval_dataset=evaluation
        )
        # ms-swift's bar and log cannot take an evaluation before training.
        trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if type(c).__name__ != "ProgressCallbackNew"]
        return trainer

    return made


def reference(tmp_path, objective):
    """``CoordTrainer`` on a fresh copy of the same model."""
    options = TrainOptions(max_steps=1, report_to=())
    return CoordTrainer(
        model=fresh_model(),
        objective=CoordObjective(**objective),
        vocab=vocab(),
        args=training_arguments(options, tmp_path / "ours", seed=0),
        eval_dataset=RecordDataset(records("val"), template()),
        data_collator=collator(),
    )


def recorded(trainer):
    """The batches of the first window, as the model gets them."""
    seen, original = [], trainer.get_batch_samples

    def watching(*args):
        batches, count = original(*args)
        seen.extend(batches)
        return batches, count

    trainer.get_batch_samples = watching
    return seen


@pytest.mark.parametrize("objective", [{}, EVERYTHING, {**EVERYTHING, "normalization": "token", "alpha": 0.05}])
def test_loss_and_gradient_of_a_window_are_those_of_coord_trainer_on_the_same_batches(build, tmp_path, objective):
    trainer, watch = build(objective, per_device_train_batch_size=3, gradient_accumulation_steps=4), Watch()
    trainer.add_callback(watch)
    batches = recorded(trainer)
    trainer.train()
    assert [len(batch["targets"].image_ids) for batch in batches] == [3, 3, 3, 3]

    ours = reference(tmp_path, objective)
    ours._window = ours.count_positions(batches, torch.device("cpu"))
    losses = []
    for batch in batches:
        loss = ours.compute_loss(ours.model.train(), {key: batch[key] for key in OURS})
        loss.backward()
        losses.append(loss.item())
    expected = gradients(ours.model)
    assert (watch.gradient - expected).norm() <= 1e-5 * expected.norm()
    assert watch.logs[0]["loss"] == pytest.approx(sum(losses), rel=1e-5)


def test_evaluation_is_that_of_coord_trainer_on_the_same_batches(build, tmp_path):
    trainer = build(EVERYTHING)
    loader = trainer.get_eval_dataloader()
    got = trainer.evaluate()
    ours = reference(tmp_path, EVERYTHING)
    ours.callback_handler.callbacks = []
    batches = [{key: batch[key] for key in OURS} for batch in loader]
    ours.get_eval_dataloader = lambda data: batches
    expected = ours.evaluate()
    assert sum(len(batch["targets"].image_ids) for batch in batches) == 6
    assert set(expected) <= set(got)
    for key, value in expected.items():
        assert (math.isnan(value) and math.isnan(got[key])) or got[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_ms_swift_hands_over_the_tokens_pixels_and_unrounded_targets_of_training(build):
    """But for one token: ms-swift also supervises the line break after the end of the turn."""
    trainer = build()
    newline = template().tokenizer("\n", add_special_tokens=False)["input_ids"]
    for index in (0, 4, 9):
        batch = trainer.data_collator([trainer.train_dataset[index]])
        (name,) = batch["targets"].image_ids  # ms-swift shuffles the rows
        expected = collator()([template().encode(next(record for record in records() if str(record.image) == name))])
        assert batch["input_ids"][0].tolist() == expected["input_ids"][0].tolist() + newline
        length = expected["input_ids"].shape[1]
        for key, column in expected["targets"].columns().items():
            # The last position of ours predicts nothing, of theirs the line break.
            got = batch["targets"].columns()[key][:, : length - 1]
            torch.testing.assert_close(got, column[:, :-1], rtol=0, atol=0, equal_nan=True)
        assert batch["targets"].labels[0, length - 1 :].tolist() == [*newline, -100]
        for key in ("pixel_values", "image_grid_thw"):
            torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)
        centers = batch["targets"].centers[batch["targets"].centers.isfinite()]
        assert (centers != centers.round()).any()


def test_lora_starts_at_the_loss_of_the_whole_model_and_trains(build, tmp_path):
    full = build({}).evaluate()["eval_loss"]
    trainer, watch = build({}, tuner_type="lora", target_modules="all-linear", max_steps=4, learning_rate=1e-2), Watch()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(full, rel=1e-6)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.gradient.norm() > 0
    losses = [row["loss"] for row in watch.logs if "loss" in row]
    assert losses[-1] < losses[0]


def test_without_the_loss_name_the_trainer_is_ms_swifts_own_class(build):
    from swift.trainers import Seq2SeqTrainer

    trainer = build(loss=False)
    assert type(trainer) is Seq2SeqTrainer
    assert trainer.model.forward.__func__.__module__.startswith("transformers.")
    assert type(trainer).loss_is_scaled_for_ga is None


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(build):
    trainer = build({})
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = math.nan
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 1 .*train-0000.*png"):
        trainer.train()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "tiny"}, "0 of 1000 coordinate tokens (first missing: <|coord_0|>): run `coordexp vocab extend"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor: expected 0"),
        ({"loss_scale": "hermes"}, "loss weights of its own"),
        ({"max_length": 40, "lazy_tokenize": "true"}, "Current length of row"),
    ],
)
def test_what_cannot_be_trained_on_is_said_in_one_line_before_the_first_step(build, capsys, changes, said):
    if "model" in changes:
        changes = {"model": workspace() / changes["model"]}
    with pytest.raises((SystemExit, ValueError)) as caught:
        build({}, **changes)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if caught.type is SystemExit:
        assert caught.value.code == 2
        assert len(errors) == 1
        assert said in errors[0]
    else:  # ms-swift itself shows a row first
        assert "max_length" in str(caught.value)


def test_the_installed_ms_swift_has_the_shape_that_the_plugin_needs():
    assert contract.problems() == []
    assert contract.version() == contract.TESTED


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ("swift.trainers.mixin:SwiftMixin._get_data_collator", lambda self, args: None, "parameters self, args, template, got self, args"),
        ("swift.trainers:Seq2SeqTrainer.compute_loss", lambda self, model, batch: None, "compute_loss: expected the parameters"),
        ("transformers:Trainer.get_batch_samples", None, "get_batch_samples: expected it, got nothing of that name"),
        ("swift.template:Template.encode", lambda self, inputs: None, "return_length"),
    ],
)  # fmt: skip
def test_an_upstream_of_another_shape_is_refused_loudly(monkeypatch, where, change, said):
    module, _, names = where.partition(":")
    owner, name = names.split(".")
    target = getattr(importlib.import_module(module), owner)
    if change is None:
        monkeypatch.delattr(target, name)
    else:
        monkeypatch.setattr(target, name, change)
    with pytest.raises(ConfigError) as caught:
        contract.check()
    assert "pip install ms-swift==4.6.0" in caught.value.problems[0]
    assert len(caught.value.problems) == 2
    assert said in caught.value.problems[1]


def test_a_template_that_lets_through_only_what_it_knows_cannot_drop_the_targets(build):
    """As Qwen2.5-VL's does."""
    expected = build({}).evaluate()["eval_loss"]
    trainer = build({})
    kept = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    trainer.template._post_encode = lambda model, inputs: {key: inputs[key] for key in kept}
    assert trainer.evaluate()["eval_loss"] == expected


def test_processes_that_accelerate_did_not_join_are_refused(build, monkeypatch, capsys):
    """On CPU without --use_cpu ms-swift starts two processes that never exchange a gradient."""
    from swift.trainers import Seq2SeqTrainingArguments

    monkeypatch.setattr(Seq2SeqTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(SystemExit):
        build()
    assert "error: 2 processes were started and accelerate joined none of them" in capsys.readouterr().err


def test_the_loss_name_alone_under_another_trainer_is_refused(build):
    build()  # registers it
    from swift.loss import loss_map

    with pytest.raises(ConfigError, match="only for `swift sft` with --task_type causal_lm, got object"):
        loss_map["coordexp"](None, object())


def test_the_plugins_folder_does_not_hide_ms_swift_from_later_imports(build):
    from swift.utils.utils import import_external_file

    before = list(sys.path)
    for name in [name for name in sys.modules if name.startswith("_swift_external_")]:
        del sys.modules[name]
    try:
        import_external_file(str(PLUGIN))
        assert str(PLUGIN.parent) not in [os.path.abspath(entry) for entry in sys.path]
    finally:
        sys.path[:] = before
