"""Optimizer groups, learning rates, the schedule's floor, and the words about them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from adapted import KINDS, adapted_model, base_model
from coordexp.config.load import load_config
from coordexp.data.dataset import RecordDataset
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.train.launch import banner, training_arguments
from coordexp.train.optimizer import GroupRates, describe_groups, parameter_groups
from coordexp.train.options import TrainOptions
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.adapters import adapt, describe_adapter
from coordexp.vocab.options import AdapterOptions
from tiny import collator, records, template, vocab, workspace

RATES = GroupRates(base=1e-4, weight_decay=0.1, vision=2e-5, aligner=3e-4)


def _adapted(**options):
    return adapt(base_model(), AdapterOptions(**options), vocab(), base=workspace() / "model")


@pytest.mark.parametrize("family", ["qwen3", "qwen25"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_every_trainable_parameter_is_in_exactly_one_group_of_its_part(kind, tied, family):
    targets = ("all-linear", "vision", "aligner")
    model = base_model(family, tied) if kind == "none" else adapted_model(family, tied, kind=kind, targets=targets)
    rates = GroupRates(base=1e-4, weight_decay=0.1) if kind == "rows" else RATES
    groups = parameter_groups(model, rates)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    by_id = {
        id(p): (group["name"].removesuffix(".no_decay"), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate, decay = by_id[id(parameter)]
        # An independent reading of the names.
        if "trainable_tokens_delta" in name:
            assert (part, rate, decay) == ("coord_rows", 1e-4, 0.0), name
        elif ".merger." in name or "deepstack_merger" in name:
            assert (part, rate) == ("aligner", 3e-4), name
        elif ".visual." in name:
            assert (part, rate) == ("vision", 2e-5), name
        else:
            assert (part, rate) == ("language_model", 1e-4), name
        if part != "coord_rows":
            vector = name.endswith("bias") or re.search(r"norm\w*\.weight$|\.q_norm\.|ln_q|magnitude", name)
            assert decay == (0.0 if vector else 0.1), name


def test_the_undecayed_parameters_are_those_that_transformers_leaves_out():
    model = base_model()
    trainer = _trainer(model, TrainOptions(max_steps=9, report_to=()), "unused", None)
    decayed = set(trainer.get_decay_parameter_names(model)) - {"lm_head.weight"}  # tied: the embedding under another name
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, RATES)
    assert {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]} == decayed


def _trainer(model, options, folder, rates):
    return CoordTrainer(
        model=model,
        objective=CoordObjective(),
        vocab=vocab(),
        rates=rates,
        args=training_arguments(options, folder, seed=0),
        train_dataset=RecordDataset(records()[:4], template()),
        eval_dataset=RecordDataset(records()[:2], template()),
        data_collator=collator(),
    )


def test_each_group_follows_its_rate_down_to_its_share_of_the_floor(tmp_path):
    options = TrainOptions(
        max_steps=10, warmup_steps=2, learning_rate=1e-3, lr_vision=1e-4, lr_coord_rows=5e-3, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.2}, report_to=(),
    )  # fmt: skip
    trainer = _trainer(_adapted(kind="lora", targets=("all-linear", "vision")), options, tmp_path, GroupRates.of(options))
    trainer.create_optimizer_and_scheduler(10)
    peaks = {"language_model": 1e-3, "vision": 1e-4, "coord_rows.no_decay": 5e-3}
    for step in range(11):
        share = step / 2 if step < 2 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == pytest.approx({name: share * peak for name, peak in peaks.items()}, rel=1e-12)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_a_rate_of_the_rows_moves_the_rows_alone(tmp_path):
    """With plain SGD a step is rate times gradient: ten times the rate moves the rows ten times as far, and nothing else."""
    moves = []
    for rate in (1e-3, 1e-2):
        torch.manual_seed(0)
        model = _adapted(kind="lora", rank=2)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        options = TrainOptions(
            max_steps=1,
            per_device_train_batch_size=4,
            warmup_steps=0,
            learning_rate=1e-3,
            lr_coord_rows=rate,
            max_grad_norm=1e9,
            report_to=(),
            logging_steps=1,
            eval_steps=10,
            save_steps=10,
        )
        trainer = _trainer(model, options, tmp_path / f"{rate}", GroupRates.of(options))
        trainer.optimizer = torch.optim.SGD(parameter_groups(model, trainer.rates))
        trainer.train()
        moves.append({name: p.detach() - before[name] for name, p in model.named_parameters() if p.requires_grad})
    for name, move in moves[0].items():
        rows = "trainable_tokens_delta" in name
        assert rows or "lora_A" in name or move.norm() > 0  # B starts at zero, so A has no gradient in the first step
        torch.testing.assert_close(moves[1][name], (10 if rows else 1) * move, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "rates", "key"),
    [
        ({"kind": "lora"}, {"vision": 1e-5}, "train.lr_vision"),
        ({"kind": "rows"}, {"aligner": 1e-5}, "train.lr_aligner"),
        ({"kind": "lora", "new_rows": False}, {"coord_rows": 1e-5}, "train.lr_coord_rows"),
        ({"kind": "none"}, {"coord_rows": 1e-5}, "train.lr_coord_rows"),
    ],
)
def test_a_rate_for_a_part_that_trains_nothing_is_refused(options, rates, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        parameter_groups(_adapted(**options), GroupRates(base=1e-4, weight_decay=0.0, **rates))


def test_a_model_with_nothing_to_train_is_refused():
    model = base_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="left to train"):
        parameter_groups(model, RATES)


def test_the_banner_says_what_each_part_trains_and_at_which_rate():
    options = AdapterOptions(kind="dora", rank=4, freeze=("vision",))
    model = adapt(base_model(), options, vocab(), base=workspace() / "model")
    rates = GroupRates(base=1e-4, weight_decay=0.0, coord_rows=1e-3)
    lines = describe_groups(model, rates)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        sum(int(line.split()[2 if "language" in line or "coord" in line else 1].replace(",", "")) for line in lines if "rate" in line)
        == trained
    )
    assert lines[0].startswith("language model: ")
    assert lines[0].endswith("learning rate 0.0001")
    assert [line for line in lines if "frozen" in line] == [lines[1], lines[2]]
    assert lines[3].split(": ")[1] == "48,000 of 48,000 parameters, learning rate 0.001"
    told = describe_adapter(model, options)
    assert "dora of rank 4, alpha 32, dropout 0 on 14 layers (down_proj, gate_proj, k_proj" in told
    trainer = _trainer(model, TrainOptions(max_steps=9, report_to=()), "unused", rates)
    for line in lines:
        assert line in banner(trainer)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["train.lr_coord_rows=1e-3"], "adapter.kind"),
        (["train.lr_coord_rows=1e-3", "adapter.kind=lora", "adapter.new_rows=false"], "adapter.new_rows"),
        (["train.lr_vision=1e-5", "adapter.freeze=[vision]"], "train.lr_vision"),
        (["train.lr_vision=0"], "train.lr_vision"),
        (["adapter.kind=qlora"], "adapter.kind"),
        (["adapter.freeze=[head]"], "adapter.freeze"),
        (["adapter.rnak=3"], "adapter.rank"),
        (["adapter.targets=3"], "adapter.targets"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_key(tmp_path, sets, words):
    path = tmp_path / "x.yaml"
    path.write_text("data: {kind: synth}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, sets)
    assert words in str(error.value)


def test_adapter_settings_read_from_a_file_like_from_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("data: {kind: synth}\nadapter: {kind: dora, targets: [q_proj, vision], freeze: [aligner]}\n")
    adapter = load_config(path, ["adapter.rank=8"]).adapter
    assert adapter == AdapterOptions(kind="dora", rank=8, targets=("q_proj", "vision"), freeze=("aligner",))
    assert load_config(path, ["adapter.targets=all-linear"]).adapter.target_names == ("all-linear",)
