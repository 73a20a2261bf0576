"""Generation on a fixed slice while training: teacher-forced numbers do not tell whether boxes come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

if TYPE_CHECKING:
    from coordexp.train.trainer import CoordTrainer

ProbeRun = Callable[[Any], Mapping[str, float]]


class GenerationProbe(TrainerCallback):
    """Every ``every`` steps: ``run(model)`` gives the values of ``best.PROBE_KEYS``, logged as a row of their own.

    All ranks generate (a sharded model needs them) and the first one's values count. Random state and mode of the model are as before
    afterwards, so that a run with the probe trains like one without.
    """

    def __init__(self, every: int, run: ProbeRun) -> None:
        self.every = every
        self.run = run
        self.trainer: CoordTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probe, before the step is logged, evaluated and saved."""
        if state.global_step % self.every:
            return
        assert self.trainer is not None
        trainer = self.trainer
        if trainer.speed is not None:
            trainer.speed.end()
        model = trainer.accelerator.unwrap_model(trainer.model)
        training = model.training
        devices = [args.device] if args.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                box = [dict(self.run(model))]
        finally:
            model.train(training)
        if args.world_size > 1:
            broadcast_object_list(box)
        trainer.probe_values = box[0]
        # Writing a row takes the request to log this step away.
        wanted = control.should_log
        trainer.log(dict(box[0]))
        control.should_log = wanted
