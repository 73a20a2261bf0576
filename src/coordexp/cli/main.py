"""Entry point: commands, and what an error looks like."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from coordexp.cli import ab, audit, bench, compare, data, doctor, evaluate, exporting, init, model, plan, predict, report, run, vocab
from coordexp.cli.common import Group, examples, say
from coordexp.cli.interrupts import answered
from coordexp.errors import CoordexpError, RunStopped
from coordexp.terminal import plain

# Newer versions of Typer bring their own copy of click; this is the base of usage errors in either.
_UsageError: Any = typer.BadParameter.__bases__[0]


class _Interrupted(Exception):
    """An interruption on its way to :func:`main`."""


class _Root(Group):
    """Typer's exit code for an interruption differs from version to version, and it says nothing; so it never sees one."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Interrupted from None


app = typer.Typer(
    name="coordexp",
    cls=_Root,
    help="Train, decode and evaluate vision-language models that point by writing coordinate tokens.",
    epilog=examples("coordexp init my-run && cd my-run && coordexp run demo.yaml", "coordexp COMMAND --help"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100, "help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from coordexp import __version__

        say(f"coordexp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; COORDEXP_DEBUG=1 does too.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, decode and evaluate vision-language models that point by writing coordinate tokens."""
    if debug:
        # Processes that a command starts show theirs too.
        os.environ["COORDEXP_DEBUG"] = "1"


app.command("init", epilog=init.EXAMPLES)(init.init)
app.command("run", epilog=run.RUN_EXAMPLES)(run.run)
app.command("train", epilog=run.TRAIN_EXAMPLES)(run.train)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("predict", epilog=predict.EXAMPLES)(predict.predict)
app.command("evaluate", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("audit", epilog=audit.EXAMPLES)(audit.audit)
app.command("ab", epilog=ab.EXAMPLES)(ab.ab)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("report", epilog=report.EXAMPLES)(report.report)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(exporting.predictions, name="predictions")
app.add_typer(model.app, name="model")
app.add_typer(vocab.app, name="vocab")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run a command. A user's mistake is one line on stderr per fault and exit code 2; an interruption exits with 130, SIGTERM with 143.

    With ``--debug`` or ``COORDEXP_DEBUG`` set to anything but nothing or 0, its traceback comes first.
    """
    # A file name that is no UTF-8 is shown with escapes.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with answered():
            code = app(prog_name="coordexp", standalone_mode=False)
    except CoordexpError as error:
        _fail(str(error).splitlines(), error)
    except _UsageError as error:
        _usage(error)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if error.filename is None:
            raise
        _fail([f"{error.filename}: {str(error.strerror).lower()}: choose a path that can be used"], error)
    except RunStopped as stop:
        print("interrupted" if stop.signum == signal.SIGINT else "terminated", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (_Interrupted, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


def _fail(lines: list[str], error: Exception) -> None:
    if os.environ.get("COORDEXP_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    for line in lines:
        print(f"error: {plain(line)}", file=sys.stderr)
    sys.exit(2)


def _usage(error: Any) -> None:
    """One line; a group without a command shows its help."""
    message = error.format_message()
    if "\n" in message:
        print(message, file=sys.stderr)
        sys.exit(2)
    path = "coordexp" if error.ctx is None else error.ctx.command_path
    _fail([f"{message.rstrip('.')}: see `{path} --help`"], error)
