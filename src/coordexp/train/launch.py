"""From options to a finished training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from coordexp.data.collate import TrainCollator
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import PackingOptions
from coordexp.data.packed import PackedDataset
from coordexp.data.records import Record
from coordexp.data.template import ChatTemplate
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.load import copy_processor_files
from coordexp.train.callbacks import JsonlLog, ProgressBar
from coordexp.train.options import TrainOptions
from coordexp.train.packing import packed_data, refuse_leaks
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.coord_vocab import CoordVocab


def training_arguments(options: TrainOptions, output_dir: Path, *, seed: int) -> TrainingArguments:
    """``TrainingArguments`` with every default that would bend a number switched off."""
    return TrainingArguments(
        output_dir=str(output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.scheduler,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        bf16=options.bf16,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        dataloader_num_workers=options.dataloader_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["shift_labels"],
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )


def banner(trainer: CoordTrainer) -> str:
    """What is trained, and what divides what, in one paragraph."""
    objective, args = trainer.objective, trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    terms = " + ".join(f"{objective.weight(name):g} {name}" for name in objective.active)
    unit = "packs" if isinstance(trainer.train_dataset, PackedDataset) else "samples"
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if objective.normalization == "group":
        divisor = "text terms divide by text positions, coordinate terms by coordinate positions"
    else:
        divisor = "all terms divide by all supervised positions"
    return (
        f"trains {trained:,} of {total:,} parameters on: {terms}\n"
        f"one step = {args.per_device_train_batch_size} {unit} x {args.gradient_accumulation_steps} micro-batches x "
        f"{args.world_size} ranks = {window} {unit}; {divisor}, counted over the whole step"
    )


def train(
    options: TrainOptions,
    *,
    objective: CoordObjective,
    model: Any,
    template: ChatTemplate,
    train_records: Sequence[Record],
    eval_records: Sequence[Record],
    run_dir: Path,
    processor_from: Path,
    header: dict[str, Any],
    seed: int,
    console: Console,
    packing: PackingOptions | None = None,
) -> Path:
    """Train and return the folder of the final model, ``checkpoints/final``."""
    tokenizer = template.tokenizer
    vocab = CoordVocab.from_tokenizer(tokenizer, template.codec.num_bins)
    # TrainingArguments has no field for it any more; the callback reads this variable.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
    bar = ProgressBar(console)
    args = training_arguments(options, run_dir / "checkpoints", seed=seed)
    train_data: Any = RecordDataset(train_records, template)
    eval_data: Any = RecordDataset(eval_records, template)
    plain = TrainCollator(pad_id(tokenizer), model.config.image_token_id)
    collate: Any = plain
    lines: list[str] = []
    if packing is not None and packing.enabled:
        packs = packed_data(packing, model=model, train=train_data, evaluation=eval_data, collate=plain, args=args)
        train_data, eval_data, collate, lines = packs.train, packs.eval, packs.collator, packs.lines()
        packs.write(run_dir / "packing.json")
    trainer = CoordTrainer(
        model=model,
        objective=objective,
        vocab=vocab,
        processor_from=processor_from,
        args=args,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[JsonlLog(run_dir / "logging.jsonl", header), bar],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    for line in [*banner(trainer).splitlines(), *lines]:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if isinstance(train_data, PackedDataset):
        _probe(trainer, plain, console)
    try:
        trainer.train()
    finally:
        bar.close()
    final = run_dir / "checkpoints" / "final"
    staging = final.with_name("final.tmp")
    trainer.save_model(str(staging))
    copy_processor_files(processor_from, staging)
    staging.rename(final)
    return final


def _probe(trainer: CoordTrainer, plain: TrainCollator, console: Console) -> None:
    """Refuse packing that leaks, on the path a training step takes."""

    def run(batch: dict[str, Any]) -> None:
        # Trainer wraps the model in this autocast when training starts, which is later.
        with torch.autocast(trainer.args.device.type, torch.bfloat16, enabled=trainer.args.bf16):
            trainer._run(trainer.model, trainer._prepare_inputs(batch), None)

    worst = refuse_leaks(
        trainer.train_dataset,
        model=trainer.model,
        run=run,
        collate=plain,
        packed=trainer.data_collator,
        attention=trainer.model.config._attn_implementation,
        dtype=torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype,
    )
    told = "no pack holds two samples" if worst is None else f"samples of a pack are separate (difference to each alone {worst:.1e})"
    console.print(f"  packing probe: {told}", highlight=False, markup=False, soft_wrap=True)


def pad_id(tokenizer: Any) -> int:
    """Padding token id; the end-of-turn token stands in where a tokenizer has none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
