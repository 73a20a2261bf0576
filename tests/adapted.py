"""Tiny models, tied and not, with adapters that do something; used by the tests of adapters and optimizer groups."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

import torch

from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_model
from coordexp.modeling.tiny import write_tiny_model
from coordexp.vocab.adapters import adapt
from coordexp.vocab.options import AdapterOptions, VocabOptions
from packs import qwen25_model
from tiny import SMALL, collator, fresh_model, records, template, vocab, workspace

STOCK = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
KINDS = ("lora", "dora", "rows")


@lru_cache
def untied_folder() -> Path:
    """The extended tiny Qwen3-VL with a head of its own."""
    root = workspace()
    write_tiny_model(root / "untied-tiny", dataclasses.replace(SMALL, tie_word_embeddings=False))
    extend_model(root / "untied-tiny", root / "untied", VocabOptions())
    return root / "untied"


def base_model(family="qwen3", tied=True):
    """A new model of that family; the untied one has a head that differs from its embedding."""
    if family == "qwen3":
        return fresh_model() if tied else load_model(untied_folder())
    model = qwen25_model()
    if not tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        head = model.lm_head.weight.detach()
        noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
        model.lm_head.weight = torch.nn.Parameter(head + 0.02 * noise)
    return model


def adapted_model(family="qwen3", tied=True, **options):
    """The adapted model, with every adapter weight moved off its start: a fresh adapter changes nothing and hides mistakes."""
    model, folder = base_model(family, tied), workspace() / "model" if tied else untied_folder()
    torch.manual_seed(3)
    model = adapt(model, AdapterOptions(**options), vocab(), base=folder)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 1e-2 if "magnitude" in name else 5e-2
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def batch(count=3):
    """A training batch of the first records."""
    return collator()([template().encode(record) for record in records()[:count]])
