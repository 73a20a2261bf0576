"""LoRA, DoRA and coordinate rows with PEFT, and the head as the fused loss must see it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.options import AdapterOptions

ADAPTER_CONFIG: Final = "adapter_config.json"
ALL_LINEAR: Final = "all-linear"

# Module names of Qwen3-VL and Qwen2.5-VL; the mergers bring picture features to the width of the language model.
VISION: Final = "visual"
ALIGNER: Final = ("merger", "deepstack_merger_list")
ROWS: Final = "trainable_tokens_delta"


def part_of(name: str) -> str:
    """``coord_rows``, ``aligner``, ``vision`` or ``language_model`` (embedding and head included) by a module's or parameter's name."""
    words = name.split(".")
    if ROWS in words:
        return "coord_rows"
    if VISION not in words:
        return "language_model"
    return "aligner" if any(word in ALIGNER for word in words) else "vision"


@dataclass(frozen=True)
class Head:
    """The output head: ``weight`` ``[V, D]``, and ``coord_weight`` ``[K, D]``, if it stands in for the coordinate rows."""

    weight: Tensor
    coord_weight: Tensor | None
    bias: Tensor | None


def head_layers(model: Any) -> tuple[nn.Module, nn.Linear]:
    """The head of a causal model as the model calls it, and the linear module in it: one module, unless PEFT trains rows of it.

    Raises:
        ConfigError: a head adapted in another way.
    """
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        return head, head
    layer = _rows_layer(head)
    linear = None if layer is None else layer.get_base_layer()
    if not isinstance(linear, nn.Linear):
        raise ConfigError(
            f"the output head is a {type(head).__name__}: the loss knows a linear head, trained coordinate rows on it and nothing else: "
            "leave lm_head out of adapter.targets"
        )
    return layer, linear


def head_of(layer: nn.Module, vocab: CoordVocab) -> Head:
    """Weights of the head, ``layer`` as from :func:`head_layers`. With trained rows, ``weight`` is the frozen base table: the wrapper's
    own ``weight`` would be a merged copy of all V rows that requires a gradient.

    Raises:
        ConfigError: rows that are not the coordinate rows.
    """
    if isinstance(layer, nn.Linear):
        return Head(layer.weight, None, layer.bias)
    rows: Any = layer
    base = rows.get_base_layer()
    active = list(rows.active_adapters)
    if rows.disable_adapters or rows.merged or not active:
        return Head(base.weight, None, base.bias)
    if len(active) != 1 or list(rows.token_indices[active[0]]) != list(vocab.ids):
        raise ConfigError(
            "the adapter trains other rows of the head than the coordinate rows: train a new adapter with adapter.new_rows=true"
        )
    # The rounding of the wrapper's own forward, so that training and generation see the same rows.
    return Head(base.weight, rows.trainable_tokens_delta[active[0]].to(base.weight.dtype), base.bias)


@contextmanager
def rows_in_place(model: Any) -> Iterator[None]:
    """Within the block the trained rows stand in the tables themselves, and the tables are as before afterwards, bit for bit.

    PEFT's layers would copy ``[V, D]`` at every forward pass, for every token that is generated.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer) and not module.merged]
    try:
        for layer in layers:
            table: Any = layer.get_base_layer().weight.data
            for name in layer.active_adapters:
                rows = layer.trainable_tokens_delta[name].detach().to(table)
                table[torch.tensor(layer.token_indices[name], device=table.device)] = rows
                layer.merged_adapters.append(name)
        yield
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()


def _rows_layer(module: Any) -> Any:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(module, TrainableTokensWrapper):
        return module.token_adapter
    return module if isinstance(module, TrainableTokensLayer) else None


