"""Options of the ``train`` section. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


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


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Optimisation and bookkeeping; names follow ``transformers.TrainingArguments``.

    ``lr_vision``, ``lr_aligner`` and ``lr_coord_rows`` stand in for ``learning_rate`` in that part (None: the same).
    ``min_lr_ratio`` is the share of its peak at which a cosine schedule ends, of every learning rate alike.
    ``on_nonfinite``: a step with a loss or gradient that is no number ends training, or is left out and counted. ``probe_steps``: every so
    many steps ``probe_samples`` validation images are generated on and scored. ``save_best``: the metric (as in an evaluation, without
    ``eval_``; or ``probe/...``) whose best checkpoint is kept beside the newest ones.
    """

    max_steps: int = 100
    per_device_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 32
    learning_rate: float = 1e-4
    lr_vision: float | None = None
    lr_aligner: float | None = None
    lr_coord_rows: float | None = None
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    warmup_steps: int = 50
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    min_lr_ratio: float = 0.0
    group_by_length: bool = False
    bf16: bool = False
    logging_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 200
    save_total_limit: int | None = 2
    save_best: str | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    probe_steps: int | None = None
    probe_samples: int = 16
    dataloader_workers: int = 0
    report_to: tuple[str, ...] = field(default=("tensorboard",))

    def __post_init__(self) -> None:
        counts = ("max_steps", "per_device_batch_size", "gradient_accumulation_steps", "eval_batch_size")
        for name in (*counts, "logging_steps", "eval_steps", "save_steps", "save_total_limit", "probe_steps", "probe_samples"):
            if self.__dict__[name] is not None and self.__dict__[name] < 1:
                raise ValueError(f"train.{name}: expected at least 1, got {self.__dict__[name]}")
        for name in ("learning_rate", "lr_vision", "lr_aligner", "lr_coord_rows"):
            rate = self.__dict__[name]
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"train.{name}: expected a positive number, got {rate}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"train.min_lr_ratio: expected a number from 0 to 1, got {self.min_lr_ratio}")
        if self.min_lr_ratio > 0 and self.scheduler != "cosine":
            raise ValueError(
                f"train.min_lr_ratio: only the cosine schedule has a floor: set train.scheduler=cosine or leave it 0, got {self.scheduler}"
            )
