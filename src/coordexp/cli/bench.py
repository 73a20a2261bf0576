"""``coordexp bench predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import progress

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


# With one command only, typer would drop the command's name.
@app.callback()
def _group() -> None:
    pass


@app.command("predict")
def predict(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Model folder with coordinate tokens.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Records, JSONL.")],
    rounds: Annotated[int, typer.Option(min=2, help="Counted rounds; one more warms up.")] = 7,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N records.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 150,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
) -> None:
    """Boxes/s of constrained decoding against transformers' generate, interleaved."""
    from coordexp.bench.predict import PredictBench, append_csv, measure

    bench = PredictBench(
        model=model, data=data, rounds=rounds, limit=limit, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device
    )  # fmt: skip
    with progress("measuring") as show:
        rows = measure(bench, show)
    for row in rows:
        typer.echo(
            f"{row['variant']:<14} {row['p50_boxes_s']:>9} boxes/s (p20 {row['p20_boxes_s']}, p80 {row['p80_boxes_s']}, n {row['n']})  "
            f"{row['ratio_to_generate']} x generate  {row['passes']} passes  parse rate {row['parse_rate']}"
        )
    if out is not None:
        append_csv(rows, out)
