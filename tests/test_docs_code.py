"""Commands, keys, snippets and shown output of the documentation against the real thing."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from coordexp.cli import main as cli
from coordexp.config.arms import load_ab
from coordexp.config.load import load_config
from coordexp.runs.rules.registry import RULES
from pagecode import (
    EXAMPLE_METRICS,
    FOREIGN_OPTIONS,
    check_command,
    check_key,
    check_program,
    commands,
    metric_names,
    option_names,
    ours,
    resolve,
    script_options,
    sections,
)
from pages import ROOT, pages

REASONS = ("installation", "minutes", "gpu", "another data set", "several processes", "a released checkpoint", "another environment")
BLOCKS = [block for one in pages() for block in one.blocks]


def _of(*infos):
    return [block for block in BLOCKS if block.info in infos]


def test_every_block_is_of_a_known_kind_and_none_is_silently_untested():
    allowed = {
        "bash": {"run", "stand-in", "parse"},
        "python": {None, "in"},
        "yaml": {None, "file", "form"},
        "json": {None, "form"},
        "text": {None, "output"},
        "": {None, "output"},
        "{toctree}": {None},
    }
    wrong = []
    for block in BLOCKS:
        if block.info not in allowed:
            wrong.append(f"{block.place}: a block of {block.info!r}: expected one of {', '.join(map(repr, allowed))}")
        elif block.mark not in allowed[block.info]:
            wrong.append(f"{block.place}: mark {block.mark!r} on {block.info!r}: expected one of {allowed[block.info]}")
        elif block.mark == "parse" and block.value not in REASONS:
            wrong.append(f"{block.place}: why it is not run: expected one of {', '.join(REASONS)}, got {block.value!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("block", _of("bash"), ids=lambda b: b.place)
def test_every_command_exists_with_every_option_and_argument(block):
    for words in commands(block.text):
        command = ours(words)
        if command is None:
            check_program(words)
        else:
            check_command(command)
            _check_overrides(command, block.place)


def _check_overrides(command, place):
    """``--set`` on an experiment of the repository is loaded with it."""
    overrides = [value for flag, value in pairwise(command) if flag == "--set"]
    experiment = next((ROOT / word for word in command if word.endswith(".yaml") and (ROOT / word).is_file()), None)
    if experiment is not None and command[0] in ("run", "train"):
        assert load_config(experiment, overrides) is not None, place
    for override in overrides:
        key = override.partition("=")[0]
        if "train.max_step=" not in override:
            check_key(key)


def test_commands_options_keys_metrics_and_rules_named_in_the_text_exist():
    known = option_names() | script_options() | FOREIGN_OPTIONS
    metrics = metric_names()
    codes = {rule.code for rule in RULES}
    names = sections()
    wrong = []
    for one in pages():
        for line, span in one.spans():
            try:
                _check_span(span, known, metrics, codes, names)
            except (AssertionError, ValueError) as error:
                wrong.append(f"{one.name}:{line}: `{span}`: {error}")
    assert not wrong, "\n".join(wrong)


# Named like keys of an experiment, but checks of the doctor.
DOCTOR = {
    name
    for path in (ROOT / "src" / "coordexp" / "doctor").glob("*.py")
    for name in re.findall(r'"((?:data|checkpoint)\.[a-z_]+)"', path.read_text())
}


def _check_span(span, known, metrics, codes, names):
    words = span.split()
    if span in DOCTOR:
        return
    if words[0] == "coordexp" and len(words) > 1 and re.fullmatch(r"[a-z-]+", words[1]):
        command, rest = resolve(words[1:])
        options = {word.partition("=")[0] for word in rest if word.startswith("--")}
        if command is not None:
            assert options <= option_names(command), f"no option {', '.join(options - option_names(command))}"
    elif re.fullmatch(r"--[a-z][a-z0-9-]+", words[0]):
        assert words[0] in known, "no such option"
    elif (match := re.match(r"([a-z_]+)\.([a-z_][\w.]*)(=.*)?$", span)) and match[1] in names and f"`{span}" not in metrics:
        if match[2] not in ("yaml", "py", "md", "json", "jsonl", "html", "csv"):
            check_key(f"{match[1]}.{match[2]}")
    elif match := re.fullmatch(r"(?:eval_)?((?:coord_dist|coord_softce_w1|probe|base_ce|contrib)/[a-z]\w*)", span):
        assert match[1] in metrics or match[1] in EXAMPLE_METRICS, "no such metric"
    elif re.fullmatch(r"coordexp(\.\w+)+(\(.*)?", span) and not span.endswith((".json", ".yaml")):
        _resolve_name(span.partition("(")[0])
    for code in re.findall(r"CX\d+", span):
        assert code in codes, "no such rule"


def _resolve_name(dotted):
    """A module, or a name in one.

    Raises:
        AssertionError: neither.
    """
    module, _, name = dotted.rpartition(".")
    if _spec(dotted) is None:
        assert _spec(module) is not None, f"no module {module}"
        assert hasattr(importlib.import_module(module), name), f"no {name} in {module}"


def _spec(module):
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("block", [b for b in _of("yaml") if b.mark != "form"], ids=lambda b: b.place)
def test_every_experiment_shown_loads(block, tmp_path):
    content = yaml.safe_load(block.text)
    # A part of an experiment stands for itself beside the smallest data section.
    content.setdefault("data", {}).setdefault("kind", "synth")
    path = tmp_path / (block.value or "part.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    (load_ab if "arms" in content else load_config)(path)


@pytest.mark.parametrize("block", [b for b in _of("json") if b.mark != "form"], ids=lambda b: b.place)
def test_every_json_shown_is_json(block):
    json.loads(block.text)


@pytest.mark.parametrize("block", _of("python"), ids=lambda b: b.place)
def test_every_python_snippet_runs(block):
    ast.parse(block.text)
    names = {"__name__": "snippet"}
    if block.mark == "in":
        # As a part of the module that is named: its names, and copies of its tables.
        module = vars(importlib.import_module(block.value))
        names = {name: dict(value) if isinstance(value, dict) else value for name, value in module.items() if name != "__builtins__"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, block.place, "exec"), names)


EXECUTED = [one for one in pages() if any(block.mark in ("run", "stand-in") for block in one.blocks)]


@pytest.mark.parametrize("one", EXECUTED, ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_their_order(one, tmp_path, monkeypatch):
    """In one folder, with a tiny model and a small COCO folder where the page says QWEN3_VL_FOLDER and COCO_FOLDER."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shown = ""
    for block in one.blocks:
        if block.mark == "file":
            Path(block.value).write_text(_small(block.text), encoding="utf-8")
        elif block.mark == "output":
            assert _fits(block.text, shown), f"{block.place}: shown\n{block.text}\nbut it says\n{shown}"
        elif block.mark in ("run", "stand-in"):
            expected = int((block.value or "exits 0").removeprefix("exits "))
            shown = _run(block, monkeypatch, expected)
    for run in sorted(tmp_path.glob("runs/*")):
        unnamed = _unnamed(run, (ROOT / "docs/formats.md").read_text(encoding="utf-8"))
        assert not unnamed, f"docs/formats.md does not name what {one.name} makes: {', '.join(sorted(unnamed))}"
    assert one.name != "docs/quickstart.md" or (tmp_path / "runs/small/report.html").is_file()


