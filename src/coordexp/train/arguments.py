"""From the ``train`` section to ``transformers.TrainingArguments``."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from coordexp.errors import ConfigError
from coordexp.train.best import check_best
from coordexp.train.options import OWN, TrainOptions


def training_arguments(options: TrainOptions, output_dir: Path, *, seed: int) -> TrainingArguments:
    """The options as ``TrainingArguments``, with every default that would bend a number switched off.

    Raises:
        ConfigError: neither epochs nor steps; what transformers refuses, in its own words, or does not know in the installed version.
    """
    options.check_length()
    # A copy, because transformers writes defaults into a dictionary that it is given.
    given = {item.name: copy.deepcopy(options.__dict__[item.name]) for item in dataclasses.fields(options) if item.name not in OWN}
    # Steps win where they are above 0.
    given["max_steps"] = -1 if options.max_steps is None else options.max_steps
    given["num_train_epochs"] = 1.0 if options.num_train_epochs is None else options.num_train_epochs
    given["report_to"] = list(options.report_to) or "none"
    if options.fsdp and not isinstance(options.fsdp_config, str):
        given["fsdp_config"] = {"cpu_ram_efficient_loading": False, **(options.fsdp_config or {})}
    given |= loading(options, gpu=torch.cuda.is_available()) | _checkpointing(options)
    given |= {
        "output_dir": str(output_dir),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        # Ours to do: with a limit of 1 Trainer deletes the newest checkpoint when it is not the best one.
        "save_total_limit": None,
        "metric_for_best_model": options.save_best,
        "greater_is_better": check_best(options),
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "disable_tqdm": True,
    }
    with _one_line("train"):
        return TrainingArguments(**given)


def sharding(options: TrainOptions) -> list[str]:
    """``fsdp`` and ``deepspeed``, whichever the options or the launcher ask for."""
    launched = {key: os.environ.get(f"ACCELERATE_USE_{key.upper()}", "").lower() in ("1", "true") for key in ("fsdp", "deepspeed")}
    return [key for key in launched if options.__dict__[key] or launched[key]]


def try_arguments(options: TrainOptions) -> None:
    """Make the arguments, the optimizer and the schedule once, on a parameter that stands for the model's.

    Raises:
        ConfigError: what does not work, in the library's words; sharding without an accelerator, or with weights on one rank alone.
    """
    for key in sharding(options):
        # On a CPU accelerate would train with DDP in its place, and say nothing.
        if not torch.accelerator.is_available():
            raise ConfigError(
                f"train.{key}: accelerate shards on accelerators only, and here is none: remove it and start with torchrun (DDP)"
            )
    given = options.fsdp_config if isinstance(options.fsdp_config, dict) else {}
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() in ("1", "true") or given.get("cpu_ram_efficient_loading"):
        raise ConfigError(
            "train.fsdp_config: with cpu_ram_efficient_loading the ranks behind the first have no weights when adapters, coordinate rows "
            "and packs are checked: set it to false, in the file of accelerate fsdp_cpu_ram_efficient_loading"
        )
    for key in ("deepspeed", "fsdp_config"):
        named = options.__dict__[key]
        if isinstance(named, str) and not Path(named).is_file():
            raise ConfigError(f"train.{key}: expected a mapping of keys or a JSON file, there is no file {named}")
    args = training_arguments(options, Path("unused"), seed=0)
    steps = max(args.max_steps, 1)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    with _one_line("train.optim"):
        made, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = made([{"params": [parameter], "lr": options.learning_rate}], **settings)
    with _one_line("train.lr_scheduler_kwargs"):
        get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=args.lr_scheduler_kwargs
        )


@contextmanager
def _one_line(key: str) -> Iterator[None]:
    """What a library says of the values that it is given, in one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def loading(options: TrainOptions, *, gpu: bool) -> dict[str, Any]:
    """``dataloader_*``: beside a GPU up to four workers a process that live through all epochs, on a CPU none."""
    count = options.dataloader_num_workers
    if count is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        count = max(1, min(4, (os.cpu_count() or 1) // processes)) if gpu else 0
    persistent, pinned = options.dataloader_persistent_workers, options.dataloader_pin_memory
    return {
        "dataloader_num_workers": count,
        "dataloader_persistent_workers": count > 0 if persistent is None else persistent,
        "dataloader_pin_memory": gpu if pinned is None else pinned,
    }


def _checkpointing(options: TrainOptions) -> dict[str, Any]:
    """``gradient_checkpointing`` under the name that the installed transformers prefers, always the non-reentrant kind: the other gives the
    first adapter of a frozen model no gradient."""
    known = {item.name for item in dataclasses.fields(TrainingArguments)}
    values = {"": options.gradient_checkpointing, "_kwargs": {"use_reentrant": False, **(options.gradient_checkpointing_kwargs or {})}}
    new = "activation_checkpointing" in known
    return {f"gradient_checkpointing{part}": None if new else value for part, value in values.items()} | (
        {f"activation_checkpointing{part}": value for part, value in values.items()} if new else {}
    )
