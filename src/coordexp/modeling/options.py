"""Options of the ``model`` section. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Quantization = Literal["nf4", "int8"]


@dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """Shape of a tiny random Qwen3-VL written by ``coordexp model tiny``.

    ``max_pixels`` bounds the image area the processor keeps (it resizes above it);
    ``rope_theta`` is small because the sequences are short.
    """

    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_key_value_heads: int = 3
    vision_depth: int = 3
    vision_hidden_size: int = 128
    vision_intermediate_size: int = 384
    vision_heads: int = 4
    patch_size: int = 8
    min_pixels: int = 32 * 32
    max_pixels: int = 96 * 96
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    bpe_size: int = 640
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"model.tiny.hidden_size: expected an even multiple of {self.num_heads} heads, got {self.hidden_size}")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(f"model.tiny.num_key_value_heads: expected a divisor of {self.num_heads}, got {self.num_key_value_heads}")
        if self.vision_hidden_size % (4 * self.vision_heads):
            raise ValueError(
                f"model.tiny.vision_hidden_size: expected a multiple of {4 * self.vision_heads}, got {self.vision_hidden_size}"
            )
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"model.tiny.max_pixels: expected at least min_pixels={self.min_pixels}, got {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Where the model comes from: a folder (``path``), or none, and then a tiny one is made for the run.

    ``keep_contract``: prompt and image size must be those of the folder's ``coordexp.json``; ``false``: training teaches new ones.
    ``quantization``: the frozen linear layers of the language model are held in 4 bits (NormalFloat, two levels of scales) or 8 bits while
    an adapter is trained; embedding, head and vision tower are not. ``liger``: Liger's kernels for norms, rotary positions and SwiGLU in
    training.
    """

    path: str | None = None
    keep_contract: bool = True
    tiny: TinyOptions = field(default_factory=TinyOptions)
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    min_pixels: int | None = None
    max_pixels: int | None = None
    quantization: Quantization | None = None
    liger: bool = False
