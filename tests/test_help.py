"""Every command's help: a screen, every option explained with unit and default, examples that parse; one line for a wrong usage."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from command import call
from coordexp.cli.main import app

COLUMNS, LINES = 100, 50
# What a number may be: a unit, or what is counted.
UNITS = re.compile(
    r"\b(pixels?|bins?|bits|channels|tokens?|images?|records?|scenes?|objects?|pictures?|positions?|rows?|samples?|layers?|rounds?|resamples"
    r"|runs|processes|GB|coordinates|cosine|logit units|seed)\b",
    re.IGNORECASE,
)


def _commands():
    """``(words, command)`` of the root, every group and every command."""
    found = []

    def walk(words, command):
        found.append((words, command))
        for name, inner in getattr(command, "commands", {}).items():
            walk((*words, name), inner)

    walk((), typer.main.get_command(app))
    return found


COMMANDS = _commands()
# An earlier name of a command is hidden, and its page that of the new one.
LEAVES = [(words, command) for words, command in COMMANDS if not hasattr(command, "commands") and not command.hidden]
each = pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) or "coordexp" for words, _ in COMMANDS])
leaf = pytest.mark.parametrize(("words", "command"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])


def _help(monkeypatch, capsys, words, columns=COLUMNS):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = call(monkeypatch, capsys, *words, "--help")
    assert (code, err) == (0, "")
    return out


def test_the_walk_finds_what_is_there():
    names = {" ".join(words) for words, _ in COMMANDS}
    assert {"", "init", "doctor", "run", "data import", "vocab export", "bench loss", "model tiny"} <= names


@each
def test_help_fits_a_screen_and_cuts_no_sentence(words, command, monkeypatch, capsys):
    out = _help(monkeypatch, capsys, words)
    lines = out.rstrip("\n").splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert "..." not in out.partition("\n\n")[2].replace("[ARGS]...", "").replace("]...", "")


def _entries(text):
    """Text of every argument and option by its left column, joined where help wraps."""
    found, name = {}, None
    for line in re.split(r"^(?=Arguments:|Options:)", text, maxsplit=1, flags=re.MULTILINE)[1].splitlines():
        if re.match(r"^  \S", line) and not line.startswith("  Examples"):
            name, _, rest = line.strip().partition("  ")
            found[name] = rest.strip()
        elif name is not None and re.match(r"^ {3,}\S", line):
            found[name] = f"{found[name]} {line.strip()}".strip()
        else:
            name = None
    return found


@leaf
def test_every_option_says_what_it_is_in_what_unit_and_its_default(words, command, monkeypatch, capsys):
    shown = _entries(_help(monkeypatch, capsys, words))
    numbers = 0
    for option in command.params:
        name = option.metavar if option.param_type_name == "argument" else option.opts[0]
        text = next(text for entry, text in shown.items() if name.strip("[]") in re.split(r"[\s\[\]]+", entry))
        assert option.help, name
        assert " ".join(option.help.split()) in text, name
        if re.search(r"<(int|float)|INTEGER|FLOAT", next(entry for entry, value in shown.items() if value == text)):
            numbers += 1
            assert UNITS.search(option.help), f"{name}: {option.help}"
        # A flag without a negative is off unless it is given.
        if not (getattr(option, "is_flag", False) and not option.secondary_opts):
            assert "required]" in text or "default: " in text, f"{name}: {text}"
    declared = [option for option in command.params if isinstance(option.default, int | float) and not isinstance(option.default, bool)]
    assert numbers >= len(declared)


def commands_in(text):
    """Words of every command line of ours, possibly after ``torchrun ... -m`` or as one of several joined by ``&&``."""
    for line in text.splitlines():
        if "coordexp" not in line:
            continue
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if "coordexp" in words and words[0] in ("coordexp", "torchrun"):
                yield words[words.index("coordexp") + 1 :]


def check_parses(example):
    """Parse and convert every value of a command line; raises on a wrong one. Nothing is run."""
    target, rest = typer.main.get_command(app), list(example)
    context = target.make_context("coordexp", list(example))
    while hasattr(target, "commands"):
        name, target, rest = target.resolve_command(context, rest)
        context = target.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args] if hasattr(target, "commands") else []


@leaf
def test_examples_are_there_and_parse(words, command):
    found = list(commands_in(command.epilog or ""))
    assert found
    for example in found:
        assert tuple(example[: len(words)]) == words
        check_parses(example)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nonsense",), "No such command 'nonsense': see `coordexp --help`"),
        (("rum", "x.yaml"), "No such command 'rum'"),
        (("run",), "Missing argument 'EXPERIMENT.yaml': see `coordexp run --help`"),
        (("run", "x.yaml", "--nonsense"), "No such option: --nonsense"),
        (("evaluate", "p"), "Missing option '--data'"),
        (("data", "synth", "--out", "o", "--train", "many"), "Invalid value for '--train': "),
        (("predict", "m", "d", "--out", "p", "--batch-size", "0"), "Invalid value for '--batch-size'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_and_exit_code_2(words, message, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith(f"error: {message}")
    assert err.rstrip("\n").endswith("--help`")


def test_without_a_command_the_help_is_shown(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys)
    assert code == 2
    assert "Commands:" in out + err


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    import coordexp

    assert call(monkeypatch, capsys, "--version") == (0, f"coordexp {coordexp.__version__}\n", "")


def test_a_traceback_is_shown_only_when_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.delenv("COORDEXP_DEBUG", raising=False)
    plain = call(monkeypatch, capsys, "report", "none")
    assert plain[0] == 2
    assert "Traceback" not in plain[2]
    monkeypatch.setenv("COORDEXP_DEBUG", "0")
    assert call(monkeypatch, capsys, "report", "none") == plain
    monkeypatch.setenv("COORDEXP_DEBUG", "1")
    code, out, err = call(monkeypatch, capsys, "report", "none")
    assert (code, out) == plain[:2]
    assert err.startswith("Traceback")
    assert err.endswith(plain[2])
    monkeypatch.setenv("COORDEXP_DEBUG", "")
    assert call(monkeypatch, capsys, "--debug", "report", "none") == (code, out, err)


def _module(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "coordexp", *words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell):
    done = _module(_COORDEXP_COMPLETE=f"source_{shell}", _TYPER_COMPLETE_TESTING="1")
    assert done.returncode == 0
    assert "coordexp" in done.stdout
    words = {"bash": {"COMP_WORDS": "coordexp ev", "COMP_CWORD": "1"}}.get(shell, {"_TYPER_COMPLETE_ARGS": "coordexp ev"})
    done = _module(_COORDEXP_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_FISH_ACTION="get-args", **words)
    assert "evaluate" in done.stdout


def test_no_color_is_respected(tmp_path):
    rows = "".join(f'{{"step": {i}, "loss": {2.0 - i / 100}}}\n' for i in range(1, 60)) + '{"step": 60, "loss": NaN}\n'
    (tmp_path / "logging.jsonl").write_text(rows)
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3|4|9)\d")
    forced = _module("audit", str(tmp_path / "logging.jsonl"), FORCE_COLOR="1", TERM="xterm-256color")
    assert colour.search(forced.stdout)
    without = _module("audit", str(tmp_path / "logging.jsonl"), FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert not colour.search(without.stdout)
    assert without.returncode == forced.returncode == 1
