"""The command line: what users see of commands, mistakes and interruptions."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from command import call
from coordexp.cli import main as cli
from coordexp.cli import model as model_commands

COMMANDS = (
    ("init",), ("doctor",), ("run",), ("train",), ("predict",), ("evaluate",), ("report",), ("audit",),
    ("data", "synth"), ("data", "import"),
    ("data", "validate"), ("data", "stats"), ("data", "render"),
    ("model", "tiny"), ("vocab", "extend"), ("vocab", "export"), ("bench", "loss"), ("bench", "step"), ("bench", "predict"),
)  # fmt: skip


def _module(*words, **options):
    return subprocess.run([sys.executable, "-m", "coordexp", *map(str, words)], capture_output=True, text=True, check=False, **options)


def test_help_names_every_group_and_takes_less_than_half_a_second():
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    done = _module("--help")
    assert done.returncode == 0
    assert all(group in done.stdout for group in ("run", "train", "predict", "evaluate", "report", "data", "model", "vocab", "bench"))
    # Processor time: a busy machine is no fault of the command.
    assert spent() - before < 0.5


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(words, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage:")
    assert words[-1] in out.splitlines()[0]


def test_every_fault_of_an_experiment_is_one_error_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("data: {kind: synth}\ntrain: {max_step: 5}\nobjective: {sigma: -1}\n")
    code, out, err = call(monkeypatch, capsys, "run", path, "--output-dir", tmp_path / "run", "--set", "sead=1")
    assert (code, out) == (2, "")
    assert sorted(err.splitlines()) == [
        "error: --set sead: unknown key: did you mean seed?",
        "error: x.yaml: objective.sigma: expected a positive number, got -1.0",
        "error: x.yaml: train.max_step: unknown key: did you mean train.max_steps?",
    ]
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("run", "none.yaml"), "none.yaml"),
        (("predict", "none", "none.jsonl", "--out", "p.jsonl"), "none"),
        (("predict", "m", "d", "--out", "p", "--readout", "mean"), "--readout: expected one of argmax"),
        (("evaluate", "none.jsonl", "--data", "none.jsonl", "--out", "x"), "none.jsonl"),
        (("report", "none"), "none"),
        (("init", "x", "--kind", "dem"), "--kind: expected demo or detection, got dem"),
        (("init", "/dev/null"), "expected a folder or nothing there, got a file"),
        (("doctor", "none"), "none: no such folder: expected a model"),
        (("doctor", "--data", "none.jsonl"), "none.jsonl: expected a data file"),
        (("doctor", "--predictions", "p.jsonl"), "--predictions: expected the records they were made for"),
        (("data", "validate", "none.jsonl"), "none.jsonl"),
        (("data", "import", "voc", "none", "--out", "o"), "none"),
        (("data", "import", "voc", "none", "--out", "o", "--on-invalid", "drop"), "--on-invalid: expected skip or error"),
        (
            ("data", "import", "vco", "none", "--out", "o"),
            "FORMAT: expected coco, voc, yolo, swift, hf, refcoco, labelstudio, createml, datumaro, via, labelme, paligemma, "
            "florence2, csv or qwen, got vco",
        ),
        (("data", "import", "qwen", "none", "--out", "o"), "--coords: expected one of absolute, norm1000, norm1, got none"),
        (("data", "import", "voc", "none", "--out", "o", "--coords", "absolute"), "--coords: only for swift, hf, csv, qwen"),
        (("data", "stats", "none.jsonl"), "none.jsonl"),
        (("data", "stats", "none.jsonl", "--convention", "norm99"), "--convention: expected norm999"),
        (("data", "render", "none.jsonl", "--out", "o"), "none.jsonl"),
        (("data", "synth", "--out", "o", "--min-objects", "4"), "--max-objects: expected at least"),
        (("data", "synth", "--out", "o", "--side", "8"), "--side: expected at least 32"),
        (("model", "tiny", "--out", "o", "--hidden-size", "7"), "--hidden-size: expected an even multiple"),
        (("vocab", "extend", "none", "--out", "o"), "none"),
        (("report", "."), "expected a run directory"),
        (("bench", "loss", "--impl", "foo"), "--impl: expected one of auto, eager"),
        (("bench", "loss", "--impl", "triton"), "--impl triton: needs --device cuda"),
        (("data", "synth", "--out", "/dev/null/x"), "/dev/null"),
        (("model", "tiny", "--out", "/dev/null/x"), "/dev/null"),
        (("vocab", "extend", "none", "--out", "o", "--init", "zero"), "--init: expected one of mean"),
    ],
)
def test_a_mistake_is_one_error_line_and_exit_code_2_and_writes_nothing(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("run",),
        ("run", "x.yaml", "--nonsense"),
        ("predict", "m", "d", "--out", "p", "--batch-size", "0"),
        ("predict", "m", "d", "--out", "p", "--limit", "0"),
        ("evaluate", "p", "--data", "d", "--out", "x", "--bootstrap", "-1"),
        ("report", "r", "--images", "-1"),
        ("model", "tiny", "--out", "o", "--num-layers", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_so_on_stderr(words, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def _failing(error):
    def fail(*_args, **_options):
        raise error

    return fail


def test_an_interruption_is_one_line_and_exit_code_130(tmp_path, monkeypatch, capsys):
    import coordexp.data.synthetic

    monkeypatch.setattr(coordexp.data.synthetic, "write_scenes", _failing(KeyboardInterrupt()))
    code, out, err = call(monkeypatch, capsys, "data", "synth", "--out", tmp_path / "o")
    assert (code, out, err) == (130, "", "interrupted\n")


def test_a_bug_is_not_dressed_up_as_a_users_mistake(tmp_path, monkeypatch):
    import coordexp.data.synthetic

    monkeypatch.setattr(coordexp.data.synthetic, "write_scenes", _failing(ZeroDivisionError("a bug")))
    monkeypatch.setattr(sys, "argv", ["coordexp", "data", "synth", "--out", str(tmp_path / "o")])
    # Typer sets the hook that prints tracebacks; the test run keeps its own.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main()


def test_synth_then_validate_and_a_broken_image_is_found(tmp_path, monkeypatch, capsys):
    out_dir = tmp_path / "scenes"
    code, out, err = call(monkeypatch, capsys, "data", "synth", "--out", out_dir, "--train", 3, "--val", 1, "--test", 2, "--side", 48)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["train", "val", "test"]
    rows = [json.loads(line) for line in (out_dir / "train.jsonl").read_text().splitlines()]
    code, out, err = call(monkeypatch, capsys, "data", "validate", out_dir / "train.jsonl")
    assert (code, err) == (0, "")
    assert f"3 records, {sum(len(row['objects']) for row in rows)} objects, all valid" in out

    image = out_dir / rows[1]["images"][0]
    image.write_bytes(image.read_bytes()[:60])
    code, out, err = call(monkeypatch, capsys, "data", "validate", out_dir / "train.jsonl")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1

    code, _, err = call(monkeypatch, capsys, "data", "synth", "--out", out_dir, "--train", 1, "--val", 1, "--test", 1)
    assert code == 2
    assert "is not empty" in err


def test_a_reader_that_stops_early_sees_no_traceback(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run([sys.executable, "-m", "coordexp", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_tiny_is_a_subcommand_though_it_is_alone():
    assert [command.name for command in model_commands.app.registered_commands] == ["tiny"]
    assert _module("model", "--out", "x").returncode == 2
