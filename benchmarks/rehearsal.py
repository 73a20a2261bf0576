"""The whole road at the size of a released checkpoint, with random weights and real photos: time and peak memory of every stage.

    python benchmarks/rehearsal.py --size 2b --photos VOC_FOLDER --work FOLDER

Writes a checkpoint of exactly that Qwen3-VL's shape, then, each in a process of its own: extend, doctor, plan, one LoRA step of two (the
process is killed then), resume, predict, export, export --verify, and two steps of full fine-tuning (--full, by default with SGD, which
keeps no states). Appends a row a stage to ``results/rehearsal.csv``; ``predicted_mb`` is what ``coordexp plan`` said. A stage whose row
stands in FOLDER/rows.jsonl is not run again; the weights are removed at the end, unless --keep.

Memory is the peak resident size of a stage's process. On a CPU glibc keeps freed blocks of up to 32 MB, which no GPU's allocator does: the
processes run with MALLOC_MMAP_THRESHOLD_=1000000, so that what is freed is given back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rounds import RESULTS

from released import SHAPES, qwen_tokenizer, ranks_file, write_released

EXPERIMENT = """
name: NAME
seed: 0
model: {path: MODEL, dtype: bfloat16}
vocab: {extend: false}
data: {kind: voc, source: PHOTOS, on_invalid: skip, max_train: 4, max_val: 2, max_test: 2}
objective: {sigma: 2.0}
adapter: {kind: ADAPTER}
train: {max_steps: 2, per_device_train_batch_size: 2, per_device_eval_batch_size: 2, learning_rate: 1.0e-5, bf16: true, OPTIM
  gradient_checkpointing: true, warmup_steps: 1, logging_steps: 1, eval_steps: 2, save_steps: SAVE, report_to: []}
"""
Start = Callable[[Sequence[str]], int]


def spawn(words: Sequence[str]) -> int:
    """Start ``coordexp WORDS`` (or this script, for ``write``) in a new process; its number. What it says goes on."""
    command = [sys.executable, __file__, *words] if words[0] == "--write" else [sys.executable, "-m", "coordexp", *words]
    sys.stdout.flush()
    return os.posix_spawn(sys.executable, command, {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})


class Rehearsal:
    """Stages of one size in the folder ``work``; ``rows`` are the finished ones."""

    def __init__(self, size: str, photos: Path, work: Path, start: Start = spawn, full: str | None = "sgd") -> None:
        self.size, self.photos, self.work, self.start, self.full = size, photos.resolve(), work, start, full
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "rows.jsonl"
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.is_file() else []

    def run(self) -> list[dict[str, Any]]:
        """All stages that have no row yet."""
        base, coord, run = self.work / "base", self.work / "coord", self.work / "lora"
        lora = self._experiment("lora", "lora", save=1)
        self._stage("write", ["--write", self.size, str(base)], clear=base)
        self._stage("extend", ["vocab", "extend", str(base), "--out", str(coord)], clear=coord)
        self._stage("doctor", ["doctor", str(coord)], clear=None)
        self._plan("plan", lora)
        train = ["train", str(lora), "--output-dir", str(run)]
        self._stage("train", train, clear=run, until=run / "checkpoints" / "checkpoint-1", plan="plan")
        self._stage("resume", [*train, "--resume"], clear=None, plan="plan")
        final, found = run / "checkpoints" / "final", self.work / "predictions.jsonl"
        words = ["--limit", "2", "--batch-size", "2", "--max-new-tokens", "48", "--overwrite"]
        self._stage("predict", ["predict", str(final), str(run / "data" / "test.jsonl"), "--out", str(found), *words], clear=None)
        out = self.work / "export"
        self._stage("export", ["vocab", "export", str(run), str(out)], clear=out)
        self._stage("verify", ["vocab", "export", str(run), str(out), "--verify", "--dtype", "float32"], clear=out)
        shutil.rmtree(out, ignore_errors=True)
        if self.full is not None:
            full = self._experiment("full", "none", save=2, optim=self.full)
            self._plan("plan full", full)
            self._stage("full", ["train", str(full), "--output-dir", str(self.work / "full")], clear=self.work / "full", plan="plan full")
        return self.rows

    def _experiment(self, name: str, adapter: str, *, save: int, optim: str | None = None) -> Path:
        text = EXPERIMENT.replace("OPTIM", "" if optim is None else f"optim: {optim},")
        values = {"NAME": name, "MODEL": self.work / "coord", "PHOTOS": self.photos, "ADAPTER": adapter, "SAVE": save}
        for word, value in values.items():
            text = text.replace(word, str(value))
        path = self.work / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def _plan(self, stage: str, experiment: Path) -> None:
        out = self.work / f"{stage.replace(' ', '-')}.json"
        if not self._done(stage):
            self._stage(stage, ["plan", str(experiment), "--no-levers", "--json"], clear=None, output=out)

    def _done(self, stage: str) -> bool:
        return any(row["stage"] == stage for row in self.rows)

    def _stage(
        self, stage: str, words: Sequence[str], *, clear: Path | None, until: Path | None = None, plan: str | None = None,
        output: Path | None = None,
    ) -> None:  # fmt: skip
        """Run and note it. ``clear`` is removed first; as soon as ``until`` is there, the process is killed.

        Raises:
            SystemExit: the stage failed.
        """
        if self._done(stage):
            return
        if clear is not None:
            shutil.rmtree(clear, ignore_errors=True)
        print(f"== {stage}", flush=True)
        begin = time.perf_counter()
        with _stdout_to(output):
            child = self.start(words)
        killed = False
        while True:
            pid, status, usage = os.wait4(child, 0 if until is None or killed else os.WNOHANG)
            if pid:
                break
            if until is not None and until.is_dir():
                os.kill(child, signal.SIGKILL)
                killed = True
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(status)
        # Of plan 1 says that it does not fit, of doctor that a check failed: their own words say more.
        if code not in ((0, 1) if stage in ("plan", "plan full", "doctor") else (0, -signal.SIGKILL) if killed else (0,)):
            raise SystemExit(f"{stage}: exit code {code}")
        row = {"stage": stage, "exit_code": code, "s": time.perf_counter() - begin, "peak_mb": usage.ru_maxrss / 1024}
        if plan is not None:
            row["predicted_mb"] = json.loads((self.work / f"{plan.replace(' ', '-')}.json").read_text())["need"] / 2**20
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


class _stdout_to:
    """Within the block children's standard output goes to ``path``; None: nowhere else."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> None:
        if self.path is not None:
            sys.stdout.flush()
            self.kept = os.dup(1)
            with self.path.open("wb") as file:
                os.dup2(file.fileno(), 1)

    def __exit__(self, *error: object) -> None:
        if self.path is not None:
            os.dup2(self.kept, 1)
            os.close(self.kept)


