"""Entry point: commands, and what an error looks like."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from coordexp.cli import ab, audit, bench, compare, data, doctor, evaluate, model, predict, report, run, vocab
from coordexp.errors import CoordexpError, RunStopped


class _Interrupted(Exception):
    """An interruption on its way to :func:`main`."""


class _Group(TyperGroup):
    """Typer's exit code for an interruption differs from version to version, and it says nothing; so it never sees one."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    name="coordexp",
    cls=_Group,
    help="Train, decode and evaluate vision-language models that point by writing coordinate tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("train")(run.train)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("audit")(audit.audit)
app.command("ab")(ab.ab)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(vocab.app, name="vocab")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command. A user's mistake is one line on stderr per fault and exit code 2; an interruption exits with 130, SIGTERM with 143."""
    try:
        app()
    except CoordexpError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {str(error.strerror).lower()}: choose a path that can be used", file=sys.stderr)
        sys.exit(2)
    except RunStopped as stop:
        print("interrupted" if stop.signum == signal.SIGINT else "terminated", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except _Interrupted:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
