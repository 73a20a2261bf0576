"""Options of the ``train`` section. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from coordexp.errors import ConfigError

Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr",
    "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip
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
    "lr_vision", "lr_aligner", "lr_coord_rows", "save_best", "probe_steps", "probe_samples", "on_nonfinite",
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
    many steps ``probe_samples`` validation images are generated on and scored. ``save_best``: the metric (as in an evaluation, without
    ``eval_``; or ``probe/...``) whose best checkpoint is kept beside the newest ones.

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
    report_to: tuple[str, ...] = field(default=("tensorboard",))
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
    ddp_backend: Literal["nccl", "mpi", "xccl", "gloo", "hccl"] | None = None
    ddp_timeout: int = 1800
    fsdp: bool | str | None = None
    fsdp_config: dict[str, Any] | str | None = None
    deepspeed: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError("train: expected one of num_train_epochs and max_steps, got both: set the one that is not wanted to null")
        for name in _COUNTS:
            if self.__dict__[name] is not None and self.__dict__[name] < 1:
                raise ValueError(f"train.{name}: expected at least 1, got {self.__dict__[name]}")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            steps = self.__dict__[name]
            if not steps > 0 or (steps >= 1 and steps != int(steps)):
                raise ValueError(f"train.{name}: expected a number of steps from 1, or a share of all steps below 1, got {steps}")
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
    "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
    "probe_steps", "probe_samples", "torch_empty_cache_steps",
)  # fmt: skip
