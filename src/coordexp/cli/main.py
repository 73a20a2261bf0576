"""Entry point: commands, and what an error looks like."""

from __future__ import annotations

import sys

import typer

from coordexp.cli import data, evaluate, model, predict, report, run, vocab
from coordexp.errors import CoordexpError

app = typer.Typer(
    name="coordexp",
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
app.command("report")(report.report)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")
app.add_typer(vocab.app, name="vocab")


def main() -> None:
    """Run a command. A user's mistake is one line on stderr per fault and exit code 2; an interruption exits with 130."""
    try:
        app()
    except CoordexpError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
