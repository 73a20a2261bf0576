"""Export: what a stock install reads is the trained model; the contract in ``coordexp.json`` is kept or refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, Qwen3VLProcessor

from command import call
from coordexp.data.records import open_image
from coordexp.data.template import build_messages
from coordexp.errors import ConfigError
from coordexp.exporting import ExportOptions, export_checkpoint
from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer, save_model_folder
from coordexp.modeling.manifest import CheckpointManifest, check_contract, read_checkpoint_manifest
from tiny import collator, records, template, vocab, workspace

INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
PROMPT = "Find all shapes."


def _batch():
    batch = collator()([template().encode(record) for record in records()[:2]])
    return {key: batch[key] for key in INPUTS}


def _contract(**changes):
    values = {
        "convention": "norm999", "num_bins": 1000, "coord_start": vocab().start, "order": "sorted", "prompt": PROMPT,
        "min_pixels": 32 * 32, "max_pixels": 64 * 64,
    }  # fmt: skip
    return CheckpointManifest(**values | changes)


def _write_run(run, checkpoint_from, *, status="complete"):
    """A run directory around a final checkpoint."""
    final = run / "checkpoints" / "final"
    if not final.exists():
        shutil.copytree(checkpoint_from, final)
    if not (final / "coordexp.json").exists():
        (final / "coordexp.json").write_text(_contract().text())
    (run / "manifest.json").write_text(json.dumps({"status": status}))
    (run / "data").symlink_to(workspace() / "data")
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A complete run; its weights differ from those it started with."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = load_model(workspace() / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model_folder(model, load_tokenizer(workspace() / "model"), root / "trained", processor_from=workspace() / "model")
    return _write_run(root / "run", root / "trained")


def _logits(model):
    with torch.no_grad():
        return model.eval()(**_batch()).logits


STOCK = """
import sys
sys.modules["coordexp"] = None  # any import of it fails
import torch, transformers
folder, inputs, out = sys.argv[1:]
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, out)
"""


def _stock_logits(folder, tmp_path):
    """Logits in a process that cannot import this package."""
    torch.save(_batch(), tmp_path / "inputs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", STOCK, str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "logits.pt")


def _keys(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_run_becomes_a_folder_whose_logits_a_stock_install_reproduces(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code, said, err = call(monkeypatch, capsys, "vocab", "export", run_dir, out, "--verify")
    assert (code, err) == (0, "")
    assert "tied head, verified: logits differ by" in said
    trained = _logits(load_model(run_dir / "checkpoints" / "final"))
    assert (trained - _logits(load_model(workspace() / "model"))).abs().max() > 0.1
    torch.testing.assert_close(_stock_logits(out, tmp_path), trained, rtol=1e-5, atol=1e-5)
    assert "lm_head.weight" not in _keys(out)
    content = json.loads((out / "coordexp.json").read_text())
    assert content["codec"] == {"convention": "norm999", "num_bins": 1000, "coord_start": vocab().start}
    assert (content["prompt"], content["grammar"]) == (PROMPT, {"name": "coord_json", "order": "sorted", "geometries": ["bbox_2d"]})
    assert content["pixels"] == {"min_pixels": 1024, "max_pixels": 4096}
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"]["torch"] == torch.__version__
    assert content["sources"].keys() == {"checkpoint/config.json", "checkpoint/model.safetensors", "checkpoint/tokenizer.json"}
    assert content["export"]["verified"]["max_relative_difference"] <= 1e-5
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} <= set(os.listdir(out))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out"]


def test_untie_writes_a_head_of_its_own_and_changes_no_logit(run_dir, tmp_path):
    summary = export_checkpoint(run_dir, tmp_path / "out", ExportOptions(verify=True, untie=True))
    assert not summary.tied
    assert "lm_head.weight" in _keys(tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.lm_head.weight.data_ptr() != again.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(_logits(again), _logits(load_model(run_dir / "checkpoints" / "final")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapter_with_trained_rows_is_merged_into_the_same_function(run_dir, tied, dora, tmp_path):
    base, ids = tmp_path / "run" / "model", list(vocab().ids)
    if tied:
        shutil.copytree(workspace() / "model", base)
    else:
        export_checkpoint(run_dir, base, ExportOptions(untie=True))
    torch.manual_seed(0)
    model = get_peft_model(
        load_model(base),
        LoraConfig(
            r=4,
            target_modules=r".*language_model.*(q_proj|down_proj)",
            use_dora=dora,
            init_lora_weights=False,
            trainable_token_indices=ids if tied else {"embed_tokens": ids, "lm_head": ids},
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = _logits(model)
    assert (trained - _logits(load_model(base))).abs().max() > 0.1
    final = tmp_path / "run" / "checkpoints" / "final"
    model.save_pretrained(final)
    if tied:
        load_tokenizer(base).save_pretrained(final)
    summary = export_checkpoint(_write_run(tmp_path / "run", final), tmp_path / "out", ExportOptions(verify=True))
    assert (summary.merged, summary.tied) == (True, tied)
    assert summary.difference <= 1e-5
    scale = trained.abs().max()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(_logits(again) / scale, trained / scale, rtol=0, atol=1e-5)
    assert ("lm_head.weight" in _keys(tmp_path / "out")) == (not tied)
    assert not any("lora" in key or "trainable" in key for key in _keys(tmp_path / "out"))
    assert "base/model.safetensors" in json.loads((tmp_path / "out" / "coordexp.json").read_text())["sources"]


def test_verify_finds_weights_that_are_rounded_and_then_writes_nothing(run_dir, tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "vocab", "export", run_dir, tmp_path / "out", "--verify", "--dtype", "bfloat16")
    assert (code, err.count("\n")) == (2, 1)
    assert "pass --dtype float32" in err
    assert list(tmp_path.iterdir()) == []
    export_checkpoint(run_dir, tmp_path / "out", ExportOptions(dtype="bfloat16"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "coordexp.json").read_text())["export"]["verified"] is None
    # What was rounded once is not rounded again.
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    again = _write_run(tmp_path / "run", tmp_path / "out")
    assert export_checkpoint(again, tmp_path / "again", ExportOptions(verify=True)).difference == 0


def _unfinished(tmp_path, run):
    return [_write_run(tmp_path / "r", run / "checkpoints" / "final", status="running"), tmp_path / "out"]


def _no_adapter_weights(tmp_path, run):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    return [tmp_path / "a", tmp_path / "out"]


def _lost_base(tmp_path, run):
    _no_adapter_weights(tmp_path, run)
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    return [tmp_path / "a", tmp_path / "out"]


def _taken(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    return [run, tmp_path / "out"]


def _cut_weights(tmp_path, run):
    shutil.copytree(run / "checkpoints" / "final", tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    return [tmp_path / "c", tmp_path / "out"]


def _wrong_start(tmp_path, run):
    shutil.copytree(run / "checkpoints" / "final", tmp_path / "c")
    (tmp_path / "c" / "coordexp.json").write_text(_contract(coord_start=3).text())
    return [tmp_path / "c", tmp_path / "out"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp, run: [tmp / "nothing", tmp / "out"], "no such folder"),
        (lambda tmp, run: [workspace() / "data", tmp / "out"], "expected a model folder"),
        (_unfinished, "its status is 'running'"),
        (_taken, "is not empty"),
        (_no_adapter_weights, "adapter_model.safetensors is missing"),
        (_lost_base, "there is no folder /gone: put the base model there, or name its new place, or pass --base"),
        (lambda tmp, run: [run, tmp / "out", "--base", workspace() / "model"], "--base: only for an adapter"),
        (lambda tmp, run: [run, tmp / "out", "--dtype", "int8"], "--dtype: expected one of"),
        (lambda tmp, run: [run, tmp / "out", "--prompt", "Other."], f"--prompt: the checkpoint was trained with {PROMPT!r}"),
        (lambda tmp, run: [run, tmp / "out", "--convention", "norm1000"], "trained with 'norm999'"),
        (lambda tmp, run: [workspace() / "model", tmp / "out"], "pass the --prompt"),
        (lambda tmp, run: [workspace() / "model", tmp / "out", "--prompt", "x", "--convention", "y"], "--convention: expected one of"),
        (lambda tmp, run: [workspace() / "model", tmp / "out", "--prompt", "x", "--convention", "norm999", "--verify"], "pass --data"),
        (lambda tmp, run: [workspace() / "tiny", tmp / "out", "--prompt", "x", "--convention", "norm999"], "coordexp vocab extend"),
        (_cut_weights, "its weights cannot be read"),
        (_wrong_start, "codec.coord_start: 3"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(make, message, run_dir, tmp_path, monkeypatch, capsys):
    words = make(tmp_path, run_dir)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "vocab", "export", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bare_checkpoint_is_exported_with_what_the_flags_say(tmp_path, monkeypatch, capsys):
    data = workspace() / "data" / "test.jsonl"
    words = ["--prompt", "Point.", "--convention", "norm999", "--verify", "--data", data]
    code, _, err = call(monkeypatch, capsys, "vocab", "export", workspace() / "model", tmp_path / "out", *words)
    assert (code, err) == (0, "")
    manifest = read_checkpoint_manifest(tmp_path / "out")
    assert (manifest.prompt, manifest.convention, manifest.max_pixels) == ("Point.", "norm999", 64 * 64)


class ImageOnly(Qwen3VLProcessor):
    """The stock processor without its video part, whose class needs torchvision; all else is the stock code."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def test_the_stock_processor_reads_the_exported_folder_and_makes_the_tokens_and_pixels_of_training(run_dir, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(run_dir, out, ExportOptions())
    stock, record = ImageOnly.from_pretrained(out), records()[0]
    ours = template().encode_prompt(record)
    text = stock.apply_chat_template(build_messages(template().prompt), tokenize=False, add_generation_prompt=True)
    theirs = stock(text=[text], images=[open_image(record)], return_tensors="pt")
    assert theirs["input_ids"][0].tolist() == ours.input_ids
    torch.testing.assert_close(theirs["pixel_values"], ours.pixel_values, rtol=0, atol=0)
    assert theirs["image_grid_thw"].tolist() == ours.image_grid_thw.tolist()
    # By these names a stock install with torchvision finds its classes.
    image = json.loads((out / "preprocessor_config.json").read_text())
    assert (image["processor_class"], image["image_processor_type"]) == ("Qwen3VLProcessor", "Qwen2VLImageProcessorFast")
    assert json.loads((out / "video_preprocessor_config.json").read_text())["video_processor_type"] == "Qwen3VLVideoProcessor"


