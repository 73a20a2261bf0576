"""Made-up training logs: a healthy one for any seed, faults planted into it, and the files of four programs that hold it.

The healthy log follows from a model of training (falling losses, a widening gap to evaluation, multiplicative noise), not from
the rules' own thresholds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.runs.logs import RunLog, read_log

Row = dict[str, Any]
Array = NDArray[np.float64]
FLOOR = 2.112  # entropy of the Gaussian target of sigma 2


@dataclass(frozen=True)
class Shape:
    """Of one run. ``every``: steps between rows; ``evals``: evaluations; ``epochs`` over all; ``memory``: of the noise (AR 1).

    ``restarts`` of the schedule; ``tiny``: the loss falls to a hundred-thousandth; ``foreign``: only what any trainer logs;
    ``memorises``: each epoch costs an eighth less in training and nothing less in evaluation.
    """

    rows: int = 80
    every: int = 10
    evals: int = 8
    grad_steps: int = 8
    resumed_with: int | None = None
    warmup: float = 0.05
    epochs: float = 2.0
    noise: float = 0.06
    memory: float = 0.0
    tails: bool = False
    dropout: float = 1.0
    gap: float = 0.15
    speed: float = 5.0
    start: float = 7.0
    rest: float = 0.15
    coordinates: bool = True
    text_weight: float = 1.0
    schedule: str = "cosine"
    accuracy: bool = True
    fp16: bool = False
    restarts: int = 0
    tiny: bool = False
    foreign: bool = False
    memorises: bool = False


TWINS: dict[str, dict[str, Any]] = {
    "six epochs, no token_acc": {"epochs": 6.0, "memorises": True, "accuracy": False, "coordinates": False},
    "six epochs, token_acc": {"epochs": 6.0, "memorises": True, "coordinates": False},
    "fp16": {"fp16": True},
    "warm restarts": {"restarts": 3, "schedule": "cosine"},
    "tiny losses": {"tiny": True, "coordinates": False},
    "foreign keys only": {"foreign": True, "accuracy": False, "coordinates": False, "text_weight": 1.0},
    "any": {},
}
_FOREIGN = {"step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss"}


def twin(kind: str, seed: int) -> tuple[list[Row], dict[str, Any]]:
    """A sound run of a kind, and the arguments of its trainer."""
    rng = np.random.default_rng([seed, list(TWINS).index(kind)])
    shape = replace(random_shape(rng), **TWINS[kind])
    if shape.memorises:
        shape = replace(shape, evals=int(rng.choice([6, 12, 24])), rows=int(rng.integers(60, 250)))
    arguments: dict[str, Any] = {"gradient_accumulation_steps": shape.grad_steps, "world_size": int(rng.choice([1, 2, 4, 8]))}
    if shape.fp16 and rng.random() < 0.5:
        arguments["fp16"] = True
    return healthy(shape, seed), arguments


def random_shape(rng: np.random.Generator) -> Shape:
    """Any shape that a sound run may have."""
    return Shape(
        rows=int(rng.integers(12, 250)),
        every=int(rng.choice([1, 5, 10, 50])),
        evals=int(rng.integers(0, 30)),
        grad_steps=int(rng.choice([1, 2, 4, 8, 16, 32])),
        resumed_with=int(rng.choice([1, 4, 16, 64])) if rng.random() < 0.2 else None,
        warmup=float(rng.uniform(0, 0.2)),
        epochs=float(rng.choice([0.3, 1, 2, 3, 6])),
        noise=float(rng.uniform(0.005, 0.25)),
        memory=float(rng.choice([0.0, 0.5])),
        tails=bool(rng.random() < 0.3),
        dropout=float(rng.choice([1.0, rng.uniform(1, 1.4)])),
        gap=float(rng.uniform(-0.1, 1.0)),
        speed=float(rng.uniform(1, 25)),
        start=float(rng.uniform(1, 8)),
        rest=float(rng.uniform(0.02, 0.6)),
        coordinates=bool(rng.random() < 0.6),
        text_weight=float(rng.choice([0.5, 1, 2])),
        schedule=str(rng.choice(["cosine", "linear", "constant"])),
    )


def healthy(shape: Shape, seed: int = 0) -> list[Row]:
    """Rows in the order a trainer writes them."""
    rng = np.random.default_rng(seed)
    total = shape.rows * shape.every
    steps = np.arange(1, shape.rows + 1) * shape.every
    x = steps / total
    train = _measures(shape, x, 0.0, shape.noise, rng, "")
    accumulation = np.full(shape.rows, float(shape.grad_steps))
    if shape.resumed_with is not None:
        accumulation[shape.rows // 2 :] = shape.resumed_with
    # The noise of a mean gradient shrinks with the samples of a step.
    level = (1.3 - 0.6 * np.exp(-shape.speed * x)) * (0.5 + 0.5 * np.sqrt(shape.grad_steps / accumulation))
    train |= {
        "grad_norm": level * np.exp(_noise(shape, 2 * shape.noise, len(x), rng)),
        "learning_rate": _rate(shape, x) if not shape.restarts else _rate(shape, _since_restart(shape, x)),
        "accum/grad_steps": accumulation,
        "accum/current_grad_steps": accumulation,
    }
    if shape.fp16:
        # The loss scale begins too high: the first steps overflow and are skipped.
        train["grad_norm"][: int(rng.integers(1, max(2, min(16 // shape.every + 2, shape.rows // 4))))] = float("inf")
    at = {round(total * (i + 1) / shape.evals) for i in range(shape.evals)}
    evals = np.array(sorted({max(shape.every, step // shape.every * shape.every) for step in at}), dtype=int)
    out = _rows({"step": steps, "epoch": shape.epochs * x, **train})
    if len(evals):
        y = evals / total
        out += _rows({"step": evals, "epoch": shape.epochs * y, **_measures(shape, y, shape.gap, shape.noise / 8, rng, "eval_")})
    if shape.foreign:
        out = [{key: value for key, value in row.items() if key in _FOREIGN} for row in out]
    if not shape.accuracy:
        out = [{key: value for key, value in row.items() if not key.endswith("token_acc")} for row in out]
    return sorted(out, key=lambda row: row["step"])


def _rows(columns: dict[str, Array]) -> list[Row]:
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _noise(shape: Shape, scale: float, count: int, rng: np.random.Generator) -> Array:
    """Noise of standard deviation ``scale``, about: normal or Student t (4 degrees), white or with a memory."""
    white = rng.standard_t(4, count) / math.sqrt(2) if shape.tails else rng.standard_normal(count)
    if shape.memory:
        for i in range(1, count):
            white[i] = shape.memory * white[i - 1] + math.sqrt(1 - shape.memory**2) * white[i]
    return scale * white


def _since_restart(shape: Shape, x: Array) -> Array:
    """Share of its cycle, over 0 and up to 1."""
    return 1 - np.mod(-x * (shape.restarts + 1), 1)


def _rate(shape: Shape, x: Array) -> Array:
    y = np.clip((x - shape.warmup) / (1 - shape.warmup), 0, 1)
    after = {"cosine": 0.5 * (1 + np.cos(np.pi * y)), "linear": 1 - y, "constant": np.ones_like(y)}[shape.schedule]
    return 1e-4 * np.where(x < shape.warmup, x / max(shape.warmup, 1e-9), after)


def _measures(shape: Shape, x: Array, gap: float, noise: float, rng: np.random.Generator, prefix: str) -> dict[str, Array]:
    wide = shape.warmup + 1e-9
    effective = np.where(x > wide, x - shape.warmup / 2, x * x / (2 * wide))
    rest = 1e-5 if shape.tiny else shape.rest
    fall = (1 - rest) * np.exp(-shape.speed * effective * (2 if shape.tiny else 1)) + rest
    if shape.restarts:
        # Each restart lifts the loss, and it comes down again.
        since = _since_restart(shape, x)
        fall = fall * (1 + 0.25 * np.exp(-12 * since) * (x > 1 / (shape.restarts + 1)))
    if shape.memorises:
        # Every epoch what is seen again costs less; what is held out does not get better.
        epoch = np.floor(shape.epochs * x - 1e-9)
        fall = fall * np.where(epoch > 0, 0.88**epoch, 1.0) if not prefix else fall * (1 + 0.04 * np.maximum(0, shape.epochs * x - 2))

    def noisy(value: Array | float, scale: float = 1.0) -> Array:
        return value * np.exp(_noise(shape, scale * noise, len(x), rng))

    learnt = 1 - fall
    widened = 1 + gap * x
    text = noisy(shape.start * fall * widened * (1.0 if prefix else shape.dropout))
    values = {
        "base_ce/loss": text,
        "token_acc": np.minimum(1.0, noisy(0.1 + 0.75 * learnt - 0.1 * gap * x, 0.3)),
        "loss": shape.text_weight * text,
    }
    if shape.coordinates:
        kl, gate, w1 = noisy(4.5 * fall * widened), noisy(0.4 * fall**2 + 0.002), noisy(150 * fall * widened)
        soft = kl + FLOOR
        n_text, n_coord = np.round(noisy(np.full(len(x), 9000.0), 0.2)), np.round(noisy(np.full(len(x), 4000.0), 0.2))
        values |= {
            "coord_softce_w1/soft_ce": soft,
            "coord_dist/kl": kl,
            "coord_softce_w1/gate": gate,
            "coord_softce_w1/w1": w1,
            "coord_softce_w1/loss": soft + gate + 0.02 * w1,
            "contrib/text_ce": shape.text_weight * text,
            "contrib/soft_ce": soft,
            "contrib/gate": gate,
            "contrib/w1": 0.02 * w1,
            "coord_softce_w1/coord_vocab_mass": np.exp(-gate),
            "coord_softce_w1/p_gt_mean": noisy((0.17 * learnt + 0.002) / widened, 0.5),
            "coord_softce_w1/acc_top5": np.minimum(1.0, noisy((0.6 * learnt + 0.005) / widened, 0.5)),
            "coord_dist/entropy": 6.5 * fall + 2.4 * learnt + _noise(shape, noise, len(x), rng),
            "coord_dist/nll": 6.5 * fall + 2.3 * learnt + 0.3 * gap * x + _noise(shape, noise, len(x), rng),
            "coord_dist/signed_bias": _noise(shape, 1.0, len(x), rng) * fall,
            "coord_dist/median_bin_mae": noisy(200 * fall),
            "coord_dist/multimodal_frac": noisy(0.3 * fall),
            "coord_monitor/coord_vocab_mass_at_gt_text": noisy(0.02 * fall + 1e-4),
            "base_ce/noncoord_tokens": n_text,
            "coord_softce_w1/coord_tokens": n_coord,
        }
        values["loss"] = values["contrib/text_ce"] + values["coord_softce_w1/loss"]
        values |= {"text_token_acc": values["token_acc"], "coord_token_acc": np.minimum(1.0, noisy(0.12 * learnt, 0.5))}
        values["token_acc"] = (values["text_token_acc"] * n_text + values["coord_token_acc"] * n_coord) / (n_text + n_coord)
    return {prefix + key: value for key, value in values.items()}


def change(rows: list[Row], edit: Callable[[Row, float], None], *, evals: bool = False, train: bool = True) -> list[Row]:
    """A copy with ``edit(row, share of the run)`` applied to the training or evaluation rows."""
    last = rows[-1]["step"]
    out = [dict(row) for row in rows]
    for row in out:
        is_eval = any(key.startswith("eval_") for key in row)
        if (is_eval and evals) or (not is_eval and train):
            edit(row, row["step"] / last)
    return out


HEADER = {"schema": 1, "kind": "header", "config_sha256": "00", "git": None, "versions": {}}


def write_run(
    folder: Path, rows: list[Row], *, results: Row | None = None, config: str | None = None, arguments: Row | None = None
) -> Path:
    """A run directory's log (header, then rows) and what may stand beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logging.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [HEADER, *rows]), encoding="utf-8")
    for name, content in (("results.json", results), ("args.json", arguments)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def write_swift(folder: Path, rows: list[Row]) -> Path:
    """ms-swift's file: steps as text, numbers sometimes as text, rows twice, the last line torn."""
    folder.mkdir(parents=True, exist_ok=True)
    last, lines = rows[-1]["step"], []
    for i, row in enumerate(rows):
        values = {k: str(v) if i % 3 == 0 and isinstance(v, float) else v for k, v in row.items() if k != "step"}
        line = json.dumps({**values, "global_step/max_steps": f"{row['step']}/{last}", "elapsed_time": f"{i}s"})
        lines += [line] * (2 if i % 4 == 0 else 1)
    path = folder / "logging.jsonl"
    path.write_text("\n".join([*lines, lines[-1][: len(lines[-1]) // 2]]), encoding="utf-8")
    return path


def write_state(folder: Path, rows: list[Row]) -> Path:
    """transformers' file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": rows[-1]["step"], "max_steps": rows[-1]["step"], "log_history": rows}))
    return path


def write_events(folder: Path, rows: list[Row]) -> Path:
    """TensorBoard event files as Trainer writes them, through TensorBoard's own writer."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for row in rows:
        for key, value in row.items():
            if key != "step":
                tag = "eval/" + key[5:] if key.startswith("eval_") else "train/" + key
                writer.add_event(Event(step=row["step"], summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
    writer.close()
    return folder


def as_log(folder: Path, rows: list[Row]) -> RunLog:
    """The log of the rows, through the reader."""
    return read_log(write_run(folder, rows))
