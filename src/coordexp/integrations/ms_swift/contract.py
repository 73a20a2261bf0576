"""Everything of ms-swift and transformers that the plugin leans on, in one list, checked before it is used.

The plugin registers a loss name and a trainer, and its trainer overrides methods of ms-swift's. Nothing of either library is
replaced. What can still break is the shape of what is overridden or read: parameters, fields, names.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import Any, Final

from coordexp.errors import ConfigError

TESTED: Final = "4.6.0"


@dataclass(frozen=True)
class Call:
    """``where`` (``module:qualified.name``) must take these parameters, in this order, before any others."""

    where: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Fields:
    """The dataclass ``where`` must have these fields."""

    where: str
    names: tuple[str, ...]


CALLS: Final = (
    # Overridden.
    Call("swift.trainers.mixin:SwiftMixin.__init__", ("self", "model", "args", "template", "train_dataset", "eval_dataset")),
    Call("swift.trainers.mixin:SwiftMixin._get_data_collator", ("self", "args", "template")),
    Call("swift.trainers.mixin:SwiftMixin.create_loss_and_eval_metric", ("self", "args")),
    Call("swift.trainers.mixin:SwiftMixin.log", ("self", "logs")),
    Call("swift.trainers.mixin:SwiftMixin._save", ("self", "output_dir", "state_dict")),
    Call("swift.trainers:Seq2SeqTrainer.compute_loss", ("self", "model", "inputs", "return_outputs", "num_items_in_batch")),
    Call("swift.trainers:Seq2SeqTrainer.evaluate", ("self",)),
    Call("swift.trainers.mixin:DataLoaderMixin.get_eval_dataloader", ("self", "eval_dataset")),
    Call("transformers:Trainer.get_batch_samples", ("self", "epoch_iterator", "num_batches", "device")),
    Call("transformers:Trainer._get_num_items_in_batch", ("self", "batch_samples", "device")),
    Call("transformers:Trainer._get_grad_norm", ("self", "model", "grad_norm")),
    # Called.
    Call("swift.trainers:Seq2SeqTrainer._prepare_inputs", ("self", "inputs")),
    Call("swift.template:Template.encode", ("self", "inputs", "return_template_inputs", "return_length")),
    Call("swift.template:Template.data_collator", ("self", "batch", "padding_to")),
    Call("swift.loss:BaseLoss.__init__", ("self", "args", "trainer")),
    Call("swift.dataset:LazyLLMDataset.__init__", ("self", "dataset", "encode_func")),
)

FIELDS: Final = (
    Fields(
        "swift.trainers:Seq2SeqTrainingArguments",
        (
            "loss_type", "use_logits_to_keep", "enable_dft_loss", "enable_channel_loss", "label_smoothing_factor", "use_liger_kernel",
            "predict_with_generate", "eval_metric", "tuner_backend", "router_aux_loss_coef", "logging_nan_inf_filter", "output_dir",
            "gradient_accumulation_steps", "per_device_train_batch_size",
        ),
    ),
)  # fmt: skip


def problems() -> list[str]:
    """One line for everything that is not as it was in the tested version."""
    found = []
    for call in CALLS:
        target = _find(call.where)
        if target is None:
            found.append(f"{call.where}: expected it, got nothing of that name")
            continue
        got = tuple(inspect.signature(target).parameters)
        if got[: len(call.parameters)] != call.parameters:
            found.append(f"{call.where}: expected the parameters {', '.join(call.parameters)}, got {', '.join(got)}")
    for item in FIELDS:
        target = _find(item.where)
        names = {field.name for field in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else set()
        found += [f"{item.where}: expected the field {name}, got none" for name in item.names if name not in names]
    return found + _tables()


def _tables() -> list[str]:
    """The two tables that the plugin writes into, and the switch of transformers that it sets."""
    from swift.loss import loss_map
    from swift.trainers import Seq2SeqTrainer, TrainerFactory
    from transformers import Trainer

    found = []
    mapping = vars(TrainerFactory).get("TRAINER_MAPPING")
    if not isinstance(mapping, dict) or not isinstance(mapping.get("causal_lm"), str):
        found.append("swift.trainers:TrainerFactory.TRAINER_MAPPING: expected a table with causal_lm as module.Class")
    if not isinstance(loss_map, dict):
        found.append("swift.loss:loss_map: expected a table")
    if "loss_is_scaled_for_ga" not in vars(Trainer):
        found.append("transformers:Trainer.loss_is_scaled_for_ga: expected this switch, got none")
    if not issubclass(Seq2SeqTrainer, Trainer):
        found.append("swift.trainers:Seq2SeqTrainer: expected a transformers Trainer")
    return found


def check() -> None:
    """Refuse to start on an upstream of another shape.

    Raises:
        ConfigError: every difference, one line each.
    """
    found = problems()
    if found:
        head = f"ms-swift {version()} is not of the shape that this plugin was written for ({TESTED}): pip install ms-swift=={TESTED}"
        raise ConfigError([head, *found])


def version() -> str:
    """The installed version of ms-swift."""
    import swift

    return str(swift.__version__)


def _find(where: str) -> Any:
    module, _, names = where.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for name in names.split("."):
            # ms-swift's packages load their names when asked for them.
            target = getattr(target, name)
    except (ImportError, AttributeError):
        return None
    return target
