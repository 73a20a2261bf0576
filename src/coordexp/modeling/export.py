"""A trained checkpoint as one plain folder: adapters merged, tables tied or not, weights in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.modeling.load import check_model_folder, load_model, save_model_folder
from coordexp.vocab.adapters import ADAPTER_CONFIG, base_folder, is_adapter, wrap_adapter

_WEIGHTS: Final = ("*.safetensors", "*.safetensors.index.json", "config.json", ADAPTER_CONFIG, "tokenizer.json")


def check_checkpoint(folder: Path) -> None:
    """Refuse, before anything large is read, a folder that is neither a model nor an adapter.

    Raises:
        ConfigError: what is missing.
    """
    if not is_adapter(folder):
        check_model_folder(folder)
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(f"{folder}: no *.safetensors weights in this folder")
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder}: {ADAPTER_CONFIG} is there, adapter_model.safetensors is missing")


def adapter_base(folder: Path, given: Path | None) -> Path:
    """The model that an adapter was trained on: ``given``, or the one its configuration names.

    Raises:
        ConfigError: neither is a model folder on this machine.
    """
    if given is None:
        try:
            given = base_folder(folder)
        except ConfigError as error:
            raise ConfigError(f"{error}, or pass --base FOLDER") from None
    check_model_folder(given)
    return given


def load_trained(folder: Path, base: Path | None) -> Any:
    """The trained model in float32, as training saw it: whole, or ``base`` wrapped in its adapter (not merged).

    Raises:
        ConfigError: no such model, or an adapter that does not fit.
    """
    from safetensors import SafetensorError

    try:
        model = load_model(folder if base is None else base)
    except SafetensorError as error:
        raise ConfigError(f"{folder if base is None else base}: its weights cannot be read: {error}") from None
    if base is None:
        return model.eval()
    return wrap_adapter(model, folder).eval()


def merge(model: Any) -> Any:
    """The plain model: peft's own merge for an adapter, the model itself otherwise."""
    from peft import PeftModel

    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def is_tied(model: Any) -> bool:
    """Whether head and embedding are one tensor."""
    return bool(model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())


def untie(model: Any) -> None:
    """Give the head its own copy of the table, in place; the configuration says so too."""
    if not is_tied(model):
        return
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[T, V]`` of one sample, float32."""
    values: Tensor = model(**inputs).logits[0].float()
    return values


def difference(before: Tensor, after: Tensor) -> float:
    """Largest difference of two ``[T, V]`` as a share of the largest logit, or of 1 where all are smaller.

    Raises:
        ConfigError: a value that is not finite.
    """
    if not (bool(torch.isfinite(before).all()) and bool(torch.isfinite(after).all())):
        raise ConfigError("verify: the logits are not finite: this model cannot be compared")
    return float((before - after).abs().max() / before.abs().max().clamp(min=1.0))


def write_plain(model: Any, out: Path, *, dtype: str, tokenizer: Any, processor_from: Path) -> None:
    """Weights in ``dtype``, tokenizer and processor files."""
    save_model_folder(model.to(getattr(torch, dtype)), tokenizer, out, processor_from=processor_from)


def load_plain(folder: Path) -> Any:
    """The folder through the stock class that a user without this package takes, in float32."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def first_with(names: tuple[str, ...], folder: Path, base: Path | None) -> Path:
    """The checkpoint if it has one of the files, else the base it was trained on (an adapter is often saved bare)."""
    return folder if base is None or any((folder / name).is_file() for name in names) else base


def source_files(folder: Path, base: Path | None) -> dict[str, Path]:
    """The files that an export depends on, under ``checkpoint/`` and ``base/``."""
    parts = {"checkpoint": folder} | ({} if base is None else {"base": base})
    found = {f"{part}/{path.name}": path for part, where in parts.items() for pattern in _WEIGHTS for path in where.glob(pattern)}
    return dict(sorted(found.items()))
