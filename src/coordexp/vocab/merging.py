"""Merging an adapter one module at a time, by PEFT's own layers."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from coordexp.errors import ConfigError

# Starts that take their first update out of the base weights: the saved update is to weights that are in no file.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_mergeable(model: Any, where: str) -> None:
    """Refuse, by name, an adapter that cannot be merged module by module.

    Raises:
        ConfigError: another method than LoRA (DoRA included) and trained rows, or an option of LoRA that changes more than one module's
            own weights.
    """
    from peft import PeftType

    for config in model.peft_config.values():
        kind = PeftType(config.peft_type).value
        if kind not in ("LORA", "TRAINABLE_TOKENS"):
            raise ConfigError(f"{where}: peft_type: {kind} cannot be merged here, LORA and TRAINABLE_TOKENS can: merge it with PEFT first")
        if kind != "LORA":
            continue
        start = config.init_lora_weights
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise ConfigError(
                f"{where}: init_lora_weights: {start} has changed the base weights: convert the adapter to plain LoRA first "
                "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
            )
        for option in ("layer_replication", "target_parameters"):
            if getattr(config, option):
                raise ConfigError(f"{where}: {option} cannot be merged here: merge the adapter with PEFT first")
    lost = next((name for name, parameter in model.named_parameters() if parameter.is_meta and _is_adapters(name)), None)
    if lost is not None:
        raise ConfigError(f"{where}: adapter_model.safetensors holds no {lost.removeprefix('base_model.model.')}: the adapter is damaged")


def _is_adapters(name: str) -> bool:
    words = name.split(".")
    return any(word.startswith("lora_") or word in ("modules_to_save", "trainable_tokens_delta") for word in words)


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
    """The ``plain`` module's parameter with the adapter in it, by PEFT's own merge in place; the layer counts as not merged afterwards."""
    layer.merge(safe_merge=False)
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
