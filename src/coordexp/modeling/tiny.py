"""A tiny random Qwen3-VL on disk: the real model class, a byte-level BPE tokenizer, chat template, processor files.

It has the layout of a real checkpoint's folder and goes through the same commands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from coordexp.data.staging import staged_folder
from coordexp.grammar import Instance, render
from coordexp.modeling.load import save_model_folder, write_json
from coordexp.modeling.options import TinyOptions

SPECIAL_TOKENS: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# The split of Qwen's tokenizers: words with one leading sign, single digits, runs of signs, white space.
SPLIT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

WORDS: Final = (
    "small", "medium", "large", "tiny", "big", "red", "green", "blue", "yellow", "purple", "orange", "black", "white", "gray", "cyan",
    "pink", "brown", "circle", "square", "triangle", "diamond", "rectangle", "ellipse", "star", "cross", "cat", "dog", "person", "car",
    "bus", "tree", "cell", "blood", "RBC", "WBC", "Platelets", "Locate", "every", "object", "Detect", "all",
)  # fmt: skip


def corpus(words: Iterable[str] = WORDS) -> list[str]:
    """Text the tokenizer learns from: answers in the project's format around the words, and the words in running text."""
    vocabulary = list(words)
    lines = []
    for i, word in enumerate(vocabulary):
        other = vocabulary[(7 * i + 3) % len(vocabulary)]
        answer = render([Instance(f"{word} {other}", (1, 2, 3, 4)), Instance(f"{other} {word}", (1, 2, 3, 4))]).text
        for bin_text in ("<|coord_1|>", "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"):
            answer = answer.replace(bin_text, "")
        lines += [answer, f"user\n{word} {other}.", f"assistant\n{other} {word}"] * 4
    return lines + ["Locate every object.", "user\n", "assistant\n", "system\n"] * 40


def train_tokenizer(size: int) -> Any:
    """A byte-level BPE tokenizer of about ``size`` tokens with Qwen's split and special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def tiny_config(options: TinyOptions, tokenizer: Any) -> Any:
    """``Qwen3VLConfig`` of that shape for that tokenizer."""
    from transformers import Qwen3VLConfig

    head_dim = options.hidden_size // options.num_heads
    sixth = head_dim // 6
    rope = {
        "rope_type": "default",
        "rope_theta": options.rope_theta,
        "mrope_section": [head_dim // 2 - 2 * sixth, sixth, sixth],
        "mrope_interleaved": True,
    }
    grid = math.ceil(math.sqrt(options.max_pixels) / options.patch_size)
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": options.hidden_size,
            "intermediate_size": options.intermediate_size,
            "num_hidden_layers": options.num_layers,
            "num_attention_heads": options.num_heads,
            "num_key_value_heads": options.num_key_value_heads,
            "head_dim": head_dim,
            "rope_parameters": rope,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": options.tie_word_embeddings,
        },
        vision_config={
            "depth": options.vision_depth,
            "hidden_size": options.vision_hidden_size,
            "intermediate_size": options.vision_intermediate_size,
            "num_heads": options.vision_heads,
            "patch_size": options.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": options.hidden_size,
            "num_position_embeddings": grid * grid,
            "deepstack_visual_indexes": sorted({0, options.vision_depth // 2})[: options.num_layers],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=options.tie_word_embeddings,
    )


def tiny_skeleton(options: TinyOptions) -> Any:
    """The model of :func:`write_tiny_model` without weights, on the meta device."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(tiny_config(options, train_tokenizer(options.bpe_size)))


def sinusoidal_grid(side: int, width: int, *, amplitude: float = 0.3, base: float = 100.0) -> Tensor:
    """Two-dimensional sine and cosine table ``[side * side, width]``: row half, then column half.

    A random table of the usual scale hides the position from a model this small; a smooth one shows it.
    """
    half = width // 2
    frequency = base ** (-torch.arange(half // 2) / (half // 2)) * math.pi / 2
    angle = torch.arange(side)[:, None] * frequency
    axis = amplitude * torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = axis[:, None].expand(side, side, half), axis[None].expand(side, side, half)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def write_tiny_model(out: Path, options: TinyOptions, *, overwrite: bool = False) -> Path:
    """Write the folder (staged, then renamed) and return it. The weights depend on ``options.seed`` only.

    Raises:
        ConfigError: ``out`` is in use, or with ``overwrite`` no model that was written so.
    """
    with staged_folder(out, kind="model", overwrite=overwrite) as staging:
        from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

        tokenizer = train_tokenizer(options.bpe_size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = Qwen3VLForConditionalGeneration(tiny_config(options, tokenizer))
        grid = math.isqrt(model.config.vision_config.num_position_embeddings)
        with torch.no_grad():
            model.model.visual.pos_embed.weight.copy_(sinusoidal_grid(grid, options.vision_hidden_size))
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.config.get_text_config().update(ends)
        model.generation_config = GenerationConfig(**ends, do_sample=False)
        _write_processor_files(staging, options)
        save_model_folder(model, tokenizer, staging, processor_from=staging)
    return out


def _write_processor_files(folder: Path, options: TinyOptions) -> None:
    common = {
        "patch_size": options.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels},
        "processor_class": "Qwen3VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", common | {"image_processor_type": "Qwen2VLImageProcessorFast"})
    write_json(folder / "video_preprocessor_config.json", common | {"video_processor_type": "Qwen3VLVideoProcessor"})
