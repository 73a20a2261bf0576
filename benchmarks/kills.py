"""Kill a short training run at random moments, resume it, and compare with the run that was left alone.

    python benchmarks/kills.py --kills 20 --work FOLDER

Every killed run must end with the same weights, bit for bit, and the same log (clocks apart); after every kill the manifest and the
log must be readable and no checkpoint half-written. Exit code 1 when one is not. Each run may be killed several times before it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import transformers.trainer  # noqa: F401  (loaded once, before the forks)
from safetensors import safe_open

import coordexp.train.launch  # noqa: F401
from coordexp.cli import main as cli
from coordexp.errors import DataError
from coordexp.runs.logs import read_log
from coordexp.runs.manifest import read_manifest

# Objects come in another order each epoch, windows and epochs are ragged, packs need their plan:
# what a continuation could lose.
EXPERIMENT = """
data: {kind: synth, order: random, synth: {train: 22, val: 5, test: 2, side: 64}, packing: {enabled: PACKED, length: 250}}
model: {tiny: {hidden_size: 48, num_layers: 2, num_heads: 4, num_key_value_heads: 2, intermediate_size: 64, vision_depth: 2,
  vision_hidden_size: 32, vision_intermediate_size: 48, vision_heads: 2, max_pixels: 4096, bpe_size: 330}}
train: {max_steps: STEPS, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, warmup_steps: 3, logging_steps: 3, eval_steps: 8,
  save_steps: 5, probe_steps: 8, probe_samples: 2, save_best: coord_dist/crps, report_to: []}
decode: {max_new_tokens: 8}
"""


def start(experiment: Path, out: Path, *, resume: bool) -> int:
    """Fork a process that runs ``coordexp train``, with the libraries already loaded; its id. What it says goes to ``OUT.log``."""
    words = ["coordexp", "train", str(experiment), "--output-dir", str(out), *(["--resume"] if resume else [])]
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(out.with_name(out.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = words
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same_weights(a: Path, b: Path) -> bool:
    """Bitwise equality of two safetensors files."""
    with safe_open(a, "np") as left, safe_open(b, "np") as right:
        if set(left.keys()) != set(right.keys()):
            return False
        return all(left.get_tensor(name).tobytes() == right.get_tensor(name).tobytes() for name in left.keys())  # noqa: SIM118


def rows(run: Path) -> list[dict[str, object]]:
    """The log without clocks; NaN as text, so that it equals itself."""
    found = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    kept = [row for row in found if row.get("kind") != "header" and "train_runtime" not in row]
    return [{k: repr(v) for k, v in row.items() if not k.startswith("speed/")} for row in kept]


def readable(run: Path) -> list[str]:
    """What an interrupted run left that cannot be read."""
    faults = []
    try:
        read_manifest(run)
        if (run / "logging.jsonl").is_file() and (run / "logging.jsonl").read_bytes().count(b"\n") > 1:
            read_log(run)
    except DataError as error:
        faults.append(str(error))
    for folder in (run / "checkpoints").glob("checkpoint-*"):
        if folder.suffix != ".tmp" and not (folder / "trainer_state.json").is_file():
            faults.append(f"{folder.name} is not whole")
    return faults


def killed(experiment: Path, out: Path, signum: int, moment: float, *, resume: bool) -> int:
    """Start, wait for the manifest and ``moment`` seconds more, kill; the exit code."""
    child = start(experiment, out, resume=resume)
    until = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if until is None and (out / "manifest.json").is_file():
            until = time.monotonic() + moment
        if until is not None and time.monotonic() >= until:
            os.kill(child, signum)
            break
        time.sleep(0.002)
    return ended(child)


def kill_once(experiment: Path, whole: Path, out: Path, *, seconds: float, rng: random.Random, signum: int, most: int) -> str:
    """One run, killed up to ``most`` times and then left to end; what went wrong, or nothing."""
    hits, wanted = 0, rng.randint(1, most)
    while hits < wanted:
        code = killed(experiment, out, signum, rng.uniform(0, seconds), resume=hits > 0)
        faults = readable(out)
        if faults:
            return f"after kill {hits + 1} (exit {code}): {'; '.join(faults)}"
        if code:
            hits += 1
        elif hits:
            break
        else:
            # It ended before its moment came: that was no kill. The machine is faster now than it was.
            seconds *= 0.8
            shutil.rmtree(out)
    code = ended(start(experiment, out, resume=True))
    if code:
        return f"resuming failed with {code}: see {out.name}.log"
    if not same_weights(whole / "checkpoints" / "final" / "model.safetensors", out / "checkpoints" / "final" / "model.safetensors"):
        return "the weights differ"
    return "" if rows(out) == rows(whole) else "the logs differ"


def main(arguments: list[str] | None = None) -> int:
    """Run it; the number of runs that did not end equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--most", type=int, default=2, help="kills of one run at most")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args(arguments)
    work = options.work or Path(mkdtemp(prefix="coordexp-kills-"))
    work.mkdir(parents=True, exist_ok=True)
    experiment = work / "kills.yaml"
    experiment.write_text(EXPERIMENT.replace("STEPS", str(options.steps)).replace("PACKED", str(options.packed).lower()))
    whole = work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    begin = time.monotonic()
    if ended(start(experiment, whole, resume=False)):
        print(f"the run left alone failed: see {whole.name}.log", file=sys.stderr)
        return 1
    seconds = sum(read_manifest(whole)["stages"].values())
    print(f"left alone: {time.monotonic() - begin:.1f} s, {seconds:.1f} s of them in stages", flush=True)
    rng, bad = random.Random(options.seed), 0
    for number in range(1, options.kills + 1):
        out = work / f"killed-{number}"
        shutil.rmtree(out, ignore_errors=True)
        fault = kill_once(
            experiment, whole, out, seconds=seconds, rng=rng, signum=signal.Signals[f"SIG{options.signal}"], most=options.most
        )  # fmt: skip
        stops = [entry["stage"] for entry in read_manifest(out).get("resumed", [])]
        print(f"{number}/{options.kills}: stopped in {', '.join(map(str, stops))}: {fault or 'equal'}", flush=True)
        bad += bool(fault)
        if not fault:
            shutil.rmtree(out)
    print(f"{options.kills - bad} of {options.kills} end bitwise equal to the run left alone")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
