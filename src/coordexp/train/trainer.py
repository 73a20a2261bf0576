"""``CoordTrainer``: exact sums over exact counts, on top of ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers.trainer import TRAINING_ARGS_NAME

from coordexp.data.dataset import EvenDataset, RecordDataset
from coordexp.data.packed import PackedDataset
from coordexp.errors import ConfigError
from coordexp.losses.linear import IGNORE, CoordLossOutput
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import LossSums, Normalizer
from coordexp.modeling.load import copy_processor_files
from coordexp.train.checkpoint import ResumableTrainer
from coordexp.train.forward import bind_coord_loss
from coordexp.train.histograms import write_histograms
from coordexp.train.meters import step_sums, summarize
from coordexp.train.nonfinite import NonFiniteError, StepWatch, report
from coordexp.train.optimizer import GroupRates, parameter_groups
from coordexp.train.options import TokenTypeMetrics
from coordexp.train.order import EpochSampler
from coordexp.train.speed import SpeedMeter
from coordexp.train.stopping import StopRequest
from coordexp.vocab.coord_vocab import CoordVocab

# What the collator adds beside the model's own inputs and the objective's.
BOOKKEEPING = ("image_ids", "token_roles", "coord_slots")


class CoordTrainer(ResumableTrainer):
    """Trains ``objective`` on batches of ``data.collate.TrainCollator``.

    The loss of a micro-batch is ``sum / count`` with the counts of the whole accumulation window and all
    ranks, taken from the labels before the first backward; ``Trainer`` divides nothing. ``evaluate`` runs
    the same function on the same kind of sums, so it does not depend on the batch size.

    A loss or gradient that is not finite, on any rank, stops all ranks before the optimizer moves, or with ``on_nonfinite='skip'``
    leaves the step out on all of them: weights, optimizer state and metrics stay as they were, the schedule goes on, and
    ``accum/skipped_steps`` counts it. Either way ``nonfinite_path`` gets the sample ids.
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
        rates: GroupRates | None = None,
        keep_checkpoints: int | None = None,
        on_nonfinite: str = "stop",
        nonfinite_path: Path | None = None,
        identity: dict[str, Any] | None = None,
        stop: StopRequest | None = None,
        token_type_metrics: TokenTypeMetrics | None = None,
        histograms_path: Path | None = None,
        **kwargs: Any,
    ) -> None:
        self.token_type_metrics = token_type_metrics or TokenTypeMetrics()
        bind_coord_loss(model, vocab=vocab, objective=objective, impl=impl, metrics=self.token_type_metrics)
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError("several GPUs in one process (DataParallel) are not supported: start with torchrun or accelerate")
        self.objective = objective
        self.vocab = vocab
        self.processor_from = processor_from
        self.rates = rates or GroupRates(base=self.args.learning_rate, weight_decay=self.args.weight_decay)
        self.histograms_path = histograms_path
        self.keep_checkpoints = keep_checkpoints
        self.on_nonfinite = on_nonfinite
        self.nonfinite_path = nonfinite_path
        self.identity = {"processes": self.args.world_size, **(identity or {})}
        self.stop = stop or StopRequest()
        self.speed: SpeedMeter | None = None
        self.probe_values: dict[str, float] = {}
        self.skipped_steps = 0
        self._stopping = 0
        self._sampler: EpochSampler | None = None
        self._window: Normalizer | None = None
        self._watch = StepWatch()
        self._step_sums = LossSums()
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
        if self.speed is not None:
            self.speed.begin()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._window = self.count_positions(batches, device)
            if self.speed is not None:
                self.speed.batches(batches, self._window.text + self._window.coord)
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
        self._watch.add(inputs["image_ids"], output.loss)
        if self.is_deepspeed_enabled and bool(self._watch.bad()):
            # Its engine moves the weights inside the backward: there is no later moment.
            raise NonFiniteError(report(self.nonfinite_path, step=self._next, grad_norm=0.0, rows=[self._watch.row()], skipped=False))
        sums, one = step_sums(output, inputs, self.token_type_metrics), torch.ones((), dtype=torch.float64, device=output.loss.device)
        samples = {"samples": (one * len(inputs["image_ids"]), one)}
        self._step_sums = self._step_sums + LossSums({**sums.values, **samples}, sums.histograms)
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _run(self, model: Any, inputs: dict[str, Any], normalizer: Normalizer | None) -> CoordLossOutput:
        forwarded = {k: v for k, v in inputs.items() if k not in BOOKKEEPING}
        output: CoordLossOutput = model(**forwarded, normalizer=normalizer)
        return output

    @property
    def _next(self) -> int:
        """The number of the step that is being made."""
        return int(self.state.global_step) + 1

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last moment before the optimizer moves: all ranks agree, in one collective, whether it may, and whether to stop after."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device)
        asked = torch.tensor(self.stop.signum, device=self.args.device)
        flags = torch.stack(
            [self._watch.bad().to(asked.device) + (~torch.isfinite(value)).to(asked), (asked == 15).to(asked), (asked == 2).to(asked)]
        )
        bad, terminated, interrupted = self.accelerator.reduce(flags, reduction="sum").tolist()
        self._stopping = 15 if terminated else 2 if interrupted else 0
        if bad:
            self._refuse_step(model, float(value))
        else:
            self._train_sums = self._train_sums + self._step_sums
        self._step_sums = LossSums()
        self._watch.clear()
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the arguments on :func:`parameter_groups`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer: Any = optimizer_class(parameter_groups(trained, self.rates), **options)
        return self.optimizer

    def _refuse_step(self, model: Any, norm: float) -> None:
        skip = self.on_nonfinite == "skip"
        rows = gather_object([self._watch.row()])
        path = self.nonfinite_path if self.is_world_process_zero() else None
        told = report(path, step=self._next, grad_norm=norm, rows=rows, skipped=skip)
        if not skip:
            raise NonFiniteError(f"{told}: training stopped before the optimizer moved; train.on_nonfinite=skip leaves such steps out")
        self.skipped_steps += 1
        # An optimizer leaves a parameter without gradient alone: no decay, no momentum, no count.
        for parameter in model.parameters():
            parameter.grad = None

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After a step: where a signal asked for it, save and end training."""
        if self.speed is not None:
            self.speed.end()
        if self._stopping and not self.control.should_training_stop:
            self.control.should_save = True
            self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @property
    def stopped_by(self) -> int:
        """Number of the signal that ended training, on whichever rank it arrived; 0 for none."""
        return self._stopping

    def _reduce(self, sums: LossSums) -> LossSums:
        return sums.unpack(self.accelerator.reduce(sums.pack(), reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace ``Trainer``'s loss by the window's own sums, reduced once over the ranks."""
        if "loss" in logs:
            logs = self._window_row({k: v for k, v in logs.items() if k != "loss"})
        super().log(logs, start_time)

    def _window_row(self, kept: dict[str, float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        samples = 0.0
        # Empty where every step of the window was left out: there is nothing to report then, and no number stands in for it.
        if self._train_sums.values:
            sums = self._reduce(self._train_sums)
            metrics, samples = summarize(sums, self.objective, self.token_type_metrics), float(sums.sum("samples"))
            self._write_histograms(sums, "")
        self._train_sums = LossSums()
        speed = {} if self.speed is None else self.speed.take(samples, self.args.world_size, self._total)
        return {
            **metrics,
            **kept,
            "pack/num_samples": samples,
            "accum/grad_steps": float(self.args.gradient_accumulation_steps),
            "accum/current_grad_steps": float(self.current_gradient_accumulation_steps),
            "accum/skipped_steps": float(self.skipped_steps),
            **speed,
        }

    def _total(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.to(self.args.device), reduction="sum")

    def _write_histograms(self, sums: LossSums, prefix: str) -> None:
        if self.is_world_process_zero():
            step, callbacks = int(self.state.global_step), self.callback_handler.callbacks
            write_histograms(sums, step=step, prefix=prefix, path=self.histograms_path, callbacks=callbacks)

    def window_state(self) -> dict[str, Any]:
        """Sums of the unfinished log window, and what else the log continues from."""
        sums = {name: torch.stack(pair).cpu() for name, pair in self._train_sums.values.items()}
        histograms = {name: counts.cpu() for name, counts in self._train_sums.histograms.items()}
        return {"sums": sums, "histograms": histograms, "skipped_steps": self.skipped_steps, "probe": dict(self.probe_values)}

    def restore_window(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`window_state`."""
        device = self.args.device
        values = {name: (pair[0].to(device), pair[1].to(device)) for name, pair in state["sums"].items()}
        self._train_sums = LossSums(values, {name: counts.to(device) for name, counts in state["histograms"].items()})
        self.skipped_steps = state["skipped_steps"]
        self.probe_values = dict(state["probe"])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Probe values can be the best metric too; a new best is saved at once, whatever ``save_steps`` says."""
        new = super()._determine_best_metric({**metrics, **{f"eval_{k}": v for k, v in self.probe_values.items()}}, trial)
        if new:
            self.control.should_save = True
        return bool(new)

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
                sums = sums + step_sums(output, inputs, self.token_type_metrics)
        if not sums.values:
            raise ConfigError("evaluation got no batch: the evaluation data is empty")
        sums = self._reduce(sums)
        self._write_histograms(sums, f"{metric_key_prefix}_")
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in summarize(sums, self.objective, self.token_type_metrics).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_train_dataloader(self) -> Any:
        """Batches of the training data; where it does not divide over the ranks, fillers complete the last ones."""
        data = self._even(self.train_dataset, self.args.train_batch_size)
        return self._get_dataloader(
            dataset=data,
            description="Training",
            batch_size=self.args.train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of the evaluation data, every sample once."""
        data = self._even(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size)
        return super().get_eval_dataloader(data)

    def _even(self, data: Any, batch: int) -> Any:
        ranks = self.args.world_size
        return EvenDataset(data, multiple=ranks * batch) if ranks > 1 and isinstance(data, RecordDataset) else data

    def set_epoch(self, epoch: int) -> None:
        """Order of the samples and of the objects in them."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        self.train_dataset.set_epoch(epoch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(data, PackedDataset):
            return SequentialSampler(data)  # the schedule shuffles
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        grouped = self.args.train_sampling_strategy == "group_by_length"
        self._sampler = EpochSampler(
            len(self.train_dataset),
            seed=seed,
            slots=len(data),
            lengths=data.lengths() if grouped else None,
            window=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
        )
        return self._sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        return SequentialSampler(eval_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            # A pickle that nothing of ours reads: loading it would run whatever it holds.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if self.processor_from is not None:
                copy_processor_files(self.processor_from, folder)