def _unnamed(run, text):
    """Files of a run directory, and keys in them, that the page of formats does not name in inline code."""
    named = {word.strip(".") for word in re.findall(r"[\w.-]+", " ".join(re.findall(r"`([^`\n]+)`", text)))}
    found = {path.name for path in run.iterdir()}
    for name in ("manifest.json", "results.json", "data/import.json"):
        content = json.loads((run / name).read_text(encoding="utf-8")) if (run / name).is_file() else {}
        found |= {key for key in content if "." not in key}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    found |= {key.split(".")[0] for key in results} | set(results["counts"]) | set(results["per_class"][0])
    found |= set(json.loads((run / "audit.json").read_text(encoding="utf-8"))["rules"][0])
    for name in ("predictions.jsonl", "per_image.jsonl", "logging.jsonl"):
        rows = (run / name).read_text(encoding="utf-8").splitlines()
        found |= set(json.loads(rows[0]))
        found |= {key for row in rows if name == "predictions.jsonl" for item in json.loads(row)["objects"] for key in item}
    contract = json.loads((run / "model/coordexp.json").read_text(encoding="utf-8"))
    found |= {
        f"{key}.{part}" if isinstance(contract[key], dict) and key != "versions" else key
        for key in contract
        for part in _parts(contract[key])
    }
    found |= {path.name for path in (run / "checkpoints").glob("checkpoint-2/*") if path.suffix in (".pt", ".pth")} - {"window_0.pt"}
    return {name for name in found - named if not name.startswith("rng_state") and name != "table.md"}