def test_a_manifest_reads_back_and_what_is_none_is_refused_in_one_line(tmp_path):
    assert read_checkpoint_manifest(tmp_path) is None
    file = tmp_path / "coordexp.json"
    whole = _contract(versions={"torch": "2"}, sources={"a": "b"}, export={"tied": True})
    file.write_text(whole.text())
    assert read_checkpoint_manifest(tmp_path) == whole
    content = json.loads(whole.text())
    for text, message in [
        ("{", "expected JSON"),
        ("[]", "schema: expected 1, got 'list'"),
        (json.dumps(content | {"schema": 2}), "schema: expected 1, got 2"),
        (json.dumps(content | {"prompt": 3}), "prompt: expected text, got 3"),
        (json.dumps(content | {"codec": None}), "codec.convention: expected text, got None"),
        (json.dumps(content | {"pixels": {"min_pixels": True, "max_pixels": 5}}), "pixels.min_pixels: expected a whole number"),
        (json.dumps(content | {"export": []}), "export: expected an object"),
    ]:
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_checkpoint_manifest(tmp_path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_contradiction_names_both_values_and_the_key_to_set(tmp_path):
    (tmp_path / "coordexp.json").write_text(_contract().text())
    assert check_contract(tmp_path, prompt=PROMPT, convention="norm999", min_pixels=1024, max_pixels=4096) == _contract()
    with pytest.raises(ConfigError) as caught:
        check_contract(tmp_path, prompt="Other.", convention="floor1000", min_pixels=1, max_pixels=2)
    lines = caught.value.problems
    assert len(lines) == 4
    for line, (key, trained, got) in zip(
        lines,
        [("codec.convention", "'norm999'", "'floor1000'"), ("data.prompt", f"'{PROMPT}'", "'Other.'"), ("model.min_pixels", "1024", "1"),
         ("model.max_pixels", "4096", "2")],
        strict=True,
    ):  # fmt: skip
        assert line.startswith(f"{key}: ")
        assert trained in line
        assert got in line
        assert "coordexp.json" in line


def test_an_image_processor_other_than_the_trained_one_is_refused(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(workspace() / "model", folder)
    (folder / "coordexp.json").write_text(_contract().text())
    assert load_image_processor(folder).size["longest_edge"] == 4096
    with pytest.raises(ConfigError, match=r"model\.max_pixels: the checkpoint was trained with 4096 .* got 1024"):
        load_image_processor(folder, max_pixels=1024)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"]["longest_edge"] = 9216
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"model\.max_pixels: the checkpoint was trained with 4096 .* got 9216"):
        load_image_processor(folder)
    assert load_image_processor(folder, max_pixels=4096).size["longest_edge"] == 4096
