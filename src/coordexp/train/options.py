"""Options of the ``train`` section. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from coordexp.errors import ConfigError

Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy",
]  # fmt: skip
# Schedules that follow a metric of the evaluation: that of ``save_best``.
BY_METRIC: Final = ("reduce_lr_on_plateau", "greedy")
# Package that an optimizer or a logger needs, as pip knows it, and its module; None: it is there.
_BNB: Final = ("bitsandbytes", "bitsandbytes")
_TORCHAO: Final = ("torchao", "torchao")
OPTIMIZERS: Final[dict[str, tuple[str, str] | None]] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit"), _BNB),
    **dict.fromkeys(("paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit"), _BNB),
    **dict.fromkeys(("paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _BNB),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _TORCHAO),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("torch-optimi", "optimi"),
}
_OWN_GROUPS: Final = "it makes parameter groups of its own, and the learning rates of coordinate rows and vision tower would be lost"
REFUSED_OPTIMIZERS: Final = {
    "galore": _OWN_GROUPS,
    "apollo": _OWN_GROUPS,
    "lomo": "it moves the weights inside the backward, where a step with NaN cannot be left out",
    "adalomo": "it moves the weights inside the backward, where a step with NaN cannot be left out",
    "schedule_free": "it evaluates and saves other weights than it trains, which evaluation and checkpoints here do not switch to",
    "adamw_anyprecision": "torchdistx is not released for the torch that is needed here",
    "adamw_torch_xla": "TPUs are not supported",
    "adamw_torch_npu_fused": "NPUs are not supported",
}
REPORTERS: Final[dict[str, tuple[str, str] | None]] = {
    "tensorboard": None,
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
    "swanlab": ("swanlab", "swanlab"),
    "comet_ml": ("comet-ml", "comet_ml"),
    "clearml": ("clearml", "clearml"),
    "neptune": ("neptune", "neptune"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "dvclive": ("dvclive", "dvclive"),
    "dagshub": ("dagshub", "dagshub"),
    "azure_ml": ("azureml-sdk", "azureml"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": None,
}
LogLevel = Literal["debug", "info", "warning", "error", "critical", "passive"]


@dataclass(frozen=True, kw_only=True)
class TokenTypeMetrics:
    """Which metrics are made beside the loss. ``enabled``: anything but the terms; ``log_top5``: top-5 over the full
    vocabulary, one more look at the logits; ``coord_monitor_mass``: the slice's mass by token type, at text on at most
    ``coord_monitor_mass_max_tokens`` evenly spaced positions of a micro-batch (None: all of them)."""

    enabled: bool = True
    log_top5: bool = True
    coord_monitor_mass: bool = True
    coord_monitor_mass_max_tokens: int | None = None

    def __post_init__(self) -> None:
        most = self.coord_monitor_mass_max_tokens
        if most is not None and most < 1:
            raise ValueError(f"token_type_metrics.coord_monitor_mass_max_tokens: expected at least 1 or null, got {most}")


# What is this package's own; every other field of TrainOptions goes to transformers.TrainingArguments under its name.
OWN: Final = frozenset({
    "lr_vision", "lr_aligner", "lr_coord_rows", "save_best", "patience", "probe_steps", "probe_samples", "on_nonfinite",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fields of ``transformers.TrainingArguments`` under their names, and a few of our own. The fields that are missing are refused, see
    :mod:`coordexp.train.refused`.

    Exactly one of ``num_train_epochs`` and ``max_steps`` is set when training begins (:meth:`check_length`). Below 1, ``logging_steps``,
    ``eval_steps``, ``save_steps`` and ``warmup_steps`` are a share of all steps. ``None`` in ``dataloader_*``: chosen for the machine
    (:func:`coordexp.train.arguments.loading`).

    Our own: ``lr_vision``, ``lr_aligner`` and ``lr_coord_rows`` stand in for ``learning_rate`` in that part (None: the same).
    ``on_nonfinite``: a step with a loss or gradient that is no number ends training, or is left out and counted. ``probe_steps``: every so
    many steps, and at the last, ``probe_samples`` validation images are generated on and scored. ``save_best``: the metric (as in an
    evaluation, without ``eval_``; or ``probe/...``) whose best checkpoint is kept beside the newest ones. ``patience``: training ends when
    so many evaluations in a row were not better by that metric.

    Raises:
        ValueError: a number out of range, or epochs and steps both.
    """

    num_train_epochs: float | None = None
    max_steps: int | None = None
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    learning_rate: float = 1e-4
    lr_vision: float | None = None
    lr_aligner: float | None = None
    lr_coord_rows: float | None = None
    lr_scheduler_type: Scheduler = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: int | float = 50
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    bf16: bool = False
    tf32: bool | None = None
    full_determinism: bool = False
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    torch_empty_cache_steps: int | None = None
    logging_strategy: Literal["steps", "epoch"] = "steps"
    logging_steps: int | float = 10
    logging_first_step: bool = False
    log_level: LogLevel = "passive"
    log_level_replica: LogLevel = "warning"
    log_on_each_node: bool = True
    skip_memory_metrics: bool = True
    report_to: tuple[str, ...] | str = ("tensorboard",)
    run_name: str | None = None
    project: str = "huggingface"
    trackio_space_id: str | None = None
    trackio_bucket_id: str | None = None
    trackio_static_space_id: str | Literal[False] | None = None
    eval_strategy: Literal["no", "steps", "epoch"] = "steps"
    eval_steps: int | float = 100
    eval_delay: int | float = 0
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: int | float = 200
    save_total_limit: int | None = 2
    save_best: str | None = None
    patience: int | None = None
    probe_steps: int | None = None
    probe_samples: int = 16
    dataloader_num_workers: int | None = None
    dataloader_persistent_workers: bool | None = None
    dataloader_prefetch_factor: int | None = None
    dataloader_pin_memory: bool | None = None
    dataloader_multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None
    ddp_find_unused_parameters: bool = False
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_static_graph: bool | None = None
    fsdp: bool | str | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", () if self.report_to == "none" else (self.report_to,))
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError("train: expected one of num_train_epochs and max_steps, got both: set the one that is not wanted to null")
        for name in _COUNTS:
            if self.__dict__[name] is not None and self.__dict__[name] < 1:
                raise ValueError(f"train.{name}: expected at least 1, got {self.__dict__[name]}")
        for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            steps = self.__dict__[name]
            if name == "warmup_steps" and steps == 0:
                continue
            if not steps > 0 or (steps >= 1 and steps != int(steps)):
                raise ValueError(f"train.{name}: expected a number of steps from 1, or a share of all steps below 1, got {steps}")
        _check_names(self)
        for name in ("num_train_epochs", "learning_rate", "lr_vision", "lr_aligner", "lr_coord_rows"):
            rate = self.__dict__[name]
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"train.{name}: expected a positive number, got {rate}")

    def check_length(self) -> None:
        """Refuse to train for a number of steps that nobody chose.

        Raises:
            ConfigError: neither epochs nor steps.
        """
        if self.num_train_epochs is None and self.max_steps is None:
            raise ConfigError("train: expected one of num_train_epochs and max_steps, got neither")


