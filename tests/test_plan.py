"""``coordexp plan``: its figures against what real models, optimizers and the real loss keep."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import Adafactor
from transformers.modeling_layers import GradientCheckpointingLayer

from command import call
from coordexp.config.load import load_config
from coordexp.data.dataset import RecordDataset
from coordexp.data.records import read_records
from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.dry import DryMode, DryModel, Sample, dry
from coordexp.modeling.load import load_image_processor, skeleton
from coordexp.modeling.positions import backbone
from coordexp.plan.memory import OPTIMIZERS, STRATEGIES, Shapes, held, loss_bytes, switch_on_checkpointing
from coordexp.plan.planner import Device, Planner, schedule
from coordexp.plan.workload import Reader, measure, workload
from coordexp.vocab.adapters import adapt
from coordexp.vocab.options import AdapterOptions
from tiny import collator, fresh_model, records, template, vocab, workspace

MODEL_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment on the shared model and data, as a file."""
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(
        f"model: {{path: {workspace() / 'model'}}}\nvocab: {{extend: false}}\ndata: {{kind: jsonl, source: {workspace() / 'data'}}}\n"
        "train: {max_steps: 6, per_device_train_batch_size: 2, per_device_eval_batch_size: 2, gradient_accumulation_steps: 2}\n",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(
    ("kind", "checkpointing", "bf16"),
    [("none", False, False), ("none", True, True), ("lora", True, False), ("dora", False, True)],
    ids=["full", "full-checkpointing-autocast", "lora-checkpointing", "dora-autocast"],
)
def test_activations_are_what_the_real_model_saves_for_its_backward_pass(kind, checkpointing, bf16):
    examples = [template().encode(record) for record in records()[:2]]
    rows = [[Sample(len(e.input_ids), len(e.pixel_values) // 4, len(e.pixel_values))] for e in examples]
    mode = DryMode()

    def prepared(model):
        model = adapt(model, AdapterOptions(kind=kind), vocab(), base=workspace() / "model").train()
        if checkpointing:
            switch_on_checkpointing(model)
        return model

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    empty = prepared(skeleton(workspace() / "model"))
    dry(empty, mode)
    step = DryModel(empty, backbone(empty), mode, autocast).step(rows)

    model = prepared(fresh_model())
    batch = collator()(examples)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return tensor

    def inputs(layer, args, kwargs):
        # What a layer that is computed again is computed from does not go through the hooks below.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                count(tensor)

    for layer in model.modules():
        if checkpointing and isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_pre_hook(inputs, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast():
        hidden = backbone(model)(**{name: batch[name] for name in MODEL_INPUTS}, use_cache=False)[0]
    # The batch itself is there as long.
    for tensor in (hidden, *(batch[name] for name in MODEL_INPUTS)):
        count(tensor)
    counted = sum(storage.nbytes() for storage in saved.values())
    assert step.kept == pytest.approx(counted, rel=0.15)
    assert step.kept <= step.forward
    assert step.backward_alone <= step.backward


@pytest.mark.parametrize("trained", [True, False], ids=["table", "rows"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_loss_buffers_are_what_the_real_loss_makes(trained, name, experiment):
    rows, width, size, bins, dtype = 200, 1024, 50_000, 1000, getattr(torch, name)
    config = load_config(experiment, [f"model.dtype={name}"])
    shapes = Shapes(
        weights=0, trained=0, gradients=0, parameters=(), layer=0, root=0, item=dtype.itemsize, vocabulary=size, width=width, head=trained,
        rows=0 if trained else bins, largest=0, numbers=0, stored=0,
    )  # fmt: skip
    labels = torch.arange(300) % 900 + size - bins
    labels[rows:] = -100
    mode = DryMode()
    with mode.fake:
        hidden = torch.empty(300, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(size, width, dtype=dtype, requires_grad=trained)
        extra = None if trained else torch.empty(bins, width, dtype=dtype, requires_grad=True)
    with mode:
        for tensor in (hidden, weight) if extra is None else (hidden, weight, extra):
            mode.count(tensor)
        before = mode.restart()
        out = linear_coord_loss(
            hidden, weight, labels, coord_start=size - bins, num_bins=bins, objective=CoordObjective(), coord_weight=extra, top5=True
        )
        forward = mode.peak - before
        mode.restart()
        out.loss.backward()
        backward = mode.peak - before
    predicted = loss_bytes(shapes, config, rows, "cpu", positions=len(labels))
    assert predicted.forward == pytest.approx(forward, rel=0.15)
    assert predicted.backward == pytest.approx(backward, rel=0.15)
    scored = loss_bytes(shapes, config, rows, "cpu", gradient=False)
    assert scored.forward < predicted.forward


MAKERS = {
    "adamw_torch": lambda p: torch.optim.AdamW(p, fused=False),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: Adafactor(p, scale_parameter=False, relative_step=False, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_optimizer_states_are_what_the_real_optimizer_keeps(name, dtype):
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((96, 64), (5000,), (8, 4, 16))]
    optimizer = MAKERS[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
    assert sum(OPTIMIZERS[name](parameter) for parameter in parameters) == pytest.approx(sum(value.nbytes for value in kept), rel=0.02)


def test_every_known_optimizer_is_one_of_the_trainer_and_the_others_are_tested():
    from transformers.training_args import OptimizerNames

    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames} | {"adamw_8bit"}
    assert set(OPTIMIZERS) - set(MAKERS) == {"adamw_8bit", "adamw_bnb_8bit"}  # bitsandbytes


def test_lengths_are_those_of_the_training_data(experiment):
    config, folder = load_config(experiment), workspace() / "model"
    processor = load_image_processor(folder)
    found = read_records(workspace() / "data" / "train.jsonl").records
    dataset = RecordDataset(found, template())
    lengths = measure(config, Reader.of(config, folder))
    work = workload(config, lengths, processor)
    counts = dataset.token_counts()
    longest = sorted(range(len(counts)), key=lambda i: counts[i], reverse=True)[:2]
    assert [row[0].tokens for row in work.train.rows] == [counts[i] for i in longest]
    assert work.train.longest == max(counts)
    assert work.tokens == pytest.approx(sum(counts) / len(counts))
    supervised = [sum(role != ROLE_CODES["none"] for role in dataset[i].roles) for i in range(len(counts))]
    assert [one.supervised for one in lengths.train] == supervised
    assert work.units == len(counts)


def test_packs_count_as_rows_and_the_fullest_ones_are_taken(experiment):
    config = load_config(experiment, ["data.packing.enabled=true", "data.packing.length=400"])
    folder = workspace() / "model"
    work = workload(config, measure(config, Reader.of(config, folder)), load_image_processor(folder))
    assert all(len(row) > 1 and sum(sample.tokens for sample in row) <= 400 for row in work.train.rows)
    assert work.units < 16


def test_steps_and_epochs_are_those_of_the_trainer(experiment):
    # 16 samples, 2 a rank and micro-batch, 2 ranks, 2 micro-batches: 2 steps an epoch.
    assert schedule(load_config(experiment), 16, 2) == (8, 2, 6)
    epochs = load_config(experiment, ["train.max_steps=null", "train.num_train_epochs=5"])
    assert schedule(epochs, 16, 1) == (4, 4, 20)
    assert schedule(epochs, 17, 1) == (4, 5, 25)


def test_sharding_divides_what_the_strategy_divides(experiment):
    config = load_config(experiment)
    shapes = Shapes(
        weights=800.0, trained=200, gradients=800.0, parameters=(torch.nn.Parameter(torch.ones(200)),), layer=100.0, root=200.0, item=4,
        vocabulary=10, width=4, head=True, rows=0, largest=50.0, numbers=200, stored=0.0,
    )  # fmt: skip
    kept = {strategy: held(shapes, config, strategy, 4) for strategy in STRATEGIES}
    assert [kept[name]["weights"] for name in STRATEGIES] == [800, 200, 800, 200]
    assert [kept[name]["gradients"] for name in STRATEGIES] == [800, 200, 200, 200]
    assert [kept[name]["states"] for name in STRATEGIES] == [1600, 400, 400, 400]
    assert kept["ddp"]["buffers"] == 800
    assert held(shapes, config, "ddp", 1)["buffers"] == 0
    # Two layers and the root are gathered; gradients of a layer and of the root wait to be reduced.
    assert kept["fsdp2"]["buffers"] == 200 + 2 * 100 + 200 + 100
    half = load_config(experiment, ["train.bf16=true"])
    # bf16 weights, and float32 copies beside float32 states.
    assert held(shapes, half, "zero2", 4)["weights"] == 400
    assert held(shapes, half, "zero2", 4)["states"] == (1600 + 800) / 4


@pytest.fixture(scope="module")
def planner(experiment):
    """Of two ranks; no memory is taken by the process itself."""
    config = load_config(experiment, ["train.eval_strategy=no"])
    return Planner.of(config, workspace() / "model", Device("cuda", 1e9, 0.0), 2)


@pytest.fixture(scope="module")
def whole(planner):
    """Its plan with everything."""
    return planner.plan()


def test_levers_are_plans_of_the_changed_experiment(whole, planner):
    found = {lever.setting: lever.total for lever in whole.levers}
    changed = replace(planner, config=replace(planner.config, train=replace(planner.config.train, gradient_checkpointing=True)))
    assert found["train: gradient_checkpointing=true"] == changed.plan(brief=True).need < whole.need
    assert list(found.values()) == sorted(found.values())
    assert "adapter: kind=lora" in found
    assert whole.activations["with"] < whole.activations["without"]


def test_a_plan_is_printed_at_80_columns_or_as_json_and_its_exit_code_is_the_verdict(whole, experiment, monkeypatch, capsys):
    large = replace(whole, device=replace(whole.device, memory=whole.need))
    words = ("plan", experiment, "--gpus", 2, "--gpu-memory", 1)
    for plan, verdict, exit_code in ((whole, "FITS", 0), (large, "DOES NOT FIT", 1)):
        monkeypatch.setattr(Planner, "plan", lambda self, brief, progress, plan=plan: plan)
        code, out, err = call(monkeypatch, capsys, *words)
        assert (code, err) == (exit_code, "")
        assert all(len(line) <= 80 for line in out.splitlines()), out
        assert f"\n{verdict}: " in out
        assert "6 steps = 3 epochs" in out
        code, out, err = call(monkeypatch, capsys, *words, "--json")
        content = json.loads(out)
        assert (code, content["fits"]) == (exit_code, exit_code == 0)
        assert set(content["memory"]) == set(STRATEGIES)
        for one in content["memory"].values():
            assert one["total"] == pytest.approx(sum(value for name, value in one.items() if name not in ("moment", "total")))
    assert "fits" in whole.line()
    assert "DOES NOT FIT" in large.line()  # some of the memory is kept free


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpus", "0"), "--gpus"),
        (("--gpu-memory", "0"), "--gpu-memory"),
        (("--set", "train.batch=2"), "train.batch"),
        (("--set", "data.source=nowhere"), "data.source"),
        (("--set", "model.path=nowhere"), "nowhere"),
        (("--set", "adapter.kind=lora", "--set", "adapter.targets=[nothing]"), "adapter.targets"),
    ],
)
def test_bad_input_is_one_line(words, told, experiment, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "plan", experiment, *words)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1
