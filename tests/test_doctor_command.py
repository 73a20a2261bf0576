"""``coordexp doctor``: checks of the machine, exit codes, and what is printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from boxfiles import LAYOUTS, files, rows, write
from command import call
from coordexp.doctor.environment import (
    check_environment,
    check_folder,
    check_gpu,
    check_offline,
    check_packages,
    check_python,
    check_torchvision,
    check_triton,
    folders,
)
from tiny import workspace

ENVIRONMENT = (
    "python", "packages", "torch", "gpu", "triton", "torchvision", "image_processor", "folder_runs", "folder_temp", "folder_cache",
    "offline",
)  # fmt: skip
CHECKPOINT = ("files", "tokens", "round_trip", "special_tokens", "weights", "sizes", "head", "rows", "contract", "pixels")
DATA = ("file", "units", "layout", "boxes", "grid", "duplicates")
PREDICTIONS = ("reading", "convention")


def names(group, parts):
    return [f"{group}.{part}" for part in parts]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_check_has_its_stable_name_and_all_are_printed_as_json(here, monkeypatch, capsys):
    records, predictions = files(here, lambda b, s: b)
    words = ("doctor", workspace() / "model", "--data", records, "--predictions", predictions, "--json")
    code, out, _ = call(monkeypatch, capsys, *words)
    content = json.loads(out)
    expected = names("environment", ENVIRONMENT) + names("checkpoint", CHECKPOINT) + names("data", DATA) + names("predictions", PREDICTIONS)
    assert [check["name"] for check in content["checks"]] == expected
    assert all(set(check) == {"name", "outcome", "seen", "advice", "details"} for check in content["checks"])
    assert content["counts"]["fail"] == sum(check["outcome"] == "fail" for check in content["checks"])
    assert sum(content["counts"].values()) == len(expected)
    assert code == (1 if content["counts"]["fail"] else 0)


def test_text_says_what_was_seen_and_what_to_do_without_colour(here, monkeypatch, capsys):
    path = write(here, rows(3, change=LAYOUTS["xywh"]))
    code, out, _ = call(monkeypatch, capsys, "doctor", "--data", path)
    assert code == 1
    assert "\x1b" not in out
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  FAIL layout: expected [x1, y1, x2, y2], got [x, y, width, height]"))
    assert lines[at + 1] == "       do: write boxes as [x1, y1, x2, y2]"
    assert lines[-1].split(", ")[2] == "1 fail"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere",), "nowhere: no such folder"),
        (("--data", "nothing.jsonl"), "nothing.jsonl: expected a data file, got nothing there"),
        (("--predictions", "p.jsonl"), "--predictions: expected the records they were made for as well"),
        (("--data", "."), ".: expected a file or folder of a format that `coordexp data import` reads"),
        (("run",), "run: a run directory without checkpoints/final"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(here, monkeypatch, capsys, words, says):
    (here / "run").mkdir()
    (here / "run" / "manifest.json").write_text("{}")
    code, out, err = call(monkeypatch, capsys, "doctor", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}")
    assert len(err.splitlines()) == 1


def test_predictions_of_other_images_are_a_users_mistake(here, monkeypatch, capsys):
    records, predictions = files(here, lambda b, s: b)
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = call(monkeypatch, capsys, "doctor", "--data", records, "--predictions", predictions)
    assert code == 2
    assert "have no prediction" in err


def test_a_run_directory_means_its_final_checkpoint(here, monkeypatch, capsys):
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "manifest.json").write_text("{}")
    (here / "run" / "checkpoints" / "final").symlink_to(workspace() / "model")
    _, out, _ = call(monkeypatch, capsys, "doctor", "run", "--json")
    seen = {check["name"]: check["seen"] for check in json.loads(out)["checks"]}
    assert seen["checkpoint.files"].startswith("run/checkpoints/final: a model")


def test_this_machine_can_run_the_tests(here):
    found = {check.name: check.outcome for check in check_environment()}
    assert [name for name in names("environment", ENVIRONMENT) if name not in found] == []
    assert found["environment.python"] == "ok"
    assert found["environment.image_processor"] == "ok"


def test_package_versions_are_held_against_the_declared_ranges():
    declared = [Requirement("torch>=2.6"), Requirement("peft>=0.20,<0.22"), Requirement("Type_Set>=1")]
    installed = {"torch": "2.13.0+cpu", "peft": "0.21.2", "type-set": "1.5"}
    assert check_packages(declared, installed).outcome == "ok"
    found = check_packages(declared, {"torch": "2.5.1", "peft": "0.22.0"})
    assert found.outcome == "fail"
    assert set(found.details["problems"]) == {"torch", "peft", "Type_Set"}
    assert "'torch>=2.6'" in found.advice
    assert check_packages(None, installed).outcome == "skipped"


def test_python_is_held_against_the_declared_range():
    assert check_python("3.11.2", ">=3.11").outcome == "ok"
    assert check_python("3.10.9", ">=3.11").outcome == "fail"
    assert check_python("3.10.9", None).outcome == "ok"


def test_a_gpu_that_torch_does_not_use_is_a_warning():
    none = {"bf16": False, "driver": False, "gpu_build": False}
    assert check_gpu([], **none).outcome == "ok"
    assert "CUDA build" in check_gpu([], **none | {"driver": True}).advice
    assert "CUDA_VISIBLE_DEVICES" in check_gpu([], **none | {"driver": True, "gpu_build": True}).advice
    assert check_gpu(["A", "A"], **none).outcome == "warning"
    sound = check_gpu(["A", "A"], **none | {"bf16": True})
    assert (sound.outcome, sound.seen) == ("ok", "2 GPUs (A), bf16 yes")


def test_triton_is_missed_on_a_gpu_only():
    assert [check_triton(here, gpu=gpu).outcome for here in (True, False) for gpu in (True, False)] == ["ok", "ok", "warning", "ok"]


def test_a_broken_torchvision_fails_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    found = check_torchvision()
    assert found.outcome == "fail"
    assert found.seen.endswith("RuntimeError: operator torchvision::nms does not exist")
    (tmp_path / "torchvision.py").write_text("")
    assert check_torchvision().outcome == "ok"


def test_a_folder_that_cannot_be_written_fails_and_nothing_is_left_in_one_that_can(tmp_path):
    assert check_folder("runs", tmp_path / "a" / "b").outcome == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert check_folder("runs", tmp_path / "file" / "below").outcome == "fail"
    assert check_folder("cache", tmp_path / "file").outcome == "warning"


def test_the_hubs_folder_and_switch_are_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", "/some/home")
    assert str(folders()["cache"]) == "/some/home/hub"
    assert "is on" in check_offline({"HF_HUB_OFFLINE": "1"}).seen
    assert "is off" in check_offline({"HF_HUB_OFFLINE": "0"}).seen
    assert "is off" in check_offline({}).seen


@pytest.mark.parametrize(
    "module", ["coordexp.doctor.data", "coordexp.doctor.predictions", "coordexp.doctor.examine", "coordexp.cli.doctor"]
)
def test_the_probes_load_no_torch(module):
    code = f"import sys, {module}\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_check_is_explained_in_the_docs():
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    for group, parts in (
        ("environment", ENVIRONMENT),
        ("checkpoint", (*CHECKPOINT, "base", "adapter")),
        ("data", DATA),
        ("predictions", PREDICTIONS),
    ):
        assert [name for name in names(group, parts) if f"`{name}`" not in text] == []
