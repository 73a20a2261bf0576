"""Files as other programs may leave them: damaged, odd or meant to harm. Each maker writes one file and says who reads it.

``python tests/hostile.py 1000`` tries 1,000 of each kind.
"""

from __future__ import annotations

import collections
import io
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coordexp.config.load import load_config
from coordexp.errors import CoordexpError
from coordexp.evaluate.distributions import read_distributions
from coordexp.runs.audit import audit

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "demo.yaml"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
Reader = Callable[[], object]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, lost, repeated, put in or cut off."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 20)):
        i = rng.randrange(len(out) or 1)
        j = min(len(out), i + rng.randrange(1, 40))
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[i] = rng.randrange(256)
        elif kind == 1:
            del out[i:j]
        elif kind == 2:
            out[i:i] = out[i:j]
        elif kind == 3:
            out[i:i] = rng.randbytes(rng.randrange(1, 9))
        else:
            del out[max(1, j) :]
    return bytes(out)


TAGS = (
    "train/loss", "eval/loss", "train/", "eval/", "", "step", "train/step", "kind", "train/kind", "log_history", "global_step/max_steps",
    "train_runtime", "train/grad_norm", "x[/]y", "[x[/]y]", "eval_", "train/eval_loss", "args/text_summary", "\x1b[31m", "é" * 300,
    "train/learning_rate", "train/epoch", "train/accum/grad_steps",
)  # fmt: skip


