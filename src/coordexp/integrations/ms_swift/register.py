"""Puts the loss name and the trainer into ms-swift's tables."""

from __future__ import annotations

from typing import Any, Final

from swift.loss import BaseLoss, loss_map
from swift.trainers import TrainerFactory

from coordexp.errors import ConfigError
from coordexp.integrations.ms_swift.contract import check
from coordexp.integrations.ms_swift.options import LOSS_NAME

TRAINER: Final = "coordexp.integrations.ms_swift.trainer.make_trainer"


class CoordLoss(BaseLoss):
    """The name ``--loss_type coordexp``. The loss is computed inside the model's forward, from hidden states, so this is never called."""

    def __init__(self, args: Any, trainer: Any) -> None:
        if type(trainer).__name__ != "CoordSwiftTrainer":
            raise ConfigError(f"--loss_type {LOSS_NAME}: only for `swift sft` with --task_type causal_lm, got {type(trainer).__name__}")
        super().__init__(args, trainer)

    def __call__(self, outputs: Any, labels: Any, *, num_items_in_batch: Any = None, loss_scale: Any = None, **kwargs: Any) -> Any:
        raise ConfigError(f"--loss_type {LOSS_NAME}: its trainer computes the loss, and something else asked for it")


def register() -> None:
    """Add ``--loss_type coordexp``. Without that argument ms-swift runs its own trainer, untouched.

    Raises:
        ConfigError: an ms-swift of another shape, see :mod:`coordexp.integrations.ms_swift.contract`.
    """
    check()
    loss_map[LOSS_NAME] = CoordLoss
    TrainerFactory.TRAINER_MAPPING["causal_lm"] = TRAINER
