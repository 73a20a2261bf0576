"""Run an A/B: every arm at every seed, each a run of its own process, several at once if there are the devices for it.

Nothing of an A/B is done twice: what is complete stays, what was stopped goes on, and warm-up runs are shared by every
A/B that asks for the same ones. ``ab.json`` says what there is, for ``coordexp compare``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from coordexp.config.arms import AbPlan, with_seed
from coordexp.config.load import config_sha256, differing_keys, dump_config, load_config, to_plain
from coordexp.config.schema import ExperimentConfig
from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, RunStopped
from coordexp.runs.groups import AB_FILE
from coordexp.runs.manifest import MANIFEST, read_manifest

SCHEMA: Final = 1
_POLL_SECONDS: Final = 1.0


@dataclass
class Task:
    """One run: its configuration, where it goes, and the run it goes on from. ``arm`` is None for a warm-up."""

    label: str
    arm: str | None
    seed: int
    config: ExperimentConfig
    folder: Path
    needs: Task | None = None
    state: str = "waiting"  # running, complete, failed, stopped
    seconds: float = 0.0
    utilisation: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.state in ("complete", "failed", "stopped")

    def resolved(self) -> ExperimentConfig:
        """The configuration with the warm-up's model and data in it."""
        if self.needs is None:
            return self.config
        start, data = self.needs.folder, self.config.data
        return replace(
            self.config,
            model=replace(self.config.model, path=str(start / "checkpoints" / "final")),
            vocab=replace(self.config.vocab, extend=False),
            data=replace(data, kind="jsonl", source=str(start / "data")),
        )


def tasks_of(plan: AbPlan, root: Path) -> list[Task]:
    """Every run of the plan, seed by seed, a warm-up before its arms. Warm-ups lie beside the A/B, named by what they are."""
    tasks: list[Task] = []
    for seed in plan.seeds:
        warm = None
        if plan.warmup is not None:
            config = replace(with_seed(plan.warmup, seed), name="warmup", question=None)
            key = hashlib.sha256(config_sha256(replace(config, output_dir="")).encode()).hexdigest()[:12]
            warm = Task(f"warm-up, seed {seed}", None, seed, config, root.parent / "warmup" / f"{key}-seed{seed}")
            tasks.append(warm)
        for arm, config in plan.arms.items():
            seeded = replace(with_seed(config, seed), name=arm)
            tasks.append(Task(f"{arm}, seed {seed}", arm, seed, seeded, root / arm / f"seed{seed}", warm))
    # All warm-ups first: what waits for them can then fill every place.
    return sorted(tasks, key=lambda task: task.arm is not None)


def run_ab(plan: AbPlan, root: Path, *, jobs: int, gpus: tuple[str, ...] = (), overwrite: bool = False, console: Console) -> list[Task]:
    """Run what is not complete, ``jobs`` runs at once or one on each of ``gpus``; returns the tasks with their states.

    A run that fails does not stop the others, one that was refused as the user's mistake does.

    Raises:
        ConfigError: runs of another configuration lie there, another process is at work there, or a run was refused.
        RunStopped: SIGTERM, or Ctrl-C; every run saved a checkpoint and goes on with the same command.
    """
    tasks = tasks_of(plan, root)
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        stale = [] if overwrite else [line for task in tasks for line in _stale(task)]
        if stale:
            raise ConfigError(stale)
        for task in tasks:
            if not overwrite or task.arm is None:
                task.state = "complete" if _complete(task) else "waiting"
        write_ab(plan, root, tasks)
        done = sum(task.state == "complete" for task in tasks)
        console.print(f"{root}: {len(tasks)} runs, {done} complete; {len(gpus) or jobs} at once", highlight=False, soft_wrap=True)
        _Pool(tasks, root, gpus or tuple([""] * jobs), overwrite, console, lambda: write_ab(plan, root, tasks)).run()
        write_ab(plan, root, tasks)
    return tasks


