"""``coordexp bench loss``, ``step`` and ``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coordexp.cli.common import AsJson, Group, examples, model_folder, progress, say

app = typer.Typer(cls=Group, help="Measure speed and memory on this machine.", no_args_is_help=True)


@app.command("loss", epilog=examples("coordexp bench loss --rounds 7", "coordexp bench loss --device cuda --dtype bfloat16 --impl triton"))
def loss(
    rows: Annotated[int, typer.Option(min=1, help="Number of supervised positions.")] = 2048,
    coords: Annotated[int, typer.Option(min=1, help="Number of coordinates among them.")] = 700,
    vocab: Annotated[int, typer.Option(min=2002, help="Number of tokens, coordinates included.")] = 152_670,
    dim: Annotated[int, typer.Option(min=1, help="Width of the hidden states, in channels.")] = 256,
    rounds: Annotated[int, typer.Option(min=2, help="Number of counted rounds; one more warms up.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    impl: Annotated[str, typer.Option(help="auto, chunked, triton or eager.")] = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, a process per variant on a CPU.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="CSV to append to; the table of single losses goes to NAME_terms.csv.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The objective against three bare matrix products and the textbook in full logits."""
    from coordexp.bench.loss import LossBench, measure, note_table, table_lines
    from coordexp.bench.measure import append_csv
    from coordexp.errors import ConfigError
    from coordexp.losses.linear import IMPLEMENTATIONS
    from coordexp.modeling.load import choose_device

    if coords > rows:
        raise ConfigError(f"--coords {coords} are more than --rows {rows}: coordinates are some of the rows")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ConfigError(f"--impl: expected one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl}")
    if impl == "triton" and device == "cpu":
        raise ConfigError("--impl triton: needs --device cuda")
    device = choose_device(device)
    bench = LossBench(rows=rows, coords=coords, vocab=vocab, dim=dim, rounds=rounds, dtype=dtype, device=device, impl=impl)
    with progress("measuring") as show:
        table = measure(bench, memory=memory, progress=show)
    singles = note_table(bench)
    if out is not None:
        append_csv(table, out)
        append_csv(singles, out.with_name(f"{out.stem}_terms.csv"))
    if as_json:
        typer.echo(json.dumps({"rows": table, "terms": singles}, default=str, indent=1))
        return
    say("\n".join(table_lines(table)))
    say("\nforward of the loss alone, logits given:")
    for row in singles:
        say(f"{row['loss']:<28}{row['p50_ms']:>10} ms (p20 {row['p20_ms']}, p80 {row['p80_ms']})")


@app.command("step", epilog=examples("coordexp bench step runs/demo/checkpoints/final runs/demo/data/train.jsonl --rounds 3"))
def step(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Model folder with coordinate tokens.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Records, JSONL.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples of the step.")] = 8,
    vocab_rows: Annotated[int, typer.Option(min=0, help="Number of rows that the embedding table is padded to; 0: as it is.")] = 152_704,
    rounds: Annotated[int, typer.Option(min=2, help="Number of counted rounds; one more warms up.")] = 7,
    out: Annotated[Path | None, typer.Option(help="CSV to append to.", show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """A training step with all metrics, without, and under the stock Trainer, interleaved."""
    from coordexp.bench.measure import append_csv
    from coordexp.bench.step import StepBench, measure

    bench = StepBench(model=model_folder(model), data=data, batch_size=batch_size, vocab_rows=vocab_rows or None, rounds=rounds)
    with progress("measuring") as show:
        rows = measure(bench, show)
    if out is not None:
        append_csv(rows, out)
    if as_json:
        typer.echo(json.dumps({"rows": rows}, default=str, indent=1))
        return
    for row in rows:
        say(
            f"{row['variant']:<16}{row['p50_ms']:>10} ms a step (p20 {row['p20_ms']}, p80 {row['p80_ms']})  x {row['to_metrics_off']}"
        )


@app.command("predict", epilog=examples("coordexp bench predict runs/demo/checkpoints/final runs/demo/data/test.jsonl --limit 20"))
def predict(
    model: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Model folder with coordinate tokens.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Records, JSONL.")],
    rounds: Annotated[int, typer.Option(min=2, help="Number of counted rounds; one more warms up.")] = 7,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N records.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 50,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 150,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="CSV to append to.", show_default="none")] = None,
    as_json: AsJson = False,
) -> None:
    """Boxes/s of constrained decoding against transformers' generate, interleaved."""
    from coordexp.bench.measure import append_csv
    from coordexp.bench.predict import PredictBench, measure

    bench = PredictBench(
        model=model_folder(model), data=data, rounds=rounds, limit=limit,
        batch_size=batch_size, max_new_tokens=max_new_tokens, device=device
    )  # fmt: skip
    with progress("measuring") as show:
        rows = measure(bench, show)
    if out is not None:
        append_csv(rows, out)
    if as_json:
        typer.echo(json.dumps({"rows": rows}, default=str, indent=1))
        return
    for row in rows:
        say(
            f"{row['variant']:<14} {row['p50_boxes_s']:>9} boxes/s (p20 {row['p20_boxes_s']}, p80 {row['p80_boxes_s']}, n {row['n']})  "
            f"{row['ratio_to_generate']} x generate  {row['passes']} passes  parse rate {row['parse_rate']}"
        )
