"""``CoordTrainer``: exact sums over exact counts, on top of ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from coordexp.data.packed import PackedDataset
from coordexp.errors import ConfigError
from coordexp.losses.linear import IGNORE, CoordLossOutput
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import LossSums, Normalizer
from coordexp.modeling.load import copy_processor_files
from coordexp.train.forward import bind_coord_loss
from coordexp.train.meters import summarize, with_roles
from coordexp.vocab.coord_vocab import CoordVocab

# What the collator adds beside the model's own inputs and the objective's.
BOOKKEEPING = ("image_ids", "token_roles", "coord_slots")


class CoordTrainer(Trainer):
    """Trains ``objective`` on batches of ``data.collate.TrainCollator``.

    The loss of a micro-batch is ``sum / count`` with the counts of the whole accumulation window and all
    ranks, taken from the labels before the first backward; ``Trainer`` divides nothing. ``evaluate`` runs
    the same function on the same kind of sums, so it does not depend on the batch size.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: Any,
        objective: CoordObjective,
        vocab: CoordVocab,
        impl: str = "auto",
        processor_from: Path | None = None,
        **kwargs: Any,
    ) -> None:
        bind_coord_loss(model, vocab=vocab, objective=objective, impl=impl)
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError("several GPUs in one process (DataParallel) are not supported: start with torchrun or accelerate")
        self.objective = objective
        self.vocab = vocab
        self.processor_from = processor_from
        self._window: Normalizer | None = None
        self._train_sums = LossSums()

    def count_positions(self, batches: list[dict[str, Any]], device: torch.device) -> Normalizer:
        """Supervised text and coordinate positions of the batches, summed over ranks."""
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            labels = batch["shift_labels"].to(device)
            coord = (labels >= self.vocab.start) & (labels < self.vocab.start + self.vocab.num_bins)
            counts[0] += ((labels != IGNORE) & ~coord).sum()
            counts[1] += coord.sum()
        total = self.accelerator.reduce(counts, reduction="sum")
        return Normalizer(text=total[0], coord=total[1])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The window's batches; their counts become the denominators of its losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._window = self.count_positions(batches, device)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a micro-batch. Times the number of ranks, because their gradients are averaged."""
        output = self._run(model, inputs, self._window)
        if not bool(torch.isfinite(output.loss)):
            raise FloatingPointError(
                f"loss is {float(output.loss.detach())} at step {self.state.global_step + 1} (samples {', '.join(inputs['image_ids'])}): "
                "training stopped before the optimizer moved"
            )
        one = torch.ones((), device=output.loss.device)
        samples = LossSums.of({"samples": (one * len(inputs["image_ids"]), one)})
        self._train_sums = self._train_sums + LossSums({**with_roles(output, inputs["token_roles"]).values, **samples.values})
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _run(self, model: Any, inputs: dict[str, Any], normalizer: Normalizer | None) -> CoordLossOutput:
        forwarded = {k: v for k, v in inputs.items() if k not in BOOKKEEPING}
        output: CoordLossOutput = model(**forwarded, normalizer=normalizer)
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Stop on a gradient that is not finite, before the optimizer moves."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise FloatingPointError(f"gradient norm is {float(norm)} at step {self.state.global_step + 1}: training stopped")
        return norm

    def _reduce(self, sums: LossSums) -> LossSums:
        return sums.unpack(self.accelerator.reduce(sums.pack(), reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace ``Trainer``'s loss by the window's own sums, reduced once over the ranks."""
        if "loss" in logs:
            kept = {k: v for k, v in logs.items() if k != "loss"}
            sums = self._reduce(self._train_sums)
            logs = {
                **summarize(sums, self.objective),
                **kept,
                "pack/num_samples": float(sums.sum("samples")),
                "accum/grad_steps": float(self.args.gradient_accumulation_steps),
                "accum/current_grad_steps": float(self.current_gradient_accumulation_steps),
            }
            self._train_sums = LossSums()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of the whole set from one pair of sums; nothing is averaged over batches."""
        loader = self.get_eval_dataloader(eval_dataset)
        model = self._wrap_model(self.model, training=False, dataloader=loader)
        model.eval()
        sums = LossSums()
        with torch.no_grad():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    output = self._run(model, inputs, None)
                sums = sums + with_roles(output, inputs["token_roles"])
        if not sums.values:
            raise ConfigError("evaluation got no batch: the evaluation data is empty")
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in summarize(self._reduce(sums), self.objective).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PackedDataset):
            return SequentialSampler(dataset)  # the schedule shuffles
        if self.args.train_sampling_strategy == "group_by_length":
            generator = torch.Generator().manual_seed(self.args.data_seed if self.args.data_seed is not None else self.args.seed)
            window = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return LengthGroupedSampler(window, lengths=dataset.lengths(), generator=generator)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.processor_from is not None and self.args.should_save:
            copy_processor_files(self.processor_from, Path(output_dir or self.args.output_dir))
