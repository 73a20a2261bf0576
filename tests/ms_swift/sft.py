"""``swift sft`` on the tests' tiny model and scenes: its arguments, its environment, its log."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import yaml

from coordexp.data.swift_rows import SwiftExportOptions, export_swift
from tiny import workspace

PLUGIN = Path(__file__).parents[2] / "src" / "coordexp" / "integrations" / "swift.py"
CPU = Path(__file__).with_name("cpu.py")
# Differ from run to run.
CLOCKS = ("elapsed_time", "remaining_time", "train_speed(s/it)", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@lru_cache
def data() -> Path:
    """The scenes as ms-swift rows: ``train.jsonl`` (16) and ``val.jsonl`` (6)."""
    out = workspace() / "swift"
    export_swift([workspace() / "data" / f"{name}.jsonl" for name in ("train", "val")], out, SwiftExportOptions())
    return out


def environment(objective: dict | None = None, folder: Path | None = None) -> dict[str, str]:
    """Offline, and with the objective of the run in a file."""
    config = json.loads((workspace() / "model" / "config.json").read_text())
    found = {
        "HF_HUB_OFFLINE": "1",
        "IMAGE_TOKEN_ID": str(config["image_token_id"]),
        # ms-swift keeps prepared data there.
        "MODELSCOPE_CACHE": str(workspace() / "cache"),
    }
    if objective is not None:
        path = folder / "objective.yaml"
        path.write_text(yaml.safe_dump({"objective": objective}))
        found["COORDEXP_CONFIG"] = str(path)
    return found


def arguments(out: Path, *, plugin: bool = True, loss: bool = True, evaluate: Path | None = None, **changes: object) -> list[str]:
    """The arguments after ``swift sft``."""
    values = {
        "model": workspace() / "model", "model_type": "qwen3_vl", "template": "qwen3_vl", "use_hf": "true", "check_model": "false",
        "tuner_type": "full", "freeze_vit": "false", "freeze_aligner": "false", "torch_dtype": "float32",
        "dataset": data() / "train.jsonl", "val_dataset": evaluate or data() / "val.jsonl", "max_steps": 1, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "warmup_ratio": 0, "max_grad_norm": 1e9,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 8,
        "gradient_checkpointing": "false",
                "report_to": "none", "add_version": "false", "output_dir": out, "dataloader_num_workers": 0,
    }  # fmt: skip
    plugins = [CPU, PLUGIN] if plugin else [CPU]
    if loss:
        values["loss_type"] = "coordexp"
    words = [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]
    return [*words, "--external_plugins", *map(str, plugins)]


def start(out: Path, *, environ: dict[str, str], whole: bool = False, **changes: object) -> subprocess.Popen[str]:
    """The command in a process of its own; its words go to ``out``.log.

    ``whole``: as a user types it, which starts ``swift.cli.sft`` in its turn (under torchrun if asked to); without, that module at once.
    """
    program = [shutil.which("swift", path=str(Path(sys.executable).parent)) or "swift", "sft"]
    command = program if whole else [sys.executable, "-m", "swift.cli.sft"]
    out.mkdir(parents=True)
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [*command, *arguments(out, **changes)], stdout=log, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environ}
        )


def rows(out: Path) -> tuple[list[dict], list[dict]]:
    """Training and evaluation rows of a run's log, without clocks."""
    found = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    found = [{k: v for k, v in row.items() if k not in CLOCKS} for row in found if "train_runtime" not in row and "log_history" not in row]
    return [row for row in found if "loss" in row], [row for row in found if "eval_loss" in row]
