"""``CoordTrainer``: exact sums over exact counts, on top of ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers.trainer import TRAINING_ARGS_NAME

from coordexp.data.dataset import EvenDataset, RecordDataset
from coordexp.data.packed import PackedDataset
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import LossSums
from coordexp.modeling.load import copy_processor_files
from coordexp.train.best import waited
from coordexp.train.checkpoint import ResumableTrainer
from coordexp.train.exact import ExactSteps
from coordexp.train.forward import bind_coord_loss
from coordexp.train.histograms import write_histograms
from coordexp.train.meters import summarize
from coordexp.train.optimizer import GroupRates, keep_whole_states, parameter_groups
from coordexp.train.options import TokenTypeMetrics
from coordexp.train.order import EpochSampler
from coordexp.train.speed import SpeedMeter
from coordexp.train.stopping import StopRequest
from coordexp.vocab.coord_vocab import CoordVocab


class CoordTrainer(ExactSteps, ResumableTrainer):
    """Trains ``objective`` on batches of ``data.collate.TrainCollator``: see :class:`ExactSteps`.

    ``evaluate`` runs the same function on the same kind of sums, so it does not depend on the batch size.
    """

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
        patience: int | None = None,
        on_nonfinite: str = "stop",
        nonfinite_path: Path | None = None,
        identity: dict[str, Any] | None = None,
        stop: StopRequest | None = None,
        token_type_metrics: TokenTypeMetrics | None = None,
        histograms_path: Path | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = token_type_metrics or TokenTypeMetrics()
        bind_coord_loss(model, vocab=vocab, objective=objective, impl=impl, metrics=metrics)
        self.start_sums(vocab=vocab, metrics=metrics, on_nonfinite=on_nonfinite, nonfinite_path=nonfinite_path)
        super().__init__(model=model, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError("several GPUs in one process (DataParallel) are not supported: start with torchrun or accelerate")
        self.objective = objective
        self.processor_from = processor_from
        self.rates = rates or GroupRates(base=self.args.learning_rate, weight_decay=self.args.weight_decay)
        self.histograms_path = histograms_path
        self.keep_checkpoints = keep_checkpoints
        self.patience = patience
        self.identity = {"processes": self.args.world_size, "window": 2, **(identity or {})}
        self.stop = stop or StopRequest()
        self.speed: SpeedMeter | None = None
        self.probe_values: dict[str, float] = {}
        self._sampler: EpochSampler | None = None
        self._eval_loader: Any = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The window's batches, see :class:`ExactSteps`."""
        if self.speed is not None:
            self.speed.begin()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.speed is not None and self._window is not None:
            self.speed.batches(batches, self._window.text + self._window.coord)
        return batches, None

    def _signal(self) -> int:
        return self.stop.signum

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the arguments on :func:`parameter_groups`."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer: Any = optimizer_class(parameter_groups(trained, self.rates), **options)
            if options.get("optim_bits") == 8:
                keep_whole_states(trained, self.optimizer)
        return self.optimizer

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After a step: where a signal asked for it, save and end training."""
        if self.speed is not None:
            self.speed.end()
        if self.stopped_by and not self.control.should_training_stop:
            self.control.should_save = True
            self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace ``Trainer``'s loss by the window's own sums, reduced once over the ranks."""
        if "loss" in logs:
            logs = self._window_row({k: v for k, v in logs.items() if k != "loss"})
        super().log(logs, start_time)

    def _window_row(self, kept: dict[str, float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        samples = 0.0
        # Empty where every step of the window was left out: there is nothing to report then, and no number stands in for it.
        if self._train_sums:
            sums = self.reduced(self._train_sums)
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
        sums = self._train_sums
        window = {"names": list(sums.names), "bins": [list(pair) for pair in sums.bins], "vector": sums.vector.cpu()}
        return {"sums": window, "skipped_steps": self.skipped_steps, "probe": dict(self.probe_values)}

    def restore_window(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`window_state`."""
        sums = state["sums"]
        bins = tuple((name, size) for name, size in sums["bins"])
        self._train_sums = LossSums(tuple(sums["names"]), bins, sums["vector"].to(self.args.device))
        self.skipped_steps = state["skipped_steps"]
        self.probe_values = dict(state["probe"])

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Probe values can be the best metric too. A new best, and the end by ``patience``, is saved whatever ``save_steps`` says."""
        new = super()._determine_best_metric({**metrics, **{f"eval_{k}": v for k, v in self.probe_values.items()}}, trial)
        done = self.patience is not None and waited(self.state) >= self.patience
        if new or done:
            self.control.should_save = True
        if done:
            self.control.should_training_stop = True
        return bool(new)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of the whole set from one pair of sums; nothing is averaged over batches."""
        sums = self.evaluation_sums(self.get_eval_dataloader(eval_dataset))
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
        """Batches of the evaluation data, every sample once. Only the own set keeps workers; ``Trainer`` reads any set by the first's."""
        if eval_dataset is None and self._eval_loader is not None:
            # It counts its rounds as epochs, and the order of the objects would be another one in every evaluation.
            self._eval_loader.set_epoch(0)
            return self._eval_loader
        loader = self._get_dataloader(
            dataset=self._even(self.eval_dataset if eval_dataset is None else eval_dataset, self.args.eval_batch_size),
            description="Evaluation",
            batch_size=self.args.eval_batch_size,
            sampler_fn=self._get_eval_sampler,
        )
        if eval_dataset is None and self.args.dataloader_persistent_workers:
            self._eval_loader = loader
        return loader

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        # Else a new iterator takes a number from the global random state, and persistent workers, with their one iterator, would
        # leave other numbers to dropout than none.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

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
