"""What commands and keys in the documentation are checked against: the real command line, configuration and build files."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
import typing
from itertools import pairwise

import typer
from typer.core import TyperGroup

from coordexp.cli.main import app
from coordexp.config.schema import ExperimentConfig
from pages import ROOT

# Named in the text before they are merged: unknown to the command line they pass, known to it they are checked like all.
COMING: set[tuple[str, ...]] = set()

# Typer brings its own click in newer versions: its classes are taken from what it hands out.
UsageError = typer.BadParameter.__bases__[0]

# Programs that a page may call, beside coordexp. What they do is not checked, except as below.
PROGRAMS = {
    "make", "pip", "python", "python3", "torchrun", "accelerate", "tensorboard", "mv", "cp", "head", "tail", "git", "cd", ".",
    "pre-commit", "swift", "ruff", "mypy", "lint-imports",
}  # fmt: skip
# Options of other programs that stand alone in the text. Ours have no underscores, so what has one is foreign by itself.
FOREIGN_OPTIONS = {"--nproc-per-node"}
# Of a term that docs/math.md adds as an example.
EXAMPLE_METRICS = {"contrib/peak"}


def command_line() -> typing.Any:
    """The whole command line."""
    return typer.main.get_command(app)


def resolve(words: list[str]) -> tuple[typing.Any, list[str]]:
    """The command that ``words`` (without the program) begin with, and the rest; None for one that is still to come.

    Raises:
        AssertionError: no such command.
    """
    command, rest, path = command_line(), list(words), []
    while isinstance(command, TyperGroup) and rest and not rest[0].startswith("-"):
        path.append(rest[0])
        if rest[0] not in command.commands:
            assert tuple(path) in COMING, f"coordexp {' '.join(path)}: no such command"
            return None, rest[1:]
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def option_names(command: typing.Any = None) -> set[str]:
    """Options of a command and, for a group, of everything below it."""
    command = command or command_line()
    names = {"--help"}
    for parameter in command.params:
        names |= {*parameter.opts, *parameter.secondary_opts}
    for below in command.commands.values() if isinstance(command, TyperGroup) else ():
        names |= option_names(below)
    return names


def check_command(words: list[str]) -> None:
    """Parse a whole command as it would be at a prompt, without running it.

    Raises:
        AssertionError: what the command would say.
    """
    command, rest = resolve(words)
    if command is None or rest == ["--help"]:
        return
    try:
        command.make_context("coordexp", rest)
    except UsageError as error:
        raise AssertionError(f"coordexp {' '.join(words)}: {error.format_message()}") from None


def commands(script: str) -> list[list[str]]:
    """Simple commands of a script in words: continued lines joined, comments and assignments in front dropped, split at ``&&``."""
    found: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        current: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                if current or not re.match(r"[A-Z_]+=", word):
                    current.append(word)
            elif current:
                found.append(current)
                current = []
    return found


def ours(words: list[str]) -> list[str] | None:
    """Words after ``coordexp``, however it was started; None for another program."""
    if words[0] == "coordexp":
        return words[1:]
    for i, (flag, module) in enumerate(pairwise(words)):
        if (flag, module) == ("-m", "coordexp"):
            return words[i + 2 :]
    return None


def check_program(words: list[str]) -> None:
    """Another program: known, and its make target, script, module or extra exists.

    Raises:
        AssertionError: something does not.
    """
    line = " ".join(words)
    assert words[0] in PROGRAMS, f"{line}: unknown program"
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert set(words[1:]) <= targets, f"{line}: no such target"
    if words[0].startswith("python") and words[1:2] != ["-m"]:
        assert (ROOT / words[1]).is_file(), f"{line}: no such script"
    if words[0].startswith("python") and words[1:2] == ["-m"] and words[2].startswith("coordexp"):
        assert (ROOT / "src" / words[2].replace(".", "/")).with_suffix(".py").is_file(), f"{line}: no such module"
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        for group in re.findall(r"\[([\w,-]+)\]", line):
            assert set(group.split(",")) <= set(extras), f"{line}: no such extra"
        for file in re.findall(r"-c (\S+)", line):
            assert (ROOT / file).is_file(), f"{line}: {file} does not exist"


def check_key(dotted: str) -> None:
    """A dotted configuration key exists.

    Raises:
        AssertionError: it does not, with the part at fault.
    """
    kind: typing.Any = ExperimentConfig
    for part in dotted.split("."):
        if typing.get_origin(kind) is dict:
            return
        assert dataclasses.is_dataclass(kind), f"{dotted}: nothing below {part}"
        fields = {field.name for field in dataclasses.fields(kind)}
        assert part in fields, f"{dotted}: {part} is no key, there are {', '.join(sorted(fields))}"
        kind = typing.get_type_hints(kind)[part]


def metric_names() -> str:
    """Text that names every metric of a log: the generated page, and the source of the generation probe."""
    return (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") + (ROOT / "src/coordexp/predicting.py").read_text(encoding="utf-8")


def script_options() -> set[str]:
    """Options of the scripts under benchmarks/."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    return set(re.findall(r'"(--[a-z][\w-]+)"', text))


def sections() -> set[str]:
    """Names of the sections of an experiment."""
    hints = typing.get_type_hints(ExperimentConfig)
    return {name for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
