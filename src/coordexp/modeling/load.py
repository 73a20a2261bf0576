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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from coordexp.errors import ConfigError
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, check_contract
from coordexp.modeling.options import ModelOptions, Quantization
from coordexp.vocab.adapters import ADAPTER_CONFIG, VISION, base_folder, is_adapter, merge_adapter

# The model classes that are known to work, by the model_type of config.json; the last ones have no eyes.
VISION_CLASSES: Final = {"qwen3_vl": "Qwen3VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
TEXT_CLASSES: Final = {"qwen3": "Qwen3ForCausalLM"}

PROCESSOR_FILES: Final = (
    CHECKPOINT_MANIFEST,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
BUDGET_FILES: Final = ("preprocessor_config.json", "processor_config.json")


def check_model_folder(folder: Path, needed: tuple[str, ...] | None = None) -> None:
    """Raise a one-line ``ConfigError`` unless the folder holds the ``needed`` files: by default a configuration and a tokenizer."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such model folder")
    if needed is None:
        needed = (ADAPTER_CONFIG if is_adapter(folder) else "config.json", "tokenizer_config.json")
    missing = [name for name in needed if not (folder / name).is_file()]
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

    # An adapter's folder has a tokenizer and no config.json.
    check_model_folder(folder, ("tokenizer_config.json",))
    with _readable(folder, "its tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_image_processor(folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Any:
    """The folder's image processor on its PIL backend; ``min_pixels`` and ``max_pixels`` override its size budget.

    Raises:
        ConfigError: no processor file, a budget that is none, or one that is not the budget of ``coordexp.json``.
    """
    from transformers import Qwen2VLImageProcessorPil

    if not any((folder / name).is_file() for name in BUDGET_FILES):
        raise ConfigError(f"{folder}: expected preprocessor_config.json beside the model, found none")
    # By these names they also win over ``min_pixels`` and ``max_pixels`` of older files, which beat ``size``.
    wanted = {k: v for k, v in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if v is not None}
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True, **wanted)
    low, high = pixel_budget(processor)
    if not 0 < low <= high:
        raise ConfigError(f"model.max_pixels: expected at least min_pixels, and both above 0, got {low} and {high} for {folder}")
    check_contract(folder, min_pixels=low, max_pixels=high)
    return processor


def pixel_budget(processor: Any) -> tuple[int, int]:
    """Least and largest area, in pixels, that the processor resizes an image to."""
    return int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])


def write_pixel_budget(folder: Path, processor: Any) -> None:
    """Put the processor's budget into the folder's own files, so that every reader of the folder resizes alike."""
    low, high = pixel_budget(processor)
    for name in BUDGET_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        # A newer processor_config.json nests the image processor's part.
        part = content if name == BUDGET_FILES[0] else content.get("image_processor")
        if part is None:
            continue
        for older in ("min_pixels", "max_pixels"):
            part.pop(older, None)
        part["size"] = {"shortest_edge": low, "longest_edge": high}
        write_json(path, content)


def load_model(
    folder: Path, options: ModelOptions | None = None, *, text_only: bool = False, quantization: Quantization | None = None
) -> Any:
    """A Qwen-VL model from safetensors in the folder, in ``options.dtype`` (float32 by default); ``text_only`` allows Qwen3 too.

    Of an adapter folder: its base model with the adapter merged. ``quantization`` is not that of ``options``: it is for training alone,
    an adapter is merged into the weights as they are stored.

    Raises:
        ConfigError: another architecture, no weights, or an adapter without its base.
    """
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_model_folder(folder)
    options = options or ModelOptions()
    if is_adapter(folder):
        return merge_adapter(load_model(base_folder(folder), options, text_only=text_only), folder)
    with _readable(folder, "its config.json"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    made = _model_class(folder, config, text_only=text_only)
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder}: no *.safetensors weights in this folder")
    with _readable(folder, "its weights"):
        return made.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), attn_implementation=options.attn_implementation, local_files_only=True,
            **({} if quantization is None else {"quantization_config": _bits(quantization, getattr(torch, options.dtype))}),
        )  # fmt: skip


def _bits(quantization: Quantization, dtype: Any) -> Any:
    """bitsandbytes' settings; the head is read by the loss, row by row, and the vision tower is small and sensitive."""
    from transformers import BitsAndBytesConfig

    whole = ["lm_head", f"model.{VISION}"]
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=whole,
    )


@contextmanager
def _readable(folder: Path, what: str) -> Iterator[None]:
    """Around the reading of a part of a model folder: a damaged file is the user's to mend.

    Raises:
        ConfigError: what the library says of it, in one line.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{folder}: {what} cannot be read ({reason})") from error


def skeleton(folder: Path, *, text_only: bool = False) -> Any:
    """The folder's model without its weights: parameters on the meta device cost nothing, buffers are real; ``text_only`` allows Qwen3 too.

    Raises:
        ConfigError: another architecture, or quantised weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    check_model_folder(folder)
    folder = base_folder(folder) if is_adapter(folder) else folder
    with _readable(folder, "its config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantised = config.to_dict().get("quantization_config")
    if quantised is not None:
        raise ConfigError(
            f"{folder}/config.json: quantization_config: {quantised.get('quant_method')}: quantised weights cannot be extended, merged or "
            "adapted as they are: start from the bfloat16 checkpoint"
        )
    made = _model_class(folder, config, text_only=text_only)
    with init_empty_weights():
        model = made(config)
    model.tie_weights()  # whatever is set within the block above becomes a parameter of its own
    return model


def _model_class(folder: Path, config: Any, *, text_only: bool) -> Any:
    import transformers

    classes = VISION_CLASSES | (TEXT_CLASSES if text_only else {})
    if config.model_type not in classes:
        raise ConfigError(f"{folder}/config.json: model_type: expected {' or '.join(classes)}, got {config.model_type}")
    return getattr(transformers, classes[config.model_type])


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


def link_model_folder(source: Path, out: Path) -> None:
    """A folder whose entries are links to those of ``source``; processor files are copies, since a run may set their budget."""
    out.mkdir()
    copy_processor_files(source, out)
    for entry in source.resolve().iterdir():
        if not (out / entry.name).exists():
            (out / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
