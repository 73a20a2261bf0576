"""Keys that the ``train`` section refuses by name. Imports no torch.

Every field of ``transformers.TrainingArguments`` is either a field of :class:`coordexp.train.options.TrainOptions` or stands here with
the reason. ``docs/training.md`` is written from it: ``python -m coordexp.train.refused docs/training.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

# Keys of earlier versions.
RENAMED: Final = {
    "per_device_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "scheduler": "lr_scheduler_type",
    "dataloader_workers": "dataloader_num_workers",
    "min_lr_ratio": "lr_scheduler_type: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr_rate: ...}",
    "group_by_length": "train_sampling_strategy: group_by_length",
}

# Keys of other trainers that mean one of ours.
ELSEWHERE: Final = {
    "batch_size": "per_device_train_batch_size", "train_batch_size": "per_device_train_batch_size", "lr": "learning_rate",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "steps": "max_steps", "eval_every": "eval_steps",
    "save_every": "save_steps", "optimizer": "optim", "grad_accum": "gradient_accumulation_steps",
}  # fmt: skip

_BEST: Final = "set train.save_best, which knows which way is better"
_HERE: Final = "evaluation is a sum over a count here, whole on every process, and makes no predictions to gather"
_SEED: Final = "the key `seed` of the experiment is the seed of everything"
_COMPILE: Final = "image sizes change with every batch, and the loss and its backward lie outside of what is compiled: not shown to pay"
_CHECKPOINT: Final = "a checkpoint is whole and continues exactly, or it is not there"
_UPLOAD: Final = "an adapter names a folder of this machine as its base: coordexp vocab export RUN OUT, then hf upload USER/NAME OUT"

REFUSED: Final = {
    "output_dir": "the key `output_dir` of the experiment and its `name` say where a run goes",
    "seed": _SEED,
    "data_seed": _SEED,
    "label_smoothing_factor": "it changes the loss: the target's width is objective.sigma, hard cross-entropy is objective.ce",
    "neftune_noise_alpha": "noise in the embeddings makes the training loss another number than the loss in evaluation",
    "average_tokens_across_devices": "positions are always counted over all processes",
    "auto_find_batch_size": "the batch would shrink without being asked for: take the largest train.per_device_train_batch_size that fits",
    "fp16": "gradients in float16 need a loss scale, which leaves steps out by itself: set train.bf16, or float32",
    "bf16_full_eval": "evaluation runs in the precision of training, or its loss is another number",
    "fp16_full_eval": "evaluation runs in the precision of training, or its loss is another number",
    "activation_checkpointing": "set train.gradient_checkpointing: every supported version of transformers knows it",
    "activation_checkpointing_kwargs": "set train.gradient_checkpointing_kwargs: every supported version of transformers knows it",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": "its fused loss would take the place of the objective: set model.liger for its other kernels",
    "liger_kernel_config": "set model.liger, which takes all of its kernels but the loss",
    "use_cache": "training needs no key-value cache, and packed samples would see each other with one",
    "optim_target_modules": "the optimizers that read it (GaLore, APOLLO) make parameter groups of their own, and train.lr_* would be lost",
    "logging_nan_inf_filter": "it hides losses that are NaN: see train.on_nonfinite",
    "include_num_input_tokens_seen": "speed/tokens_per_s and the pack/ metrics count tokens",
    "disable_tqdm": "the progress bar is this package's; it shows only on a terminal",
    "debug": "train.on_nonfinite names the samples of a step that is not finite",
    "prediction_loss_only": _HERE,
    "eval_accumulation_steps": _HERE,
    "eval_do_concat_batches": _HERE,
    "eval_use_gather_object": _HERE,
    "include_for_metrics": _HERE,
    "batch_eval_metrics": _HERE,
    "save_only_model": _CHECKPOINT,
    "save_on_each_node": "the run directory is one: put it where all nodes see it",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint after the step already",
    "ignore_data_skip": _CHECKPOINT,
    "restore_callback_states_from_checkpoint": _CHECKPOINT,
    "resume_from_checkpoint": "coordexp run EXPERIMENT --resume goes on from the newest checkpoint",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "push_to_hub": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_token": "it would stand in config.yaml, and nothing is uploaded: see push_to_hub",
    "use_cpu": "the GPU is used where there is one: hide it from all stages with CUDA_VISIBLE_DEVICES=",
    "accelerator_config": "how batches are split over the processes is this package's: every sample once an epoch",
    "parallelism_config": "splitting one sequence over processes is not supported: a position would be counted on several of them",
    "dataloader_drop_last": "samples would be left out of the evaluation too; the last step of an epoch divides by what it holds",
    "dataloader_in_order": "the order of the samples would depend on which worker is faster",
    "remove_unused_columns": "the centres and roles of the coordinates would be removed",
    "label_names": "targets travel in the batch of this package",
    "length_column_name": "lengths are counted from the records",
    "do_train": "the command says what is done: coordexp run, train, predict, evaluate",
    "do_eval": "the command says what is done: coordexp run, train, predict, evaluate",
    "do_predict": "the command says what is done: coordexp run, train, predict, evaluate",
    "ddp_backend": "nccl beside a GPU, gloo on a CPU: the processes meet before the training stage",
    "ddp_timeout": "six hours: one process makes the data while the others wait, and all meet before that",
    "local_rank": "torchrun or accelerate launch sets it",
}

BEGIN: Final = "<!-- written by python -m coordexp.train.refused docs/training.md -->\n"
END: Final = "<!-- end -->\n"


def why_refused() -> dict[str, str]:
    """Key -> what its error says."""
    told = {key: f"is train.{new} now" for key, new in RENAMED.items()} | {key: f"is train.{new} here" for key, new in ELSEWHERE.items()}
    return told | {key: f"refused: {reason}" for key, reason in REFUSED.items()}


def written_into(page: str) -> str:
    """``page`` with the table of refused keys between its two marks."""
    head, rest = page.split(BEGIN)
    rows = [f"| `{key}` | {reason} |\n" for key, reason in sorted(REFUSED.items())]
    return head + BEGIN + "| key | why not |\n|---|---|\n" + "".join(rows) + END + rest.split(END)[1]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
