"""What a training step costs: with all metrics, with none, and under the stock ``Trainer``; same model, same batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from coordexp.bench.measure import Progress, circumstances, interleaved, spread
from coordexp.data.collate import TrainCollator
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import DEFAULT_PROMPT
from coordexp.data.records import read_records
from coordexp.data.template import ChatTemplate
from coordexp.losses.linear import IGNORE
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer
from coordexp.train.options import TokenTypeMetrics
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.coord_vocab import CoordVocab


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """``vocab_rows`` pads the embedding table to the size of a real checkpoint's; ``steps`` are made per measured call."""

    model: Path
    data: Path
    batch_size: int = 8
    vocab_rows: int | None = 152_704
    steps: int = 2
    rounds: int = 7


def measure(bench: StepBench, progress: Progress | None = None) -> list[dict[str, Any]]:
    """One row a variant: milliseconds per optimizer step (logging each), and the ratio to the step without metrics."""
    with tempfile.TemporaryDirectory(prefix="coordexp-bench-") as scratch:
        calls = _variants(bench, Path(scratch))
        seconds = interleaved(calls, bench.rounds, progress=progress)
    base = spread(seconds["metrics_off"])[1]
    shared = circumstances("cpu", "transformers")
    rows = []
    for name, values in seconds.items():
        p20, p50, p80 = (1000 * v / bench.steps for v in spread(values))
        rows.append(
            {
                "variant": name, "batch_size": bench.batch_size, "vocab_rows": bench.vocab_rows or 0, "n": len(values),
                "p20_ms": f"{p20:.1f}", "p50_ms": f"{p50:.1f}", "p80_ms": f"{p80:.1f}",
                "to_metrics_off": f"{spread(values)[1] / base:.3f}", **shared,
            }
        )  # fmt: skip
    return rows


def _variants(bench: StepBench, scratch: Path) -> dict[str, Callable[[], object]]:
    tokenizer = load_tokenizer(bench.model)
    template = ChatTemplate(tokenizer, load_image_processor(bench.model), prompt=DEFAULT_PROMPT)
    records = read_records(bench.data, limit=bench.batch_size).records
    examples = RecordDataset(records, template)
    # One batch, made before the clock starts: what is compared is the step.
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batch = TrainCollator(tokenizer.pad_token_id, image_token)([examples[i] for i in range(len(records))])
    arguments = TrainingArguments(
        output_dir=str(scratch), max_steps=bench.steps, per_device_train_batch_size=len(records), logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, learning_rate=1e-5, dataloader_pin_memory=False,
    )  # fmt: skip

    def model() -> Any:
        made = load_model(bench.model)
        if bench.vocab_rows is not None:
            made.resize_token_embeddings(bench.vocab_rows, mean_resizing=False)
        return made

    shared = {"args": arguments, "train_dataset": examples, "callbacks": []}
    vocab, objective = CoordVocab.from_tokenizer(tokenizer), CoordObjective()
    trainers = {
        name: CoordTrainer(
            model=model(), vocab=vocab, objective=objective, token_type_metrics=metrics, data_collator=lambda _: dict(batch), **shared
        )
        for name, metrics in (("metrics_on", TokenTypeMetrics()), ("metrics_off", TokenTypeMetrics(enabled=False)))
    }
    stock = _stock_batch(batch)
    trainers["stock_trainer"] = Trainer(model=model(), data_collator=lambda _: dict(stock), **shared)
    for trainer in trainers.values():
        _silence(trainer)
    return {name: trainer.train for name, trainer in trainers.items()}


def _stock_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model's own loss takes: labels that it shifts itself."""
    shifted = batch["targets"].labels
    labels = torch.full_like(shifted, IGNORE)
    labels[:, 1:] = shifted[:, :-1]
    kept = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
    return {name: batch[name] for name in kept} | {"labels": labels}


def _silence(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
