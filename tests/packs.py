"""Packs, schedules and a tiny Qwen2.5-VL for the tests of packing."""

from __future__ import annotations

import torch

from coordexp.data.dataset import RecordDataset
from coordexp.data.packed import PackCollator, PackedDataset
from coordexp.data.packing import PackSchedule, plan_packs
from coordexp.modeling.positions import RopeIndex
from tiny import SMALL, collator, fresh_model, template


def qwen25_model():
    """A random Qwen2.5-VL with the tokenizer and image patches of the tiny Qwen3-VL; windowed attention in its vision tower."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = fresh_model().config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": config.text_config.vocab_size, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "tie_word_embeddings": True,
                },
                vision_config={
                    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": SMALL.patch_size,
                    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48, "window_size": 4 * SMALL.patch_size,
                    "fullatt_block_indexes": [1],
                },
                **{name: getattr(config, name) for name in names},
                tie_word_embeddings=True,
            )
        )  # fmt: skip


def packed(records, *, length=400, seed=0, on_overlong="error", **schedule):
    """The packed data set of records under a schedule."""
    samples = RecordDataset(records, template())
    names = [record.source for record in records]
    plan = plan_packs(samples.token_counts(), length=length, seed=seed, on_overlong=on_overlong, names=names, inputs={})
    return PackedDataset(samples, PackSchedule(plan, **schedule))


def pack_collator(model, single_row=False):
    """The pack collator with the rotary rule of the model."""
    return PackCollator(collator(), RopeIndex.of(model), single_row)
