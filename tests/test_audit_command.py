"""``coordexp audit``: exit codes, the JSON schema, the page, audit.json, and what a mistake looks like."""

from __future__ import annotations

import json
import re

import pytest

from command import call
from coordexp.runs.rules.registry import RULES
from planted import Shape, change, healthy, write_run, write_swift
from run_fixture import make_run

ROWS = healthy(Shape(rows=60, evals=6))
WRONG = change(ROWS, lambda row, x: row.update(loss=8 * row["loss"]))
HOSTILE = "<script>alert(1)</script>"


def _json(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_healthy_log_exits_with_0_and_a_severe_finding_with_1(tmp_path, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "audit", write_run(tmp_path / "good", ROWS))
    assert (code, err) == (0, "")
    assert "0 findings" in out
    code, out, _ = call(monkeypatch, capsys, "audit", write_swift(tmp_path / "bad", WRONG))
    assert code == 1
    # What, where, how sure, what to change.
    assert "SEVERE CX001 Training loss is multiplied by the accumulation steps" in out
    assert "steps 100 to 600" in out
    assert "how sure: likely: 100% of 6 evaluations agree" in out
    assert "change: Divide by the counts" in out
    assert "docs/audit-rules.md#cx001" in out
    assert "note: logging.jsonl" in out


def test_json_has_exactly_the_fields_of_every_rule(tmp_path, monkeypatch, capsys):
    rows = change(WRONG, lambda row, x: row.update(grad_norm=float("nan")) if row["step"] == 300 else None)
    code, out, err = call(monkeypatch, capsys, "audit", write_run(tmp_path, rows), "--json")
    assert (code, err) == (1, "")
    content = _json(out)
    assert list(content) == ["rules"]
    assert [rule["code"] for rule in content["rules"]] == [rule.code for rule in RULES]
    for rule in content["rules"]:
        assert list(rule) == ["code", "title", "outcome", "severity", "evidence", "advice"]
        assert rule["outcome"] in ("finding", "passed", "not_applicable")
        assert rule["severity"] in ("info", "warning", "severe")
        assert rule["evidence"]
        assert all(isinstance(row, dict) and row["what"] for row in rule["evidence"])
    assert {rule["code"] for rule in content["rules"] if rule["outcome"] == "finding"} == {"CX001", "CX010"}


def test_a_run_directory_gets_its_audit_and_the_report_shows_it(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", images=8)
    rows = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    (run / "logging.jsonl").write_text(
        "".join(json.dumps(row | ({"loss": float("nan")} if row.get("step") == 300 else {})) + "\n" for row in rows)
    )
    code, out, _ = call(monkeypatch, capsys, "audit", run, "--json")
    assert code == 1
    assert (run / "audit.json").read_text() == out
    assert call(monkeypatch, capsys, "report", run)[0] == 0
    assert '<h3>Values that are not finite <span class="muted"><a href="#cx010">CX010</a>' in (run / "report.html").read_text()
    assert not list(run.glob(".*tmp"))


def test_another_trainers_folder_is_left_alone(tmp_path, monkeypatch, capsys):
    log = write_swift(tmp_path / "swift", ROWS)
    call(monkeypatch, capsys, "audit", tmp_path / "swift")
    assert list(log.parent.iterdir()) == [log]


def test_the_page_is_self_contained_and_escapes_what_comes_from_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = change(ROWS, lambda row, x: row.update({HOSTILE: float("nan") if x > 0.9 else 1.0}))
    folder = write_run(tmp_path / "a & b", rows)
    code, out, _ = call(monkeypatch, capsys, "audit", folder, "--html")
    assert code == 0
    assert out.splitlines()[-1] == "page: audit.html"
    page = (tmp_path / "audit.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "<h1>a &amp; b</h1>" in page
    assert not re.search(r"""(?:src|href)\s*=\s*(?!["'](?:data:|#))""", page)
    assert "http" not in page
    assert all(rule.code in page for rule in RULES)
    code, out, err = call(monkeypatch, capsys, "audit", folder, "--json", "--out", tmp_path / "deep" / "p.html")
    assert (tmp_path / "deep" / "p.html").is_file()
    assert _json(out)
    assert "p.html" in err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("logging.jsonl", "{broken\n{}\n", "logging.jsonl:1: expected one JSON object"),
        ("logging.jsonl", "", "no training or evaluation rows to audit"),
        ("trainer_state.json", "{}", "log_history: expected a list"),
        ("notes.json", "not json", "notes.json: expected JSON"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(name, content, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    before = sorted(tmp_path.iterdir())
    code, out, err = call(monkeypatch, capsys, "audit", name, "--html")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_broken_file_beside_the_log_is_named(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path, ROWS, config="a: [")
    code, _, err = call(monkeypatch, capsys, "audit", run)
    assert code == 2
    assert "config.yaml: not valid YAML" in err