_COUNTS: Final = (
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit", "patience",
    "probe_steps", "probe_samples", "torch_empty_cache_steps",
)  # fmt: skip


def _check_names(options: TrainOptions) -> None:
    """Optimizer and loggers by name, and what needs an evaluation.

    Raises:
        ValueError: an unknown or refused name, with the nearest legal one or the reason; a metric that nothing would measure.
    """
    name = options.optim
    if name not in OPTIMIZERS:
        reason = next((why for start, why in REFUSED_OPTIMIZERS.items() if name.startswith(start)), None)
        raise ValueError(f"train.optim: {name}: " + (f"refused: {reason}" if reason else _hint(name, OPTIMIZERS)))
    for reporter in options.report_to:
        if reporter not in REPORTERS:
            raise ValueError(f"train.report_to: {reporter}: " + _hint(reporter, REPORTERS))
    if options.save_best is None:
        for key, wanted in (("patience", options.patience is not None), ("lr_scheduler_type", options.lr_scheduler_type in BY_METRIC)):
            if wanted:
                raise ValueError(f"train.{key}: {options.__dict__[key]} follows a metric: name it in train.save_best")
    elif "no" in (options.eval_strategy, options.save_strategy):
        key = "eval_strategy" if options.eval_strategy == "no" else "save_strategy"
        raise ValueError(f"train.{key}: no is not possible with train.save_best: set {key} to steps or epoch, or remove save_best")
    if options.save_strategy == "best" and options.save_best is None:
        raise ValueError("train.save_strategy: best needs a metric: name it in train.save_best")
    if (options.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError("train.gradient_checkpointing_kwargs: use_reentrant=true leaves an adapter without gradient: remove it")


def _hint(name: str, legal: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, legal, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(legal)}"
