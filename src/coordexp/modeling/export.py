"""What an export starts from, and how its logits are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.modeling.load import check_model_folder
from coordexp.vocab.adapters import ADAPTER_CONFIG, base_folder, is_adapter

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


def first_with(names: tuple[str, ...], folder: Path, base: Path | None) -> Path:
    """The checkpoint if it has one of the files, else the base it was trained on (an adapter is often saved bare)."""
    return folder if base is None or any((folder / name).is_file() for name in names) else base


def source_files(folder: Path, base: Path | None) -> dict[str, Path]:
    """The files that an export depends on, under ``checkpoint/`` and ``base/``."""
    parts = {"checkpoint": folder} | ({} if base is None else {"base": base})
    found = {f"{part}/{path.name}": path for part, where in parts.items() for pattern in _WEIGHTS for path in where.glob(pattern)}
    return dict(sorted(found.items()))