def tensorboard(folder: Path, rng: random.Random) -> Reader:
    """Events with odd tags, steps, tensors and types; every third file damaged."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    texts = [b"{}", b'{"fp16": true, "world_size": 4}', b"\xff", b"[[[", b"[1]", b'{"world_size": [1]}']
    for i in range(rng.randrange(60)):
        event = Event(wall_time=rng.random(), step=rng.choice([i] * 40 + [-1, 2**62, 0]))
        value = Summary.Value(tag=rng.choice(TAGS))
        kind = rng.randrange(6)
        if kind < 4:
            value.simple_value = rng.choice([rng.random(), float("nan"), float("inf"), 0.0, 1e30])
        elif kind == 4:
            value.tensor.CopyFrom(TensorProto(dtype=rng.choice([0, 1, 2, 7, 3, 99]), string_val=[rng.choice(texts)] * rng.randrange(3)))
            value.metadata.plugin_data.plugin_name = rng.choice(["scalars", "text", ""])
        else:
            value.histo.min = 1
        event.summary.value.append(value)
        writer.write(event.SerializeToString())
    data = buffer.getvalue()
    path = folder / "events.out.tfevents.1"
    path.write_bytes(damaged(data, rng) if rng.random() < 0.3 else data)
    return lambda: audit(path).text()


PIECES = (
    "&a [", "*a", "&a", "!!int ''", "!!binary x", "2026-13-45", "2026-11-24", "!!timestamp 9", "? [a]", "<<: *a", "[[[[" * 300, "{" * 2000,
    "- - - -", "'", '"', "|", "1:60", "9" * 5000, ".inf", "!!python/object:os.system", "%YAML 9.9", "\t", "\x00", "\ud7ff", "---\n", "...",
    "!<x> y", "0x", "? {a: b} : c", "!!set {a}", "!!omap [a]", "!!pairs [1]", "!!float x",
)  # fmt: skip


def yaml(folder: Path, rng: random.Random) -> Reader:
    """An experiment, a bomb of aliases, an alias of itself, with odd pieces put in; read as experiment and as what stands beside a log."""
    text = EXPERIMENT.read_text() if rng.random() < 0.6 else rng.choice([BOMB, "objective: {}", "a: &x [*x]", "a: &x {b: *x}", "- 1", ""])
    for _ in range(rng.randrange(8)):
        i = rng.randrange(len(text) + 1)
        text = text[:i] + rng.choice(PIECES) + text[min(len(text), i + rng.choice([0, 0, 5, 50])) :]
    path = folder / "config.yaml"
    path.write_text(text)
    (folder / "logging.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    readers: tuple[Reader, ...] = (lambda: load_config(path), lambda: audit(folder).text())
    return rng.choice(readers)


GOOD = {
    "image_ids": np.array(["a", "b"]), "num_bins": np.array(1000), "image": np.array([0, 0, 1], np.int32), "object": np.zeros(3, np.int32),
    "slot": np.array([0, 1, 0], np.int16), "indptr": np.array([0, 2, 3, 4]), "bins": np.array([1, 2, 3, 4], np.uint16),
    "probs": np.array([0.5, 0.5, 1, 1], np.float16), "rest": np.zeros(3, np.float32),
}  # fmt: skip
ODD = (
    np.array(3.5), np.array([]), np.zeros((2, 2)), np.array(["x"]), np.array([np.nan, 1]), np.array([2**62]), np.array([True]),
    np.array([1j]), np.array([-1]), np.array("1000"), np.zeros(3, dtype=[("a", "i4")]), np.array([b"x"]), np.array(np.datetime64("2026")),
)  # fmt: skip


def npz(folder: Path, rng: random.Random) -> Reader:
    """Distributions with arrays missing, of other shapes and types; more than half of the files damaged."""
    content = dict(GOOD)
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(GOOD))
        if rng.random() < 0.1:
            content.pop(name, None)
        else:
            content[name] = rng.choice(ODD)
    buffer = io.BytesIO()
    rng.choice([np.savez, np.savez_compressed])(buffer, **content)
    data = buffer.getvalue()
    (folder / "00000000.npz").write_bytes(damaged(data, rng) if rng.random() < 0.6 else data)
    return lambda: [item.dense() for item in read_distributions(folder)]


VALUES = (
    "1", "0.5", '"2.5"', '"x"', "null", "true", "NaN", "Infinity", "-1", "[1]", '{"a":1}', "1e999", "9" * 5000, f'"{"z" * 2000}"',
    "[[" * 3000, '"\\ud800"', f"10{'0' * 400}", '"3/9"', '"1_0"',
)  # fmt: skip
KEYS = (
    "step", "global_step", "global_step/max_steps", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch", "kind", "log_history",
    "train_runtime", "token_acc", "acc", "coord_diag/soft_ce", "x[/]y", "", "\\u0000", "accum/grad_steps", "eval_token_acc",
    "coord_softce_w1/coord_vocab_mass",
)  # fmt: skip
BESIDE = {
    "args.json": (*VALUES, '{"world_size": 4, "fp16": true}', '{"gradient_accumulation_steps": "8"}', '{"vocab_size": 10}'),
    "results.json": (*VALUES, '{"counts": 3, "intervals.a": [1, 2]}', '{"health.parse_rate": "x"}'),
    "config.yaml": ("a: 2026-01-01", "train: 3", "objective: {sigma: x}", "evaluate: {expect: {a.best.b: q}}", "evaluate: {expect: 1}"),
}


def jsonl(folder: Path, rng: random.Random) -> Reader:
    """A log, as lines or as a trainer's state, with odd keys and values, and odd files beside it."""
    lines = []
    for i in range(rng.randrange(1, 60)):
        items = [f'"step": {i}', *(f'"{key}": {rng.random():.3f}' for key in rng.sample(KEYS[3:], 4))]
        if rng.random() < 0.003:
            items = [f'"{rng.choice(KEYS)}": {rng.choice(VALUES)}' for _ in range(5)]
        if rng.random() < 0.03:
            items.append(f'"{rng.choice(KEYS)}": {rng.choice(VALUES)}')
        lines.append("{" + ", ".join(items) + "}")
    data = ("\n".join(lines) + "\n").encode()
    if rng.random() < 0.2:
        data = damaged(data, rng)
    state = rng.random() < 0.3
    path = folder / ("trainer_state.json" if state else "logging.jsonl")
    path.write_bytes(b'{"log_history": [' + b",".join(data.splitlines()) + b'], "max_steps": 9}' if state else data)
    for name, contents in BESIDE.items():
        if rng.random() < 0.15:
            (folder / name).write_text(rng.choice(contents))
    return lambda: audit(path).text()


MAKERS = {"tensorboard": tensorboard, "yaml": yaml, "npz": npz, "jsonl": jsonl}


def attempt(kind: str, seed: int, folder: Path) -> str | None:
    """None where the file was read, else its one-line refusal; anything but an error for the user is raised."""
    folder.mkdir()
    reader = MAKERS[kind](folder, random.Random(f"{kind} {seed}"))
    try:
        reader()
    except CoordexpError as error:
        return str(error)
    return None


def main() -> None:
    """So many of each kind, and what became of them."""
    for kind in MAKERS:
        with tempfile.TemporaryDirectory() as folder:
            found = [attempt(kind, seed, Path(folder) / str(seed)) for seed in range(int(sys.argv[1]))]
        tally = collections.Counter("read" if text is None else "refused" for text in found)
        print(kind, dict(tally), f"longest line {max(len(line) for text in found if text for line in text.splitlines())}")


if __name__ == "__main__":
    main()