def write(size: str, out: Path) -> None:
    """The checkpoint; with a small tokenizer where the package with the real one is missing."""
    from coordexp.modeling.tiny import train_tokenizer

    real = size != "tiny" and ranks_file() is not None
    count = write_released(out, SHAPES[size], qwen_tokenizer() if real else train_tokenizer(330))
    print(f"{count:,} parameters, {'the real' if real else 'a small'} tokenizer")


def save(size: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Append the rows with their circumstances to ``path``."""
    from coordexp.bench.measure import append_csv, circumstances

    shared = circumstances("cpu", "transformers", "peft", "safetensors")
    made = []
    for row in rows:
        predicted = row.get("predicted_mb")
        ratio = "" if predicted is None else f"{predicted / row['peak_mb']:.3f}"
        figures = {"seconds": f"{row['s']:.1f}", "peak_mb": f"{row['peak_mb']:.0f}", "exit_code": row["exit_code"]}
        made.append(
            {"size": size, "stage": row["stage"], **figures, "predicted_mb": "" if predicted is None else f"{predicted:.0f}",
             "predicted_to_peak": ratio, **shared}
        )  # fmt: skip
    append_csv(made, path)


def main() -> None:
    """Run the stages and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[name for name in SHAPES if name != "tiny"], default="2b", help="100m is of no release.")
    parser.add_argument("--photos", type=Path, help="A Pascal VOC folder with at least two training, validation and test images.")
    parser.add_argument("--work", type=Path, help="Folder for the checkpoints: 18 GB for 2b, 36 for 4b, 70 for 8b.")
    parser.add_argument("--full", default="sgd", help="train.optim of the full fine-tuning; none: leave that out.")
    parser.add_argument("--keep", action="store_true", help="Leave the checkpoints there.")
    parser.add_argument("--write", nargs=2, metavar=("SIZE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.write[0], Path(args.write[1]))
        return
    if args.photos is None or args.work is None:
        parser.error("--photos and --work are needed")
    rehearsal = Rehearsal(args.size, args.photos, args.work, full=None if args.full == "none" else args.full)
    save(args.size, rehearsal.run(), RESULTS / "rehearsal.csv")
    if not args.keep:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
