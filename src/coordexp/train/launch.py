"""From options to a finished training run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState

from coordexp.data.collate import TrainCollator
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import PackingOptions
from coordexp.data.packed import PackedDataset, data_digest
from coordexp.data.records import Record
from coordexp.data.template import ChatTemplate
from coordexp.errors import ConfigError, RunStopped
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.load import copy_processor_files
from coordexp.train.arguments import training_arguments
from coordexp.train.best import waited
from coordexp.train.callbacks import JsonlLog, ProgressBar, rewind_log
from coordexp.train.checkpoint import STATE, check_identity, checkpoint_step, checkpoints, publish, remove_partial
from coordexp.train.forward import unwrapped
from coordexp.train.optimizer import GroupRates, describe_groups
from coordexp.train.options import TokenTypeMetrics, TrainOptions
from coordexp.train.packing import PackedData, packed_data, refuse_leaks
from coordexp.train.probe import GenerationProbe, ProbeRun
from coordexp.train.speed import SpeedMeter
from coordexp.train.stopping import StopRequest
from coordexp.train.trainer import CoordTrainer
from coordexp.vocab.adapters import adapt, describe_adapter, head_layers
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.options import AdapterOptions


def banner(trainer: CoordTrainer) -> str:
    """What is trained, at which learning rate, and what divides what."""
    objective, args = trainer.objective, trainer.args
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in trainer.model.parameters())
    terms = " + ".join(f"{objective.weight(name):g} {name}" for name in objective.active)
    unit = "packs" if isinstance(trainer.train_dataset, PackedDataset) else "samples"
    return (
        f"trains {trained:,} of {total:,} parameters on: {terms}\n"
        + "".join(f"  {line}\n" for line in describe_groups(trainer.model, trainer.rates))
        + step_line(objective, args, unit)
    )


def step_line(objective: CoordObjective, args: Any, unit: str) -> str:
    """How much makes one step, and what divides its sums; ``args`` are ``TrainingArguments``."""
    window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if objective.normalization == "group":
        divisor = "text terms divide by text positions, coordinate terms by coordinate positions"
    else:
        divisor = "all terms divide by all supervised positions"
    return (
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
    adapter: AdapterOptions | None = None,
    resume: bool = False,
    probe: ProbeRun | None = None,
    metrics: TokenTypeMetrics | None = None,
) -> Path:
    """Train and return the folder of the final model or adapter, ``checkpoints/final``.

    ``processor_from`` is the folder of ``model``, which an adapter records as its base. ``resume`` goes on from the last complete
    checkpoint, or from the start where there is none. ``probe`` is called on the model every ``options.probe_steps`` steps, see
    :class:`GenerationProbe`.

    Raises:
        ConfigError: what cannot work, or a checkpoint that does not belong to this run.
        RunStopped: a signal came; a checkpoint was saved.
    """
    adapter = adapter or AdapterOptions()
    vocab = CoordVocab.from_tokenizer(template.tokenizer, template.codec.num_bins)
    model = adapt(model, adapter, vocab, base=processor_from)
    # TrainingArguments has no field for it any more; the callback reads this variable.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard")
    args = training_arguments(options, run_dir / "checkpoints", seed=seed)
    first = args.process_index == 0
    data = _data(template, train_records, eval_records, packing, model=model, args=args)
    if data.packs is not None and first:
        _compare_plans(run_dir / "packing.json", data.packs, resume)
        data.packs.write(run_dir / "packing.json")
    header = header | {"world_size": args.world_size}
    bar, stop = ProgressBar(console), StopRequest()
    generation = None if probe is None or options.probe_steps is None else GenerationProbe(options.probe_steps, probe)
    trainer = CoordTrainer(
        model=model,
        objective=objective,
        vocab=vocab,
        processor_from=processor_from,
        rates=GroupRates.of(options),
        keep_checkpoints=options.save_total_limit,
        patience=options.patience,
        on_nonfinite=options.on_nonfinite,
        nonfinite_path=run_dir / "nonfinite.jsonl",
        identity=data.identity,
        stop=stop,
        token_type_metrics=metrics or TokenTypeMetrics(),
        histograms_path=run_dir / "histograms.jsonl",
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=data.collator,
        processing_class=template.tokenizer,
        callbacks=[*([] if generation is None else [generation]), *([JsonlLog(run_dir / "logging.jsonl", header), bar] if first else [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.speed = SpeedMeter(head_layers(unwrapped(model))[1], cuda=args.device.type == "cuda")
    if generation is not None:
        generation.trainer = trainer
    if options.on_nonfinite == "skip" and trainer.is_deepspeed_enabled:
        raise ConfigError("train.on_nonfinite: DeepSpeed moves the weights inside the backward, a step cannot be left out: set it to stop")

    def say(line: str) -> None:
        if first:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)

    for line in [describe_adapter(model, adapter), *banner(trainer).splitlines(), *([] if data.packs is None else data.packs.lines())]:
        say(line)
    if data.packs is not None:
        _probe(trainer, data.plain, console)
    checkpoint = _checkpoint(trainer, run_dir, resume, say)
    try:
        with stop.listening(say):
            _fit(trainer, checkpoint)
    finally:
        bar.close()
    if trainer.stopped_by:
        raise RunStopped(trainer.stopped_by)
    if options.patience is not None and trainer.state.global_step < trainer.state.max_steps:
        say(f"ended at step {trainer.state.global_step}: {options.patience} evaluations in a row were not better (train.patience)")
    if options.save_best is not None and trainer.state.best_global_step:
        say(f"best {options.save_best}: {trainer.state.best_metric:.6g} in checkpoints/checkpoint-{trainer.state.best_global_step}")
    return _save_final(trainer, run_dir, processor_from)


@dataclass(frozen=True)
class _Data:
    """Data sets and collator of a run; ``identity`` is what a resumed run must find unchanged."""

    train: Any
    eval: Any
    collator: Any
    plain: TrainCollator
    identity: dict[str, Any]
    packs: PackedData | None = None


def _data(
    template: ChatTemplate,
    train_records: Sequence[Record],
    eval_records: Sequence[Record],
    packing: PackingOptions | None,
    *,
    model: Any,
    args: TrainingArguments,
) -> _Data:
    train_data, eval_data = RecordDataset(train_records, template), RecordDataset(eval_records, template)
    identity = {"data": data_digest(train_records)}
    plain = TrainCollator(pad_id(template.tokenizer), model.config.image_token_id)
    if packing is None or not packing.enabled:
        return _Data(train_data, eval_data, plain, plain, identity)
    packs = packed_data(packing, model=model, train=train_data, evaluation=eval_data, collate=plain, args=args)
    identity["packing"] = packs.train.schedule.plan.fingerprint
    return _Data(packs.train, packs.eval, packs.collator, plain, identity, packs)


def _compare_plans(path: Path, packs: PackedData, resume: bool) -> None:
    """A resumed run must have the packing plan that ``packing.json`` names."""
    if not (resume and path.is_file()):
        return
    written = json.loads(path.read_text(encoding="utf-8"))["train"]["fingerprint"]
    planned = packs.train.schedule.plan.fingerprint
    if written != planned:
        raise ConfigError(
            f"{path}: the packing plan was {written[:12]} when the run began and is {planned[:12]} now: data, tokenizer or template "
            "have changed since; an exact continuation is impossible, start a new run in another output_dir"
        )


def _checkpoint(trainer: CoordTrainer, run_dir: Path, resume: bool, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from; the log is taken back to it."""
    folder = run_dir / "checkpoints"
    first = trainer.is_world_process_zero()
    if first:
        remove_partial(folder)
    trainer.accelerator.wait_for_everyone()
    found = checkpoints(folder) if resume else []
    if resume and first:
        step = checkpoint_step(found[-1]) if found else 0
        rows = rewind_log(run_dir / "logging.jsonl", step)
        rewind_log(run_dir / "histograms.jsonl", step)
        taken = f"; {rows} later rows of logging.jsonl taken back" if rows else ""
        say(f"resuming from {found[-1].name}{taken}" if found else f"no checkpoint yet: training starts at step 0{taken}")
    if not found:
        return None
    check_identity(found[-1], trainer.identity)
    return found[-1]


def _fit(trainer: CoordTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / STATE))
        if state.global_step >= state.max_steps or (trainer.patience is not None and waited(state) >= trainer.patience):
            # Trained to the end, and stopped before the final model was written. Trainer would make one more step.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _save_final(trainer: CoordTrainer, run_dir: Path, processor_from: Path) -> Path:
    final = run_dir / "checkpoints" / "final"
    staging = final.with_name("final.tmp")
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        copy_processor_files(processor_from, staging)
        publish(staging, final)
    trainer.accelerator.wait_for_everyone()
    return final


def _probe(trainer: CoordTrainer, plain: TrainCollator, console: Console) -> None:
    """Refuse packing that leaks, on the path a training step takes."""

    def run(batch: dict[str, Any]) -> None:
        # Trainer wraps the model in this autocast when training starts, which is later; a model that will be sharded is still on the host.
        device = next(trainer.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=trainer.args.bf16):
            trainer.run_batch(trainer.model, send_to_device(batch, device), None)

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
