"""Options of the ``train`` section. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Optimisation and bookkeeping; names follow ``transformers.TrainingArguments``.

    ``on_nonfinite``: a step with a loss or gradient that is no number ends training, or is left out and counted. ``probe_steps``: every so
    many steps ``probe_samples`` validation images are generated on and scored. ``save_best``: the metric (as in an evaluation, without
    ``eval_``; or ``probe/...``) whose best checkpoint is kept beside the newest ones.
    """

    max_steps: int = 100
    per_device_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    warmup_steps: int = 50
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
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
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"train.learning_rate: expected a positive number, got {self.learning_rate}")
