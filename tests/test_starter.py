"""``coordexp init`` and the wheel: what is written runs, nothing is overwritten, and the package alone is enough."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from test_experiment import SMALL, _sets
from test_help import check_parses, commands_in

from command import call
from coordexp.config.load import load_config
from coordexp.starter.write import KINDS, starter_files
from tiny import workspace

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("kind", "name"), [("demo", "demo"), ("detection", "finetune")])
def test_the_packaged_experiment_is_the_one_in_experiments(kind, name):
    assert starter_files(kind)[f"{kind}.yaml"] == (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_init_writes_a_commented_experiment_that_loads_and_a_readme_with_commands_that_parse(kind, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my run"
    code, out, err = call(monkeypatch, capsys, "init", folder, "--kind", kind)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["README.md", f"{kind}.yaml"])
    assert str(folder / f"{kind}.yaml") in out
    config = load_config(folder / f"{kind}.yaml")
    assert config.name == kind
    assert config.question
    text = (folder / f"{kind}.yaml").read_text()
    sections = re.findall(r"^(\w+):.*$", text, flags=re.MULTILINE)
    assert text.count("#") >= len(sections)
    # Of prose, lines that hold a command in backquotes; of blocks, every line.
    lines = [re.sub(r"^.*`(coordexp [^`]*)`.*$", r"\1", line).strip() for line in (folder / "README.md").read_text().splitlines()]
    commands = list(commands_in("\n".join(line for line in lines if line.startswith(("coordexp ", "torchrun ")))))
    assert len(commands) >= 5
    for command in commands:
        check_parses(command)
        if command[0] == "run":
            sets = [value for flag, value in itertools.pairwise(command) if flag == "--set"]
            load_config(folder / command[1], sets).train.check_length()


@pytest.mark.parametrize("name", ["demo.yaml", "README.md"])
def test_init_overwrites_nothing_and_writes_nothing_beside_it(name, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_text("mine")
    code, out, err = call(monkeypatch, capsys, "init", tmp_path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(tmp_path / name) in err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_init_goes_into_a_folder_that_holds_other_things(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert call(monkeypatch, capsys, "init", tmp_path, "--kind", "detection")[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_detection_template_runs_on_own_data_with_a_model_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, capsys, "init", ".", "--kind", "detection")[0] == 0
    assert call(monkeypatch, capsys, "run", "detection.yaml")[2].startswith("error: models/qwen3-vl: no such model folder")
    small = [
        "model.max_pixels=4096", "train.num_train_epochs=1", "decode.max_new_tokens=60", "evaluate.bootstrap=5", "data.max_test=2",
    ]  # fmt: skip
    where = [f"model.path={workspace() / 'tiny'}", f"data.source={workspace() / 'data'}"]
    code, _, err = call(monkeypatch, capsys, "run", "detection.yaml", *_sets(*small, *where))
    assert (code, err) == (0, "")
    assert (tmp_path / "runs" / "detection" / "report.html").is_file()
    assert (tmp_path / "runs" / "detection" / "checkpoints" / "final" / "adapter_config.json").is_file()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and a source archive, built from a copy-free call of the standard front end."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


def _members(archive):
    with tarfile.open(archive) as file:
        return file.getnames()


def test_the_archives_hold_what_they_should_and_no_more(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "coordexp").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == tracked
    assert {"coordexp/starter/demo/demo.yaml", "coordexp/runs/templates/report.css", "coordexp/py.typed"} <= names
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "# coordexp" in metadata
    assert not re.search(r"(?:https?|file)://(?!github\.com|www\.apache\.org)", metadata)
    tops = {name.split("/")[1] for name in _members(source) if "/" in name}
    assert tops == {
        "src",
        "tests",
        "docs",
        "experiments",
        "benchmarks",
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }


def test_the_wheel_alone_makes_and_runs_the_demo(built, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*words):
        return subprocess.run([str(word) for word in words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)

    (wheel,) = built.glob("*.whl")
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    assert done.returncode == 0, done.stderr
    # Dependencies are those of this environment, seen after the installation; coordexp itself can only come from the wheel.
    (site / "zz-dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    coordexp = environment / "bin" / "coordexp"
    where = run(python, "-c", "import coordexp; print(coordexp.__file__)")
    assert where.stdout.strip() == str(site / "coordexp" / "__init__.py")
    assert run(coordexp, "init", "my-run").returncode == 0
    done = run(
        coordexp, "run", "my-run/demo.yaml", *_sets(*(pair for pair in SMALL if "group_by" not in pair)), "--set", "evaluate.expect={}"
    )
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "runs" / "demo" / "report.html").read_text()
    assert "<style>" in report
    assert (site / "coordexp" / "runs" / "templates" / "report.css").read_text().strip().splitlines()[0] in report
