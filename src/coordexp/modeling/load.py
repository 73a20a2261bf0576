"""Load and save model folders. The one module that knows how a folder without torchvision is read.

The stock Qwen3-VL processor needs torchvision for its video part. Only the tokenizer and the image
processor are needed here, so those two are loaded directly: ``Qwen2VLImageProcessorPil`` reads the same
``preprocessor_config.json`` as the stock class. Saving copies the processor files of the starting folder,
so what is saved loads in a stock install.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from coordexp.errors import ConfigError
from coordexp.modeling.options import ModelOptions
from coordexp.vocab.adapters import ADAPTER_CONFIG, base_folder, is_adapter, merge_adapter

PROCESSOR_FILES: Final = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def check_model_folder(folder: Path) -> None:
    """Raise a one-line ``ConfigError`` unless the folder holds a config and a tokenizer, or an adapter of such a folder and a tokenizer."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder")
    config = ADAPTER_CONFIG if is_adapter(folder) else "config.json"
    missing = [name for name in (config, "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: expected a model folder, but {' and '.join(missing)} is missing")
    if is_adapter(folder):
        base = base_folder(folder)
        if is_adapter(base):
            raise ConfigError(f"{folder}/{ADAPTER_CONFIG}: base_model_name_or_path: {base} is an adapter itself: merge it first")
        check_model_folder(base)


def load_tokenizer(folder: Path) -> Any:
    """The folder's fast tokenizer; nothing is fetched from a hub."""
    from transformers import AutoTokenizer

    check_model_folder(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_image_processor(folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The folder's image processor on its PIL backend; ``min_pixels`` and ``max_pixels`` override its size budget."""
    from transformers import Qwen2VLImageProcessorPil

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConfigError(f"{folder}: expected preprocessor_config.json beside the model, found none")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    if min_pixels is not None or max_pixels is not None:
        size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
        size |= {} if min_pixels is None else {"shortest_edge": min_pixels}
        size |= {} if max_pixels is None else {"longest_edge": max_pixels}
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, size=size)
    return processor


def load_model(folder: Path, options: ModelOptions | None = None) -> Any:
    """A Qwen3-VL model from safetensors in the folder, in ``options.dtype`` (float32 by default).

    Of an adapter folder: its base model with the adapter merged.

    Raises:
        ConfigError: another architecture, no weights, or an adapter without its base.
    """
    import torch
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_model_folder(folder)
    options = options or ModelOptions()
    if is_adapter(folder):
        return merge_adapter(load_model(base_folder(folder), options), folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_architecture(folder, config)
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder}: no *.safetensors weights in this folder")
    return Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, options.dtype), attn_implementation=options.attn_implementation, local_files_only=True
    )


def skeleton(folder: Path) -> Any:
    """The folder's model without its weights, on the meta device: its layers have names and shapes, and cost nothing.

    Raises:
        ConfigError: another architecture.
    """
    import torch
    from transformers import AutoConfig, Qwen3VLForConditionalGeneration

    check_model_folder(folder)
    folder = base_folder(folder) if is_adapter(folder) else folder
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _check_architecture(folder, config)
    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(config)


def _check_architecture(folder: Path, config: Any) -> None:
    if config.model_type != "qwen3_vl":
        raise ConfigError(f"{folder}/config.json: model_type: expected qwen3_vl, got {config.model_type}")


def choose_device(name: str) -> str:
    """The torch device for ``auto``, ``cpu`` or ``cuda``; under torchrun each process gets its own GPU.

    Raises:
        ConfigError: another name, or no GPU here.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: expected auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here: use --device cpu")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name != "cpu" and torch.cuda.is_available() else "cpu"


def save_model_folder(model: Any, tokenizer: Any, out: Path, *, processor_from: Path) -> None:
    """Write weights, tokenizer and the processor files of ``processor_from`` to ``out``."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    copy_processor_files(processor_from, out)


def copy_processor_files(source: Path, out: Path) -> None:
    """Copy what the tokenizer does not write itself: image and video processor settings, older chat templates."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file() and not (out / name).exists():
            shutil.copyfile(source / name, out / name)


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
