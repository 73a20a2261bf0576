"""Shared small models, records and batches of the tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from transformers import TrainerCallback

from coordexp.data.collate import TrainCollator
from coordexp.data.options import SynthOptions
from coordexp.data.records import read_records
from coordexp.data.synthetic import write_scenes
from coordexp.data.template import ChatTemplate
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer, save_model_folder
from coordexp.modeling.options import TinyOptions
from coordexp.modeling.tiny import write_tiny_model
from coordexp.train.forward import bind_coord_loss, coord_loss
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.options import VocabOptions

SMALL = TinyOptions(
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
    vision_depth=2,
    vision_hidden_size=32,
    vision_intermediate_size=48,
    vision_heads=2,
    max_pixels=64 * 64,
    bpe_size=330,
)


@lru_cache
def workspace() -> Path:
    """A folder of this process with ``tiny`` (no coordinates), ``model`` (extended) and ``data``."""
    root = Path(mkdtemp(prefix="coordexp-test-"))
    write_tiny_model(root / "tiny", SMALL)
    extend_model(root / "tiny", root / "model", VocabOptions())
    write_scenes(root / "data", SynthOptions(train=16, val=6, test=4, side=64, seed=5))
    return root


@lru_cache
def template() -> ChatTemplate:
    """The template of the extended model."""
    folder = workspace() / "model"
    return ChatTemplate(load_tokenizer(folder), load_image_processor(folder))


def fresh_model():
    """A new copy of the extended model, float32."""
    return load_model(workspace() / "model")


@lru_cache
def fitted_folder() -> Path:
    """A model folder that knows the answers of the first two training records by heart: plain cross-entropy, 70 steps."""
    folder = workspace() / "fitted"
    torch.manual_seed(0)
    model = fresh_model()
    bind_coord_loss(model, vocab=vocab(), objective=CoordObjective(soft_ce=0.0, ce=1.0))
    batch = collator()([template().encode(record) for record in records("train")[:2]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(70):
        optimizer.zero_grad()
        coord_loss(model, batch).loss.backward()
        optimizer.step()
    save_model_folder(model, template().tokenizer, folder, processor_from=workspace() / "model")
    return folder


def fitted_model():
    """A new copy of it."""
    return load_model(fitted_folder())


def vocab() -> CoordVocab:
    """Where its coordinates are."""
    return CoordVocab.from_tokenizer(template().tokenizer)


@lru_cache
def records(split: str = "train"):
    """Records of a split."""
    return read_records(workspace() / "data" / f"{split}.jsonl").records


def collator() -> TrainCollator:
    """The training collator of the extended model."""
    tokenizer = template().tokenizer
    return TrainCollator(tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|image_pad|>"))


def gradients(model) -> torch.Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Watch(TrainerCallback):
    """The gradient of the first step, and all logged rows."""

    def __init__(self):
        self.gradient = None
        self.logs = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradient is None:
            self.gradient = gradients(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))
