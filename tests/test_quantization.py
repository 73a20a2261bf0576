"""Adapters on quantised weights, and 8-bit optimizers; run where bitsandbytes is installed (``make test-quantization``)."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from rich.console import Console
from torch import nn

from adapted import batch
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_model
from coordexp.modeling.tiny import write_tiny_model
from coordexp.train import launch
from coordexp.train.forward import bind_coord_loss, coord_loss
from coordexp.train.options import TrainOptions
from coordexp.vocab.adapters import adapt
from coordexp.vocab.options import AdapterOptions, VocabOptions
from tiny import SMALL, gradients, records, template, vocab

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An extended model of widths that blocks of 64 divide: of others bitsandbytes on a CPU makes twice the error."""
    root = tmp_path_factory.mktemp("wide")
    wide = dataclasses.replace(SMALL, hidden_size=128, intermediate_size=128)
    write_tiny_model(root / "tiny", wide)
    extend_model(root / "tiny", root / "model", VocabOptions())
    return root / "model"


def _plain(layer):
    """The weight that a quantised layer stands for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB.view(-1, 1).float() / 127


def _step(model):
    bind_coord_loss(model, vocab=vocab(), objective=CoordObjective(sigma=2.0))
    loss = coord_loss(model, batch()).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora"), ("int8", "rows")])
def test_an_adapters_gradient_is_that_on_the_weights_the_quantised_ones_stand_for(quantization, kind, folder):
    """The reference holds them in float32. Only the language model's layers are quantised; int8 rounds what goes into a layer too."""
    quantised, whole = load_model(folder, quantization=quantization), load_model(folder)
    for (name, layer), (_, reference) in zip(quantised.named_modules(), whole.named_modules(), strict=True):
        if isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            assert name.startswith("model.language_model.layers.")
            moved = _plain(layer) - reference.weight.data
            assert 0 < moved.norm() < 0.1 * reference.weight.norm()
            reference.weight.data += moved
        elif isinstance(layer, nn.Linear | nn.Embedding):
            assert not name.startswith("model.language_model.layers.")
            assert torch.equal(layer.weight, reference.weight)
    results = []
    for model in (quantised, whole):
        torch.manual_seed(3)
        adapted = adapt(model, AdapterOptions(kind=kind), vocab(), base=folder)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.normal_(std=0.05)
        results.append(_step(adapted.train()))
    (loss, gradient), (expected_loss, expected) = results
    tolerance = 1e-5 if quantization == "nf4" else 0.03
    assert abs(loss - expected_loss) < tolerance * expected_loss
    assert (gradient - expected).norm() < tolerance * expected.norm()


def test_a_run_on_int8_weights_with_an_8_bit_optimizer_trains_resumes_and_leaves_an_adapter(tmp_path, folder):
    options = TrainOptions(
        max_steps=4, per_device_train_batch_size=2, warmup_steps=0, eval_steps=1, save_steps=2, logging_steps=1, learning_rate=1e-2,
        optim="adamw_8bit", gradient_checkpointing=True, save_total_limit=None, report_to=(),
    )  # fmt: skip

    def train(resume):
        torch.manual_seed(0)
        launch.train(
            options, objective=CoordObjective(), model=load_model(folder, quantization="int8"),
            template=template(), train_records=records()[:6], eval_records=records("val")[:2], run_dir=tmp_path / "run",
            processor_from=folder, header={}, seed=0, console=Console(quiet=True), resume=resume,
            adapter=AdapterOptions(kind="lora", rank=64),
        )  # fmt: skip
        return (tmp_path / "run/checkpoints/final/adapter_model.safetensors").read_bytes()

    (tmp_path / "run").mkdir()
    weights = train(False)
    rows = [json.loads(line) for line in (tmp_path / "run/logging.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses == sorted(losses, reverse=True)
    states = torch.load(tmp_path / "run/checkpoints/checkpoint-4/optimizer.pt", weights_only=True)
    moments = [state["__bnb_optimizer_quant_state__"]["state1"] for state in states["state"].values()]
    by_size = {tuple(moment.shape): moment.dtype for moment in moments}
    assert by_size[1000, 128] == torch.float32
    assert torch.uint8 in by_size.values()
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run/checkpoints" / name)
    assert train(True) == weights
