"""What makes a ``transformers.Trainer`` exact: counts before the first backward, sums over counts, one decision on every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from coordexp.errors import ConfigError
from coordexp.losses.linear import CoordLossOutput
from coordexp.losses.sums import LossSums, Normalizer
from coordexp.train.forward import coord_loss
from coordexp.train.meters import step_sums
from coordexp.train.nonfinite import NonFiniteError, StepWatch, report
from coordexp.train.options import TokenTypeMetrics
from coordexp.vocab.coord_vocab import CoordVocab


def whole(norm: Any) -> Any:
    """A gradient norm as a number or an ordinary tensor: of sharded parameters torch gives a DTensor, this rank's part of it."""
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    return 0.0 if norm is None else norm


class ExactSteps:
    """Stands before a ``Trainer`` in the list of base classes; the model is bound by :func:`bind_coord_loss`, batches hold ``targets``.

    The loss of a micro-batch is ``sum / count`` with the counts of the whole accumulation window and all ranks, taken from the labels on
    the host before the first backward; ``Trainer`` divides nothing. A loss or gradient that is not finite, on any rank, stops all ranks
    before the optimizer moves, or with ``on_nonfinite='skip'`` leaves the step out on all of them: weights, optimizer state and metrics
    stay as they were, and ``skipped_steps`` counts it. Either way ``nonfinite_path`` gets the sample ids.
    """

    loss_is_scaled_for_ga = True
    # Of the trainer behind.
    accelerator: Any
    args: Any
    state: Any
    is_deepspeed_enabled: bool

    def start_sums(
        self, *, vocab: CoordVocab, metrics: TokenTypeMetrics, on_nonfinite: str = "stop", nonfinite_path: Path | None = None
    ) -> None:
        """The state of an empty window."""
        self.vocab = vocab
        self.token_type_metrics = metrics
        self.on_nonfinite = on_nonfinite
        self.nonfinite_path = nonfinite_path
        self.skipped_steps = 0
        self.stopped_by = 0
        self._window: Normalizer | None = None
        self._watch = StepWatch()
        self._step_sums = LossSums()
        self._train_sums = LossSums()

    def count_positions(self, batches: list[dict[str, Any]], device: torch.device) -> Normalizer:
        """Supervised text and coordinate positions of the batches, summed over ranks."""
        counts = [batch["targets"].counts(self.vocab) for batch in batches]
        total = self.accelerator.reduce(torch.tensor(counts, device=device).sum(dim=0), reduction="sum")
        return Normalizer(text=total[0], coord=total[1])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The window's batches; their counts become the denominators of its losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if batches:
            self._window = self.count_positions(batches, device)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Loss of a micro-batch. Times the number of ranks, because their gradients are averaged."""
        output = self.run_batch(model, inputs, self._window)
        self._watch.add(inputs["targets"].image_ids, output.loss)
        if self.is_deepspeed_enabled and bool(self._watch.bad()):
            # Its engine moves the weights inside the backward: there is no later moment.
            raise NonFiniteError(report(self.nonfinite_path, step=self._next, grad_norm=0.0, rows=[self._watch.row()], skipped=False))
        self._step_sums = self._step_sums + step_sums(output, inputs["targets"], self.token_type_metrics)
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def run_batch(self, model: Any, inputs: dict[str, Any], normalizer: Normalizer | None) -> CoordLossOutput:
        """The bound model on a batch; ``normalizer`` None: the batch's own counts."""
        return coord_loss(model, {**inputs, "targets": inputs["targets"].divided_by(normalizer)})

    @property
    def _next(self) -> int:
        """The number of the step that is being made."""
        return int(self.state.global_step) + 1

    def _signal(self) -> int:
        """Number of the signal that asked this rank to stop after the step; 0 for none."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last moment before the optimizer moves: all ranks agree, in one collective, whether it may, and whether to stop after."""
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[misc]
        value = torch.as_tensor(norm, device=self.args.device)
        asked = torch.tensor(self._signal(), device=self.args.device)
        flags = torch.stack(
            [self._watch.bad().to(asked.device) + (~torch.isfinite(value)).to(asked), (asked == 15).to(asked), (asked == 2).to(asked)]
        )
        bad, terminated, interrupted = self.accelerator.reduce(flags, reduction="sum").tolist()
        self.stopped_by = 15 if terminated else 2 if interrupted else 0
        if bad:
            self._refuse_step(model, float(value))
        else:
            self._train_sums = self._train_sums + self._step_sums
        self._step_sums = LossSums()
        self._watch.clear()
        return norm

    def _refuse_step(self, model: Any, norm: float) -> None:
        skip = self.on_nonfinite == "skip"
        rows = gather_object([self._watch.row()])
        path = self.nonfinite_path if self.accelerator.is_main_process else None
        told = report(path, step=self._next, grad_norm=norm, rows=rows, skipped=skip)
        if not skip:
            raise NonFiniteError(f"{told}: training stopped before the optimizer moved; train.on_nonfinite=skip leaves such steps out")
        self.skipped_steps += 1
        # An optimizer leaves a parameter without gradient alone: no decay, no momentum, no count.
        for parameter in model.parameters():
            parameter.grad = None

    def reduced(self, sums: LossSums) -> LossSums:
        """Summed over ranks, in one collective."""
        total: Tensor = self.accelerator.reduce(sums.vector.to(self.args.device), reduction="sum")
        return sums.at(total)

    def evaluation_sums(self, loader: Any) -> LossSums:
        """Sums of a whole set over all ranks; nothing is averaged over batches.

        Raises:
            ConfigError: there is no batch.
        """
        trainer: Any = self
        model = trainer._wrap_model(trainer.model, training=False, dataloader=loader)
        model.eval()
        sums = LossSums()
        with torch.no_grad():
            for batch in loader:
                inputs = trainer._prepare_inputs(batch)
                with trainer.compute_loss_context_manager():
                    output = self.run_batch(model, inputs, None)
                sums = sums + step_sums(output, inputs["targets"], self.token_type_metrics)
                trainer.control = trainer.callback_handler.on_prediction_step(self.args, self.state, trainer.control)
        if not sums:
            raise ConfigError("evaluation got no batch: the evaluation data is empty")
        return self.reduced(sums)
