"""Names of other people's files are text on a terminal, in Markdown and in HTML: no markup, no tag, no control sequence, no traceback."""

from __future__ import annotations

import html
import io
import json
import re

import pytest
from rich.table import Table

from command import call
from coordexp.data.records import read_records
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.result import evaluate_files
from coordexp.runs.options import ReportOptions
from coordexp.runs.report import write_report
from coordexp.terminal import Terminal, plain
from planted import Shape, healthy, write_run
from run_fixture import make_run

NAMES = (
    "[x[/]y]", "[bold]b[/bold]", "[/]", ":smile:", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![p](http://a.b/c.png)",
    "[a](javascript:b)", "`code` **b** _i_ ~~s~~", "a | b", "a\\", "&lt;", "\x1b[31mred\x1b[0m", "\x9b31m", "\u202egnp", "www.a.b $x$",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_a_terminal_is_its_own_text(name):
    out = io.StringIO()
    console = Terminal()
    console.file = out
    table = Table(box=None)
    table.add_column("")
    table.add_row(plain(name))
    console.print(name)
    console.print(table)
    shown = out.getvalue().splitlines()
    assert shown[0] == plain(name)
    assert plain(name) in shown[2].strip()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out.getvalue())


def test_commands_show_odd_names_and_end_in_no_traceback(tmp_path, monkeypatch, capsys):
    for n, name in enumerate(("[x[/]y]", "[/]", ":smile:", "\x1b[31mred\x1b[0m", "\x9b31m")):
        folder = tmp_path / str(n) / re.sub(r"[/\x00]", "", name)
        rows = [{**row, name: 1.0} for row in healthy(Shape(rows=40, evals=4, coordinates=False))]
        rows[5]["loss"] = float("nan")
        write_run(folder, rows)
        code, out, err = call(monkeypatch, capsys, "audit", folder)
        assert (code, err) == (1, ""), name
        assert plain(folder.name) in out
        assert "\x1b" not in out
        code, _, err = call(monkeypatch, capsys, "evaluate", folder / name, "--data", folder, "--out", tmp_path / "e")
        assert code == 2
        assert "\x1b" not in err


def test_names_in_tables_and_pages_are_text(tmp_path):
    run = make_run(tmp_path / "run", images=len(NAMES), side=32, objects=1)
    for file in ("data/test.jsonl", "predictions.jsonl"):
        rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
        for row, name in zip(rows, NAMES, strict=False):
            for item in row["objects"]:
                item["desc"] = name
        (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(run / "data" / "test.jsonl", check_images=False).records
    assert {item.desc for record in records for item in record.objects} >= set(NAMES[:10])
    evaluate_files(run / "predictions.jsonl", run / "data" / "test.jsonl", EvaluateOptions(bootstrap=0), out=tmp_path / "e", force=True)
    table = (tmp_path / "e" / "table.md").read_text()
    classes = table[table.index("## Classes") + 3 :].split("\n## ")[0]
    assert not re.search(r"(?<!\\)[<`*\[]|\x1b|(?<!\\)://", classes.replace("---", ""))
    # Every row has as many cells as the head: an unescaped bar would make one more.
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in classes.splitlines() if line.startswith("|")}) == 1
    page = write_report(run, ReportOptions(images=len(NAMES))).read_text()
    for name in NAMES[4:6]:
        assert name not in page
        assert html.escape(name) in page