def write_ab(plan: AbPlan, root: Path, tasks: list[Task]) -> None:
    """``ab.json``: the arms, what they change, and where their runs lie, relative to it."""
    content = {
        "schema": SCHEMA,
        "name": plan.name,
        "question": plan.question,
        "baseline": plan.baseline,
        "seeds": list(plan.seeds),
        "arms": {
            arm: {
                "changed": plan.changed[arm],
                "runs": {str(t.seed): os.path.relpath(t.folder, root) for t in tasks if t.arm == arm},
                "states": {str(t.seed): t.state for t in tasks if t.arm == arm},
                "device_utilisation": {
                    str(t.seed): sum(t.utilisation) / len(t.utilisation) for t in tasks if t.arm == arm and t.utilisation
                },
            }
            for arm in plan.arms
        },
        "warmups": {str(t.seed): os.path.relpath(t.folder, root) for t in tasks if t.arm is None},
    }
    with atomic_text(root / AB_FILE) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _complete(task: Task) -> bool:
    if not (task.folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(task.folder)
    last = "train" if task.arm is None else "report"
    return manifest["status"] == "complete" and last in manifest["stages"]


def _stale(task: Task) -> list[str]:
    """How the run that lies in the task's folder differs from the task's, one line a key."""
    if not (task.folder / "config.yaml").is_file():
        return []
    before, now = to_plain(load_config(task.folder / "config.yaml")), to_plain(task.resolved())
    return [
        f"{task.folder}: was run with another configuration: {line}: choose another --output-dir, or pass --overwrite"
        for line in differing_keys(before, now)
        if not line.startswith(("output_dir:", "question:"))
    ]


@contextmanager
def _alone(folder: Path, *, until: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold the folder's lock. Another holder is an error; with ``until`` it is waited for, until that says so: then False, no lock held."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if until is None:
                    raise ConfigError(
                        f"{folder}: another coordexp ab is at work there: wait for it, or choose another --output-dir"
                    ) from None
                if until():
                    yield False
                    return
                time.sleep(_POLL_SECONDS)
                continue
            yield True
            return


class _Pool:
    """Places (a GPU each, or a share of the cores) that take the next run whose warm-up is there."""

    def __init__(
        self, tasks: list[Task], root: Path, places: tuple[str, ...], overwrite: bool, console: Console, changed: Callable[[], None]
    ) -> None:
        self._tasks, self._root, self._places, self._overwrite = tasks, root, places, overwrite
        self._console, self._changed = console, changed
        self._turn = threading.Condition()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped: int | None = None
        self._refused: list[str] = []
        self._futures: list[Future[None]] = []

    def run(self) -> None:
        with _signals(self._stop), ThreadPoolExecutor(len(self._places)) as threads:
            self._futures = [threads.submit(self._work, place) for place in self._places]
            self._watch()
            for future in self._futures:
                future.result()
        if self._refused:
            raise ConfigError(self._refused)
        if self._stopped is not None:
            self._console.print(f"{self._root}: not all runs are done: the same command goes on", soft_wrap=True)
            raise RunStopped(self._stopped)

    def _watch(self) -> None:
        """Show on a terminal how far the running ones are, until all workers are done."""
        bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        shown: dict[str, TaskID] = {}
        with bar:
            while not wait(self._futures, timeout=_POLL_SECONDS).done >= set(self._futures):
                running = {task.label: task for task in self._tasks if task.state == "running"}
                for label, task in running.items():
                    if label not in shown:
                        shown[label] = bar.add_task(label, total=task.config.train.max_steps)
                    bar.update(shown[label], completed=_step(task.folder / "logging.jsonl"))
                for label in shown.keys() - running.keys():
                    bar.remove_task(shown.pop(label))

    def _stop(self, signum: int) -> None:
        """The first time every run is asked to end in good order, the second time it is killed."""
        again = self._stopped is not None
        self._stopped = self._stopped or signum
        for child in list(self._children):
            child.send_signal(signal.SIGKILL if again else signum)
        if self._children and not again:
            os.write(2, f"stopping ({len(self._children)} running): each run saves a checkpoint first; once more kills it\n".encode())

    def _work(self, place: str) -> None:
        while (task := self._take()) is not None:
            self._run_one(task, place)

    def _take(self) -> Task | None:
        with self._turn:
            while self._stopped is None and not self._refused and not any(f.done() and f.exception() for f in self._futures):
                for task in self._tasks:
                    if task.state == "waiting" and task.needs is not None and task.needs.state in ("failed", "stopped"):
                        task.state = task.needs.state
                ready = [t for t in self._tasks if t.state == "waiting" and (t.needs is None or t.needs.state == "complete")]
                if ready:
                    ready[0].state = "running"
                    return ready[0]
                if all(task.over for task in self._tasks):
                    return None
                self._turn.wait(_POLL_SECONDS)
        return None

    def _run_one(self, task: Task, place: str) -> None:
        with self._turn:
            self._changed()
        begin = time.monotonic()
        log = self._root / "logs" / f"{task.arm or 'warmup'}-seed{task.seed}.log"
        log.parent.mkdir(exist_ok=True)
        # A warm-up is shared: another A/B may be making it, or has just made it.
        with _alone(task.folder.parent / f".{task.folder.name}", until=lambda: self._stopped is not None) as held:
            done = task.arm is None and _complete(task)
            code = -1 if not held else 0 if done else self._start(task, place, log)
        task.seconds = time.monotonic() - begin
        task.state = "complete" if code == 0 or (code == 1 and _complete(task)) else "failed"
        if task.state == "failed" and self._stopped is not None:
            task.state = "stopped"
        if code == 2:
            errors = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("error: ")]
            self._refused += [f"{task.label}: {line.removeprefix('error: ')}" for line in errors] or [f"{task.label}: see {log}"]
        with self._turn:
            over = sum(t.over for t in self._tasks)
            where = "" if task.state == "complete" else f": see {log}"
            self._console.print(
                f"  {over}/{len(self._tasks)} {task.label}: {task.state}, {task.seconds / 60:.1f} min{where}",
                highlight=False,
                soft_wrap=True,
            )
            self._changed()
            self._turn.notify_all()

    def _start(self, task: Task, place: str, log: Path) -> int:
        config = self._root / "configs" / f"{task.arm or 'warmup'}-seed{task.seed}.yaml"
        config.parent.mkdir(exist_ok=True)
        with atomic_text(config) as file:
            file.write(dump_config(task.resolved()))
        stage = "train" if task.arm is None else "run"
        command = [sys.executable, "-m", "coordexp", stage, str(config), "--output-dir", str(task.folder)]
        if (task.folder / MANIFEST).is_file():
            command.append("--overwrite" if self._overwrite and task.arm is not None else "--resume")
        environment = dict(os.environ)
        if place:
            environment["CUDA_VISIBLE_DEVICES"] = place
        elif len(self._places) > 1:
            share = str(max(1, len(os.sched_getaffinity(0)) // len(self._places)))
            environment |= {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share}
        with log.open("ab") as output:
            # Its own group: the terminal's Ctrl-C reaches this process alone, which passes it on once.
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
            self._children.add(child)
            if self._stopped is not None:
                child.send_signal(self._stopped)
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
                if place and (busy := gpu_utilisation(place)) is not None:
                    task.utilisation.append(busy)
            self._children.discard(child)
        return child.returncode


def _step(log: Path) -> int:
    """The step of a log's last whole row; 0 before the first."""
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    rows = (json.loads(line) for line in reversed(lines) if line.startswith(b"{") and line.endswith(b"}"))
    return next((int(row["step"]) for row in rows if "step" in row), 0)


def gpu_utilisation(index: str) -> float | None:
    """Share of the last moment in which the GPU computed, 0 to 1, as ``nvidia-smi`` says; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return float(answer.split()[0]) / 100
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


@contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``stop``."""
    before: dict[signal.Signals, Any] = {}

    def handler(signum: int, frame: Any) -> None:
        stop(signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
