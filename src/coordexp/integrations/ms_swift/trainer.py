"""ms-swift's supervised trainer with the objective, its exact normalisation and the registry's metrics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from swift.dataset import LazyLLMDataset
from swift.trainers import Seq2SeqTrainer
from swift.utils import get_logger
from torch import Tensor
from transformers.trainer_utils import speed_metrics

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
from coordexp.train.exact import ExactSteps
from coordexp.train.forward import bind_coord_loss
from coordexp.train.meters import summarize

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


class CoordSwiftTrainer(ExactSteps, Seq2SeqTrainer):
    """As ``coordexp.train.trainer.CoordTrainer``, on ms-swift's model, data, optimizer, checkpoints and callbacks.

    ms-swift alone would skip a step whose gradient is NaN and say nothing.
    """

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
        metrics = self.config.token_type_metrics
        bind_coord_loss(model, vocab=self.contract.vocab, objective=self.config.objective, impl=self.config.swift.impl, metrics=metrics)
        # No logits are made, so there is nothing to keep; and its compacted labels would part from the targets beside them.
        args.use_logits_to_keep = False
        # Its filter hides a loss that is no number from the log.
        args.logging_nan_inf_filter = False
        self.start_sums(vocab=self.contract.vocab, metrics=metrics, nonfinite_path=Path(args.output_dir) / "nonfinite.jsonl")
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

    def run_batch(self, model: Any, inputs: dict[str, Any], normalizer: Normalizer | None) -> CoordLossOutput:
        """See :class:`ExactSteps`."""
        return super().run_batch(model, {k: v for k, v in inputs.items() if k not in _SWIFT_KEYS}, normalizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace the trainer's loss by the window's own sums, reduced once over the ranks."""
        if "loss" in logs:
            sums, self._train_sums = self.reduced(self._train_sums), LossSums()
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
        sums = self.evaluation_sums(loader)
        values = summarize(sums, self.config.objective, self.config.token_type_metrics)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in values.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=int(sums.sum("samples")), num_steps=len(loader))
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
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