def adapt(model: Any, options: AdapterOptions, vocab: CoordVocab, *, base: Path) -> Any:
    """The model with only that trainable which ``options`` ask for; a ``PeftModel`` unless ``kind`` is ``none``.

    ``base`` is the folder of ``model``, recorded in the adapter's configuration as an absolute path.

    Raises:
        ConfigError: a target that matches no layer, with some that would; or a head whose rows PEFT would not train.
    """
    if options.kind == "none":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) not in options.freeze)
        return model
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    embedding, head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    original = model.get_output_embeddings().weight[vocab.start : vocab.start + vocab.num_bins].detach().clone()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = list(vocab.ids)
    config: Any
    if options.kind == "rows":
        config = TrainableTokensConfig(token_indices=ids, target_modules=[embedding] if tied else [embedding, head])
    else:
        # A list follows tied weights; untied, it would train the embedding only.
        rows: Any = ids if tied else {embedding: ids, head: ids}
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            use_dora=options.kind == "dora",
            target_modules=target_layers(model, options),
            trainable_token_indices=rows if options.new_rows else None,
        )
    with _quiet_peft():
        adapted = get_peft_model(model, config)
    # PEFT takes the folder the model was read from, which need not be absolute.
    config.base_model_name_or_path = str(base.resolve())
    rows_of_head = head_of(head_layers(adapted)[0], vocab).coord_weight
    # A skeleton has no values to compare.
    if options.new_rows and (rows_of_head is None or not (original.is_meta or torch.equal(rows_of_head, original))):
        raise ConfigError(
            "adapter.new_rows: PEFT does not train the head's own rows of this model: its weights and the tie_word_embeddings of its "
            "config.json disagree on whether head and embedding are one table: correct the config, or set adapter.new_rows=false"
        )
    return adapted


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Leaves out three warnings that are about nothing the user can change."""
    with warnings.catch_warnings():
        # It says so of every tied layer that is adapted; trained rows do follow, and `adapt` checks it.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        # Its own use of an older name of transformers.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def describe_adapter(model: Any, options: AdapterOptions) -> str:
    """What :func:`adapt` did, in one line."""
    if options.kind == "none":
        return f"full fine-tuning, frozen: {', '.join(options.freeze) or 'nothing'}"
    if options.kind == "rows":
        return "adapter: the coordinate rows of embedding and head alone"
    from peft.tuners.lora import LoraLayer

    layers = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    rows = "with" if options.new_rows else "without"
    return (
        f"adapter: {options.kind} of rank {options.rank}, alpha {options.alpha:g}, dropout {options.dropout:g} on {len(layers)} layers "
        f"({', '.join(sorted(set(layers)))}), {rows} the coordinate rows of embedding and head"
    )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def target_layers(model: Any, options: AdapterOptions) -> list[str]:
    """Full names of the linear layers that ``options.targets`` mean, those of frozen parts and the head left out.

    Raises:
        ConfigError: a target without a layer.
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name) not in options.freeze
    ]
    chosen: set[str] = set()
    for target in options.target_names:
        part = "language_model" if target == ALL_LINEAR else target
        found = [name for name in linear if part_of(name) == part or name == target or name.endswith(f".{target}")]
        if not found:
            legal = sorted({name.rpartition(".")[2] for name in linear if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(
                f"adapter.targets: {target} matches no linear layer outside the head and the frozen parts "
                f"({', '.join(options.freeze) or 'none'}): expected {ALL_LINEAR}, vision, aligner or, for one, {', '.join(legal[:8])}"
            )
        chosen.update(found)
    return sorted(chosen)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_folder(folder: Path) -> Path:
    """The base model's folder that an adapter folder records.

    Raises:
        ConfigError: no such record, or no such folder.
    """
    path = folder / ADAPTER_CONFIG
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: expected a PEFT configuration that names its base_model_name_or_path") from None
    if not isinstance(recorded, str) or not Path(recorded).is_dir():
        raise ConfigError(
            f"{path}: base_model_name_or_path: there is no folder {recorded}: put the base model there, or name its new place"
        )
    return Path(recorded)


def wrap_adapter(model: Any, folder: Path, *, empty: bool = False) -> Any:
    """The base ``model`` with the adapter in ``folder`` around it, not merged and not trained; ``empty``: its weights are not there.

    Raises:
        ConfigError: an adapter that does not fit this model, or without its weights.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder}: adapter_model.safetensors is missing beside {ADAPTER_CONFIG}")
    try:
        with _quiet_peft():
            # Weights that are missing in its file would stay at their random start.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, is_trainable=False, low_cpu_mem_usage=empty)
    except (SafetensorError, RuntimeError, ValueError, IndexError, KeyError, TypeError, UserWarning) as error:
        # What PEFT raises for weights cut short, another base model, a configuration that is not its own.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{folder}: this adapter is damaged or does not fit its base model ({reason})") from error


def merge_adapter(model: Any, folder: Path) -> Any:
    """The base ``model`` with the adapter in ``folder`` merged into its weights: plain modules again, tied as before.

    Merged, because the wrapped embedding and head would copy ``[V, D]`` for every generated token.

    Raises:
        ConfigError: as :func:`wrap_adapter`.
    """
    with torch.no_grad():
        return wrap_adapter(model, folder).merge_and_unload(safe_merge=True)
