"""``coordexp doctor``: a sound checkpoint passes, each planted fault is found by its code, and a script can read the answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import call
from coordexp.doctor.checkpoint import check_checkpoint
from coordexp.doctor.machine import check_machine
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_tokenizer
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.options import VocabOptions
from tiny import fitted_folder, workspace

EMBED = "model.language_model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the trained tiny model."""
    return shutil.copytree(fitted_folder(), tmp_path / "m")


def _by_code(folder):
    return {check.code: check for check in check_checkpoint(folder)}


def _start(folder):
    return CoordVocab.from_tokenizer(load_tokenizer(folder)).start


def _edit(folder, change):
    """Change the weights of a folder: ``change(weights, start)``."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights, _start(folder))
    save_file(weights, path, metadata={"format": "pt"})


def _json(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def _contract(folder, **changes):
    codec = {"convention": "norm999", "num_bins": 1000, "coord_start": _start(folder)} | changes
    content = {"schema": 1, "codec": codec, "grammar": {"name": "coord_json", "order": "sorted"}, "prompt": "Locate every object.",
               "pixels": {"min_pixels": 1024, "max_pixels": 4096}, "versions": {}}  # fmt: skip
    (folder / "coordexp.json").write_text(json.dumps(content))


def test_a_trained_checkpoint_is_sound(folder):
    _contract(folder)
    checks = _by_code(folder)
    assert {check.outcome for check in checks.values()} == {"ok"}
    assert {f"C{i:02d}" for i in range(1, 12)} - {"C08"} == set(checks)
    tokenizer = load_tokenizer(folder)
    assert checks["C06"].values["tokens"] == len(tokenizer)
    table = load_file(folder / "model.safetensors")[EMBED]
    assert checks["C06"].values["rows"] == len(table)
    rows = table[_start(folder) : _start(folder) + 1000].double()
    centred = rows - rows.mean(dim=0)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(centred[1:], centred[:-1], strict=True)]
    assert checks["C09"].values["neighbour_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)
    assert checks["C09"].values["norm"] == pytest.approx(float(rows.norm(dim=1).mean()), rel=1e-4)


@pytest.mark.parametrize("init", ["mean", "digits", "ordinal"])
def test_fresh_rows_are_told_from_trained_ones_by_how_they_were_made(init, tmp_path):
    extend_model(workspace() / "tiny", tmp_path / "m", VocabOptions(init=init, seed=3))
    check = _by_code(tmp_path / "m")["C09"]
    # Where a tokenizer spells 12 and 21 by the same pieces, their fresh rows are the same too.
    assert check.outcome == "warning"
    assert check.values.get("init", "digits") == init


def test_fresh_ordinal_rows_in_bfloat16_are_still_known(folder):
    shutil.copy(workspace() / "model" / "model.safetensors", folder / "model.safetensors")
    _edit(folder, lambda weights, start: weights.update({EMBED: weights[EMBED].bfloat16()}))
    assert _by_code(folder)["C09"].values["init"] == "ordinal"


def _same(weights, start):
    weights[EMBED][start : start + 1000] = weights[EMBED][start].clone()


def _zero(weights, start):
    weights[EMBED][start : start + 1000] = 0


def _nan(weights, start):
    weights[EMBED][start + 5, 3] = float("nan")


def _twins(weights, start):
    weights[EMBED][start + 8] = weights[EMBED][start + 9].clone()


def _cut(weights, start):
    weights[EMBED] = weights[EMBED][: start + 500].clone()


@pytest.mark.parametrize(
    ("change", "code", "outcome", "words"),
    [
        (_same, "C09", "fail", "1000 rows are all the same"),
        (_zero, "C09", "fail", "1000 rows are all zero"),
        (_nan, "C09", "fail", "1 of 1000 hold values that are no numbers"),
        (_twins, "C09", "warning", "only 999 of 1000 rows differ"),
        (_cut, "C09", "fail", "coordinate tokens are ids"),
        (_cut, "C06", "fail", "have no row"),
        (lambda weights, start: weights.update({"lm_head.weight": weights[EMBED] + 1}), "C07", "warning", "loading throws it away"),
        (lambda weights, start: weights.update({"lm_head.weight": weights[EMBED].clone()}), "C07", "ok", "tied"),
        (lambda weights, start: weights.pop(EMBED), "C06", "fail", "no embedding table"),
    ],
)
def test_faults_of_the_table_are_found(change, code, outcome, words, folder):
    _edit(folder, change)
    check = _by_code(folder)[code]
    assert (check.outcome, words in check.seen) == (outcome, True), check
    assert outcome == "ok" or check.advice


def test_an_untied_head_has_a_check_of_its_own_and_must_be_there(folder):
    _json(
        folder,
        "config.json",
        lambda config: (config.update(tie_word_embeddings=False), config["text_config"].update(tie_word_embeddings=False)),
    )
    assert _by_code(folder)["C07"].outcome == "fail"
    # The trap of a list of token ids in an adapter: the embedding moves, the head stays as it was made.
    fresh = load_file(workspace() / "model" / "model.safetensors")[EMBED]
    _edit(folder, lambda weights, start: weights.update({"lm_head.weight": fresh}))
    rows = [check for check in check_checkpoint(folder) if check.code == "C09"]
    assert [(check.name, check.outcome) for check in rows] == [
        ("coordinate rows of the embedding", "ok"),
        ("coordinate rows of the head", "warning"),
    ]
    assert rows[1].values["init"] == "ordinal"


def test_special_missing_and_unordered_tokens_are_found(folder):
    def special(content):
        for token in content["added_tokens"]:
            if token["content"].startswith("<|coord_"):
                token["special"] = True

    def special_config(content):
        for token in content.get("added_tokens_decoder", {}).values():
            if token["content"].startswith("<|coord_"):
                token["special"] = True

    def swap(content):
        names = {token["content"]: token for token in content["added_tokens"]}
        a, b = names["<|coord_4|>"], names["<|coord_5|>"]
        a["content"], b["content"] = b["content"], a["content"]

    def rename(content):
        next(token for token in content["added_tokens"] if token["content"] == "<|coord_4|>")["content"] = "<|cord_4|>"

    original = (folder / "tokenizer.json").read_text()
    config = (folder / "tokenizer_config.json").read_text()
    _json(folder, "tokenizer.json", special)
    _json(folder, "tokenizer_config.json", special_config)
    checks = _by_code(folder)
    assert (checks["C02"].outcome, checks["C03"].outcome, checks["C04"].outcome) == ("ok", "fail", "fail")
    (folder / "tokenizer_config.json").write_text(config)
    for change, words in ((swap, "<|coord_3|> is"), (rename, "999 of 1000 are there, the first missing is <|coord_4|>")):
        (folder / "tokenizer.json").write_text(original)
        _json(folder, "tokenizer.json", change)
        checks = _by_code(folder)
        assert checks["C02"].outcome == "fail"
        assert words in checks["C02"].seen
        assert checks["C09"].outcome == "skipped"
    checks = {check.code: check for check in check_checkpoint(workspace() / "tiny")}
    assert "0 of 1000 are there" in checks["C02"].seen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coord_start": 3}, "bin 0 is token 3 by coordexp.json"),
        ({"convention": "norm1000"}, "norm1000 has 1001 bins, the file says 1000"),
        ({"convention": "mine"}, "unknown convention 'mine'"),
        ({"num_bins": "many"}, "codec.num_bins"),
    ],
)
def test_a_contract_that_does_not_fit_is_found(changes, words, folder):
    _contract(folder, **changes)
    check = _by_code(folder)["C05"]
    assert check.outcome == "fail"
    assert words in check.seen


def test_rows_of_an_adapter_are_those_it_trained(tmp_path):
    from peft import LoraConfig, get_peft_model

    from tiny import fresh_model, vocab

    ids = list(vocab().ids)
    model = get_peft_model(fresh_model(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ids))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model.peft_config["default"].base_model_name_or_path = str(workspace() / "model")
    model.save_pretrained(tmp_path / "a")
    for path in (workspace() / "model").iterdir():
        if path.name.startswith(("token", "preproc", "chat", "processor")):
            shutil.copy(path, tmp_path / "a")
    check = _by_code(tmp_path / "a")["C09"]
    assert check.name == "coordinate rows of the embedding (the adapter)"
    assert (check.outcome, check.values["init"]) == ("ok", None)


def test_the_machine_is_described_without_a_failure_and_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checks = {check.code: check for check in check_machine()}
    assert set(checks) == {f"M{i:02d}" for i in range(1, 10)}
    assert checks["M02"].values["version"] == torch.__version__
    assert checks["M06"].outcome == checks["M07"].outcome == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_version_out_of_its_range_and_a_folder_that_cannot_be_written_fail(tmp_path, monkeypatch):
    from coordexp.doctor import machine

    monkeypatch.setattr(machine.metadata, "requires", lambda name: ["numpy>=99", "nowhere-to-be-found>=1", 'absent; extra == "dev"'])
    (check,) = machine.check_versions()
    assert check.outcome == "fail"
    assert "is not >=99; nowhere-to-be-found is missing" in check.seen
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/cache")
    assert {check.code: check.outcome for check in machine.check_folders()}["M08"] == "fail"


def test_the_command_prints_json_exits_with_1_on_a_failure_and_hints_at_the_model_of_a_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    test = workspace() / "data" / "test.jsonl"
    code, out, err = call(monkeypatch, capsys, "doctor", folder, "--data", test, "--json")
    assert (code, err) == (0, "")
    checks = json.loads(out)["checks"]
    assert {"M01", "C02", "C09", "D01", "D02", "D03"} <= {check["code"] for check in checks}
    assert all(set(check) == {"code", "name", "outcome", "seen", "advice", "values"} for check in checks)
    assert next(check for check in checks if check["code"] == "D02")["outcome"] == "ok"
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    for row in rows:
        for item in row["objects"]:
            x1, y1, x2, y2 = item["bbox_2d"]
            item["bbox_2d"] = [x2, y2, x1, y1]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call(monkeypatch, capsys, "doctor", "--data", tmp_path / "bad.jsonl")
    assert code == 1
    assert "fail" in out
    assert "do: " in out

    run = tmp_path / "run"
    (run / "checkpoints" / "final").mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    for words in (("doctor", run), ("predict", run, test, "--out", tmp_path / "p.jsonl"), ("bench", "step", run, test)):
        code, out, err = call(monkeypatch, capsys, *words)
        assert (code, err) == (2, f"error: {run} is a run directory: name its model: {run / 'checkpoints' / 'final'}\n")


def test_the_help_of_doctor_loads_no_torch():
    script = (
        "import sys\nfrom coordexp.cli.main import main\nsys.argv = ['coordexp', 'doctor', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
