"""Generation on a fixed slice while training: teacher-forced numbers do not tell whether boxes come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import DistributedType, gather_object
from transformers import TrainerCallback

from coordexp.train.forward import unwrapped
from coordexp.vocab.adapters import rows_in_place

if TYPE_CHECKING:
    from coordexp.train.trainer import CoordTrainer



class ProbeRun(Protocol):
    """Generates on the ``share`` ``(rank, ranks)`` of the images and scores what ``gather`` made of the rows of all ranks."""

    def __call__(self, model: Any, *, share: tuple[int, int], gather: Callable[[list[str]], list[str]]) -> Mapping[str, float]: ...


class GenerationProbe(TrainerCallback):
    """Every ``every`` steps, and at the last, which is evaluated too: ``run`` gives the values of ``best.PROBE_KEYS``, logged as a row of
    their own.

    Each rank generates its share of the images. Of a sharded model all ranks generate all of them together, since each forward pass
    needs them all. Weights, random state and mode of the model are as before afterwards, so that a run with the probe trains like one
    without.
    """

    def __init__(self, every: int, run: ProbeRun) -> None:
        self.every = every
        self.run = run
        self.trainer: CoordTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probe, before the step is logged, evaluated and saved."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        assert self.trainer is not None
        trainer = self.trainer
        if trainer.speed is not None:
            trainer.speed.end()
        model: Any = trainer.model
        sharded = is_sharded(trainer.accelerator)
        share = (0, 1) if sharded else (args.process_index, args.world_size)
        training = model.training
        devices = [args.device] if args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), nullcontext() if sharded or unwrapped(model) is model else rows_in_place(model):
                values = dict(self.run(model, share=share, gather=list if sharded else gather_object))
        finally:
            model.train(training)
        trainer.probe_values = values
        # Writing a row takes the request to log this step away.
        wanted = control.should_log
        trainer.log(dict(values))
        control.should_log = wanted


def is_sharded(accelerator: Any) -> bool:
    """Whether a rank holds a part of the weights only."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return bool(accelerator.state.deepspeed_plugin.zero_stage == 3)
    return bool(accelerator.distributed_type == DistributedType.FSDP)