def _parts(value):
    return list(value) if isinstance(value, dict) else [""]


def _run(block, monkeypatch, expected):
    script = block.text if block.mark == "run" else _stand_in(block.text)
    shown = ""
    for words in commands(script):
        command = ours(words)
        if command is None:
            # Files are moved by the shell, which knows redirections.
            line = next(part for part in script.replace("\\\n", " ").splitlines() if part.startswith(" ".join(words[:2])))
            subprocess.run(line, shell=True, check=True)
            script = script.replace(line, "", 1)
        elif resolve(command)[0] is not None:
            code, text = _call(monkeypatch, command)
            assert code == expected, f"{block.place}: coordexp {' '.join(command)}: exit code {code}\n{text}"
            shown += text
    return shown


def _call(monkeypatch, words):
    """Exit code and everything that a command says."""
    monkeypatch.setattr(sys, "argv", ["coordexp", *words])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, said.getvalue()


def _fits(shown, said):
    """Whether the shown lines are in what was said; ``...`` stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in shown.strip().split("..."))
    return re.search(pattern, said, re.DOTALL) is not None


def _stand_in(script):
    """The same commands with what is at hand here."""
    if "COCO_FOLDER" in script and not Path("coco").exists():
        _write_coco(Path("coco"))
    if "QWEN3_VL_FOLDER" in script and not Path("qwen").exists():
        from tiny import workspace

        Path("qwen").symlink_to(workspace() / "tiny")
    for big, small in {"QWEN3_VL_FOLDER": "qwen", "COCO_FOLDER": "coco", "-n 500": "-n 4", "-n -500": "-n -4"}.items():
        script = script.replace(big, small)
    return re.sub(r"--max-new-tokens \d+", "--max-new-tokens 40", script)


def _small(text):
    """A shown experiment of real size as one that takes seconds: the same parts, fewer steps and tokens."""
    content = yaml.safe_load(text)
    train = content["train"]
    if train["max_steps"] <= 10:
        return text
    small = {"max_steps": 2, "gradient_accumulation_steps": 1, "warmup_steps": 0, "dataloader_num_workers": 0, "probe_samples": 1}
    small |= {name: 2 for name in ("eval_steps", "save_steps", "probe_steps", "logging_steps") if name in train}
    train.update({name: value for name, value in small.items() if name in train})
    content["decode"] = {"max_new_tokens": 40}
    content["evaluate"] = {"bootstrap": 20}
    return yaml.safe_dump(content)


def _write_coco(root):
    """A COCO folder of made scenes."""
    from tiny import records

    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        images, annotations, names = [], [], {}
        (root / f"{split}2017").mkdir()
        for number, record in enumerate(records(split), 1):
            file = f"{split}{number:06d}.png"
            (root / f"{split}2017" / file).write_bytes(record.image.read_bytes())
            images.append({"id": number, "file_name": file, "width": record.width, "height": record.height})
            for item in record.objects:
                x1, y1, x2, y2 = item.values
                category = names.setdefault(item.desc, len(names) + 1)
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
                )
        categories = [{"id": number, "name": name} for name, number in names.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
