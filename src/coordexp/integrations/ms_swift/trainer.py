"""ms-swift's supervised trainer with the objective, its exact normalisation and the registry's metrics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from swift.dataset import LazyLLMDataset
from swift.trainers import Seq2SeqTrainer
from swift.utils import get_logger
from torch import Tensor
from transformers.trainer_utils import speed_metrics

from coordexp.data.collate import IGNORE
from coordexp.data.images import image_size
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, CoordexpError
from coordexp.grammar import geometries_of
from coordexp.integrations.ms_swift import contract as upstream
from coordexp.integrations.ms_swift.checks import (
    banner,
    check_prompts,
    contract_of,
    look_at_rows,
    refuse_arguments,
    resize_note,
)
from coordexp.integrations.ms_swift.options import LOSS_NAME, read_config
from coordexp.integrations.ms_swift.samples import EvenSamples, SwiftCollator, SwiftSamples
from coordexp.losses.linear import CoordLossOutput
from coordexp.losses.sums import LossSums, Normalizer
from coordexp.modeling.load import pixel_budget
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest
from coordexp.train.forward import bind_coord_loss
from coordexp.train.meters import step_sums, summarize
from coordexp.train.nonfinite import NonFiniteError, StepWatch, report
from coordexp.train.trainer import BOOKKEEPING

logger = get_logger()
# What ms-swift puts beside the model's inputs and its own ``compute_loss`` takes out again.
_SWIFT_KEYS = ("compute_loss_func", "text_position_ids", "channel")


def make_trainer(*, args: Any, **kwargs: Any) -> Any:
    """In the place of ``Seq2SeqTrainer``: that class itself, unless ``--loss_type coordexp`` asks for this module's."""
    if args.loss_type != LOSS_NAME:
        return Seq2SeqTrainer(args=args, **kwargs)
    try:
        return CoordSwiftTrainer(args=args, **kwargs)
    except CoordexpError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


