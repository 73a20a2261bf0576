"""Merging an adapter one module at a time, by PEFT's own layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.vocab.adapters import ADAPTER_CONFIG

# Starts that take their first update out of the base weights: the saved update is to weights that are in no file.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_mergeable(folder: Path) -> None:
    """Refuse, by name and before anything large is read, an adapter that cannot be merged module by module.

    Raises:
        ConfigError: another method than LoRA (DoRA included) and trained rows, or an option of LoRA that changes more than one module's
            own weights.
    """
    where = folder / ADAPTER_CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: expected the configuration of an adapter ({type(error).__name__}: {error})") from None
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise ConfigError(f"{where}: peft_type: {kind} cannot be merged here, LORA and TRAINABLE_TOKENS can: merge it with PEFT first")
    if kind != "LORA":
        return
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{where}: init_lora_weights: {start} has changed the base weights: convert the adapter to plain LoRA first "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    for option in ("layer_replication", "target_parameters"):
        if config.get(option):
            raise ConfigError(f"{where}: {option} cannot be merged here: merge the adapter with PEFT first")


def layers_of(model: Any, where: str) -> dict[int, Any]:
    """The adapter's layer around each plain module that it changes, by the module's ``id``.

    Raises:
        ConfigError: an adapter around an adapter, or a layer that holds its weights in another way than a linear layer, a
            convolution or a table does.
    """
    from peft.tuners.lora.layer import MultiheadAttention
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(module, ModulesToSaveWrapper):
            inside = list(layer.original_module.modules())
        elif isinstance(module, BaseTunerLayer):
            inside = [layer.base_layer]
        else:
            continue
        nested = any(isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or id(part) in found for part in inside)
        if nested or isinstance(layer, MultiheadAttention):
            name = name.removeprefix("base_model.model.")
            raise ConfigError(f"{where}: {name}: a {type(layer).__name__} cannot be merged here: merge the adapter with PEFT first")
        found |= {id(part): layer for part in inside}
    return found


def changes(layer: Any, attribute: str) -> bool:
    """Whether the adapter's ``layer`` changes this parameter of the plain module in it."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if attribute == "weight" or isinstance(layer, ModulesToSaveWrapper):
        return True
    return isinstance(layer, LoraLayer) and attribute == "bias" and any(layer.lora_bias[name] for name in layer.active_adapters)


def brings(layer: Any, plain: nn.Module, attribute: str) -> Tensor | None:
    """The parameter that takes the place of the ``plain`` module's own, for a layer that holds a trained copy of the module."""
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(layer, ModulesToSaveWrapper):
        return None
    path = next(name for name, module in layer.original_module.named_modules() if module is plain)
    copy: Tensor = layer.modules_to_save[layer.active_adapters[0]].get_submodule(path).get_parameter(attribute)
    return copy.detach()


def merge(layer: Any, plain: nn.Module, attribute: str) -> Tensor:
    """The ``plain`` module's parameter with the adapter in it, by PEFT's own merge in place; the layer counts as not merged afterwards.

    Raises:
        ConfigError: a variant of LoRA that PEFT itself cannot merge.
    """
    try:
        layer.merge(safe_merge=False)
    except (NotImplementedError, ValueError) as error:
        raise ConfigError(f"this adapter cannot be merged: {' '.join(str(error).split())[:200]}") from error
    layer.merged_adapters.clear()
    return plain.get_parameter(attribute).detach()


def replaces_only_rows(layer: Any) -> bool:
    """Whether the layer puts trained rows in the place of stored ones: exact in any type, whereas an update is added in float32."""
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    return isinstance(layer, TrainableTokensLayer)


def share_rows(one: Any, other: Any) -> bool:
    """Whether the layers around embedding and head (None: not adapted), whose base weights are one table, change it alike."""
    if one is None and other is None:
        return True
    return replaces_only_rows(one) and replaces_only_rows(other) and (one.tied_adapter is other or other.tied_adapter is one)