class CoordSwiftTrainer(Seq2SeqTrainer):
    """As ``coordexp.train.trainer.CoordTrainer``, on ms-swift's model, data, optimizer, checkpoints and callbacks.

    The loss of a micro-batch is ``sum / count`` with the counts of the whole accumulation window and all ranks; evaluation runs
    the same function over the whole set. A loss or gradient that is not finite stops all ranks before the optimizer moves.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model: Any, args: Any, template: Any, train_dataset: Any, eval_dataset: Any = None, **kwargs: Any) -> None:
        refuse_arguments(args, template, model)
        self.source = read_config()
        self.config = self.source.config
        self.folder = Path(model.model_dir)
        self.contract = contract_of(self.folder, template.tokenizer, self.config.swift.convention)
        train, evaluation = self._samples("train", train_dataset, template), self._samples("eval", eval_dataset, template)
        self.facts = [look_at_rows(data.name, data.rows, self.contract.codec) for data in (train, evaluation) if data is not None]
        self.prompt = check_prompts(self.folder, self.facts)
        if self.config.objective.alpha is not None and any(fact.without_objects for fact in self.facts):
            raise ConfigError("objective.alpha: the target's width follows the object's size, and some rows have no objects.bbox: unset it")
        bind_coord_loss(
            model,
            vocab=self.contract.vocab,
            objective=self.config.objective,
            impl=self.config.swift.impl,
            metrics=self.config.token_type_metrics,
        )
        # No logits are made, so there is nothing to keep; and its compacted labels would part from the targets beside them.
        args.use_logits_to_keep = False
        # Its filter hides a loss that is no number from the log.
        args.logging_nan_inf_filter = False
        self._window: Normalizer | None = None
        self._watch = StepWatch()
        self._step_sums = LossSums()
        self._train_sums = LossSums()
        super().__init__(model=model, args=args, template=template, train_dataset=train, eval_dataset=evaluation, **kwargs)
        if self.args.world_size > 1 and self.accelerator.distributed_type == DistributedType.NO:
            raise ConfigError(
                f"{self.args.world_size} processes were started and accelerate joined none of them: each would train alone on its share: "
                "without a GPU pass --use_cpu true"
            )
        for line in self._banner(train):
            logger.info_if(f"coordexp: {line}", cond=self.is_world_process_zero())

    def _samples(self, name: str, data: Any, template: Any) -> Any:
        """ms-swift's data set as ours.

        Raises:
            ConfigError: a streamed one.
        """
        if data is None:
            return None
        if not isinstance(data, LazyLLMDataset):
            raise ConfigError(f"--loss_type {LOSS_NAME}: expected a data set of rows, got {type(data).__name__}: leave --streaming off")
        return SwiftSamples(name, data.dataset, data.encode_func, template.tokenizer, self.contract.codec)

    def _banner(self, train: SwiftSamples) -> list[str]:
        resize, installed = None, upstream.version()
        images = train.rows[0].get("images") or []
        path = images[0].get("path") if images else None
        if path is not None and Path(path).is_file():
            grid, processor = train[0]["image_grid_thw"][0], self.template.processor.image_processor
            resize = resize_note(processor, image_size(Path(path)), grid, processor.get_number_of_image_patches)
        note = (
            None
            if installed == upstream.TESTED
            else f"ms-swift {installed} has the shape of {upstream.TESTED}, which was tested; it was not"
        )
        return banner(self.model, self.args, self.source, self.contract, self.facts, resize, note)

    def _get_data_collator(self, args: Any, template: Any) -> SwiftCollator:
        return SwiftCollator(super()._get_data_collator(args, template), template.padding_side)

    def _count(self, batches: list[dict[str, Any]], device: torch.device) -> Normalizer:
        """Supervised text and coordinate positions of the batches, summed over ranks."""
        vocab = self.contract.vocab
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            labels = batch["shift_labels"].to(device)
            coord = (labels >= vocab.start) & (labels < vocab.start + vocab.num_bins)
            counts += torch.stack([((labels != IGNORE) & ~coord).sum(), coord.sum()])
        total = self.accelerator.reduce(counts, reduction="sum")
        return Normalizer(text=total[0], coord=total[1])

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The window's batches; their counts become the denominators of its losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._window = self._count(batches, device)
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Loss of a micro-batch. Times the number of ranks, because their gradients are averaged."""
        output = self._run(model, inputs, self._window)
        self._watch.add(inputs["image_ids"], output.loss)
        if self.is_deepspeed_enabled and bool(self._watch.bad()):
            raise NonFiniteError(report(self._path, step=self._next, grad_norm=0.0, rows=[self._watch.row()], skipped=False))
        sums, one = (
            step_sums(output, inputs, self.config.token_type_metrics),
            torch.ones((), dtype=torch.float64, device=output.loss.device),
        )
        samples = {"samples": (one * len(inputs["image_ids"]), one)}
        self._step_sums = self._step_sums + LossSums({**sums.values, **samples}, sums.histograms)
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _run(self, model: Any, inputs: dict[str, Any], normalizer: Normalizer | None) -> CoordLossOutput:
        forwarded = {k: v for k, v in inputs.items() if k not in BOOKKEEPING and k not in _SWIFT_KEYS}
        output = model(**forwarded, normalizer=normalizer)
        if not isinstance(output, CoordLossOutput):
            raise ConfigError(
                f"--template: {type(self.template).__name__} of ms-swift drops the labels on their way into the model's forward, so the "
                "objective cannot be computed there: Qwen3-VL's template is the one that was tested"
            )
        return output

    @property
    def _next(self) -> int:
        return int(self.state.global_step) + 1

    @property
    def _path(self) -> Path | None:
        return Path(self.args.output_dir) / "nonfinite.jsonl" if self.is_world_process_zero() else None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last moment before the optimizer moves: all ranks agree whether it may. ms-swift alone would skip a NaN silently."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device)
        bad = self.accelerator.reduce(self._watch.bad().to(value.device) + (~torch.isfinite(value)).to(value.device), reduction="sum")
        if bool(bad):
            told = report(self._path, step=self._next, grad_norm=float(value), rows=gather_object([self._watch.row()]), skipped=False)
            raise NonFiniteError(f"{told}: training stopped before the optimizer moved")
        self._train_sums, self._step_sums = self._train_sums + self._step_sums, LossSums()
        self._watch.clear()
        return norm

    def _reduce(self, sums: LossSums) -> LossSums:
        return sums.unpack(self.accelerator.reduce(sums.pack(), reduction="sum"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the trainer's loss by the window's own sums, reduced once over the ranks."""
        if "loss" in logs:
            sums, self._train_sums = self._reduce(self._train_sums), LossSums()
            logs = {
                **summarize(sums, self.config.objective, self.config.token_type_metrics),
                **{k: v for k, v in logs.items() if k != "loss"},
                "pack/num_samples": float(sums.sum("samples")),
                "accum/grad_steps": float(self.args.gradient_accumulation_steps),
                "accum/current_grad_steps": float(self.current_gradient_accumulation_steps),
            }
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of the evaluation data, every sample once."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size > 1 and isinstance(data, SwiftSamples):
            data = EvenSamples(data, self.args.world_size * self.args.eval_batch_size)
        return super().get_eval_dataloader(data)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of the whole set from one pair of sums; nothing is averaged over batches."""
        start = time.time()
        loader = self.get_eval_dataloader(eval_dataset)
        model = self._wrap_model(self.model, training=False, dataloader=loader)
        model.eval()
        sums, count, batches = LossSums(), 0, 0
        with torch.no_grad():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    output = self._run(model, inputs, None)
                sums = sums + step_sums(output, inputs, self.config.token_type_metrics)
                count, batches = count + len(inputs["image_ids"]), batches + 1
                self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if not sums.values:
            raise ConfigError("evaluation got no batch: the evaluation data is empty")
        seen = self.accelerator.reduce(torch.tensor(count, device=self.args.device), reduction="sum")
        values = summarize(self._reduce(sums), self.config.objective, self.config.token_type_metrics)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in values.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=int(seen), num_steps=batches)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """ms-swift's checkpoint, with ``coordexp.json`` in it where a prediction can rely on one."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.prompt is None or not (folder / "config.json").is_file():
            return
        low, high = pixel_budget(self.template.processor.image_processor)
        manifest = CheckpointManifest(
            convention=self.contract.codec.convention,
            num_bins=self.contract.codec.num_bins,
            coord_start=self.contract.vocab.start,
            order="sorted" if all(fact.ordered for fact in self.facts) else "random",
            geometries=geometries_of(frozenset().union(*(fact.geometries for fact in self.facts))),
            prompt=self.prompt,
            min_pixels=low,
            max_pixels=high,
            versions={"ms-swift": upstream.version()},
        )
        with atomic_text(folder / CHECKPOINT_MANIFEST) as file:
            file.write(manifest.text())
