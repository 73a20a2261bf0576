"""Folders written one tensor at a time: what is written equals the whole model in memory, and nothing else changes, not a byte."""

from __future__ import annotations

import gc
import json
import resource
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from adapted import STOCK, batch, untied_folder
from command import call
from coordexp.errors import ConfigError
from coordexp.exporting import ExportOptions, export_checkpoint
from coordexp.modeling import load
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import copy_processor_files, load_model, load_tokenizer
from coordexp.modeling.shards import INDEX, SINGLE
from coordexp.modeling.streamed import open_model
from coordexp.vocab.options import VocabOptions
from packs import qwen25_model
from tiny import vocab, workspace
from whole import extend_whole, merge_whole

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PEFT config's:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .default.* 1-D:UserWarning"),  # a bias of an update is one-dimensional
]
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}
CONTRACT = {"prompt": "Find.", "convention": "norm999"}


def _stored(file):
    """Metadata and ``{key: (type, shape, bytes)}`` in the order of the file, read by the format's definition."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return metadata, {
        key: (part["dtype"], part["shape"], content[end + part["data_offsets"][0] : end + part["data_offsets"][1]])
        for key, part in ordered
    }


def _files(folder):
    return {path.name: _stored(path) for path in sorted(folder.glob("*.safetensors"))}


def _tensor(part):
    dtype, shape, content = part
    return torch.frombuffer(bytearray(content), dtype=DTYPES[dtype]).reshape(shape)


def _save(model, folder, *, tokenizer_from="tiny", size="150KB", dtype=torch.bfloat16):
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    load_tokenizer(workspace() / tokenizer_from).save_pretrained(folder)
    copy_processor_files(workspace() / "model", folder)
    return folder


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _reindex(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _single_norm_in_float32(folder):
    """Checkpoints may keep a few tensors in a wider type: their types are kept one by one."""
    from safetensors.torch import load_file, save_file

    name = json.loads((folder / INDEX).read_text())["weight_map"]["model.language_model.norm.weight"]
    tensors = load_file(folder / name)
    tensors["model.language_model.norm.weight"] = tensors["model.language_model.norm.weight"].float() + 1e-6
    save_file(tensors, folder / name, {"format": "pt", "origin": "somewhere"})


@pytest.mark.parametrize(
    ("source", "dtype", "size"),
    [
        ("tiny", torch.bfloat16, "150KB"),
        ("untied-tiny", torch.bfloat16, "150KB"),
        ("tiny", torch.float16, "1GB"),
        ("qwen25", torch.float32, "150KB"),
    ],
)
def test_extending_equals_the_whole_model_and_keeps_files_types_and_every_other_byte(source, dtype, size, tmp_path):
    untied_folder()
    model = qwen25_model() if source == "qwen25" else load_model(workspace() / source)
    if source == "qwen25":
        model.resize_token_embeddings(len(load_tokenizer(workspace() / "tiny")) + 3, mean_resizing=False)
    old = _save(model, tmp_path / "old", dtype=dtype, size=size)
    if source == "qwen25":
        # Stored under other names than the class has them: those that this model was released with.
        assert "visual.blocks.0.attn.qkv.weight" in json.loads((old / INDEX).read_text())["weight_map"]
    elif size != "1GB":
        _single_norm_in_float32(old)
    reference = load_model(old)
    extend_whole(reference, load_tokenizer(old), VocabOptions(seed=3))
    new = extend_model(old, tmp_path / "new", VocabOptions(seed=3)).out
    wanted = reference.to(dtype)
    before, after = _files(old), _files(new)
    assert before.keys() == after.keys()
    assert len(before) > 1 or size == "1GB"
    tables = set()
    for name, (metadata, tensors) in before.items():
        assert after[name][0] == metadata
        assert list(after[name][1]) == list(tensors)
        for key, part in tensors.items():
            again = after[name][1][key]
            if "embed_tokens" in key or "lm_head" in key:
                tables.add(key)
                assert again[0] == part[0]
                table = wanted.get_input_embeddings().weight if "embed_tokens" in key else wanted.get_output_embeddings().weight
                torch.testing.assert_close(_tensor(again), table.detach(), rtol=0, atol=0)
            else:
                assert again == part, key
    assert len(tables) == (2 if source == "untied-tiny" else 1)
    if size != "1GB":
        one, other = (json.loads((folder / INDEX).read_text()) for folder in (old, new))
        assert one["weight_map"] == other["weight_map"]
        assert other["metadata"]["total_size"] == sum(len(part[2]) for _, tensors in after.values() for part in tensors.values())
    wanted.save_pretrained(tmp_path / "whole")
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (new, tmp_path / "whole"))
    for part in ("text_config", "vision_config"):
        expected[part].pop("dtype", None)  # of the reference, which was loaded in it
        config[part].pop("dtype", None)
    assert config == expected
    assert config["text_config"]["vocab_size"] == wanted.get_input_embeddings().weight.shape[0]


LANGUAGE = r".*language_model.*(q_proj|down_proj)"


def _lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, "init_lora_weights": False} | options)


def _rows(tied):
    ids = list(vocab().ids)
    return ids if tied else {"embed_tokens": ids, "lm_head": ids}


# What PEFT's LoRA can hold, on a tied model unless it says otherwise, and whether the head is tied afterwards.
ADAPTERS = {
    "lora and rows": (lambda: _lora(trainable_token_indices=_rows(True)), True, True),
    "dora and rows, untied": (lambda: _lora(use_dora=True, trainable_token_indices=_rows(False)), False, False),
    "rows alone": (lambda: TrainableTokensConfig(token_indices=list(vocab().ids), target_modules=["embed_tokens"]), True, True),
    "ranks, alphas, rslora": (
        lambda: _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, use_rslora=True, fan_in_fan_out=False), True, True,
    ),
    "vision, aligner, convolution": (lambda: _lora(target_modules=r".*visual.*(qkv|linear_fc1|patch_embed\.proj)"), True, True),
    "biases of layers and of updates": (lambda: _lora(target_modules=r".*visual.*(qkv|proj)", bias="all"), True, True),
    "biases of updates": (lambda: _lora(target_modules=r".*visual.*qkv", lora_bias=True), True, True),
    "whole modules": (lambda: _lora(modules_to_save=["merger", "lm_head"]), False, False),
    "the embedding alone": (lambda: _lora(target_modules=["embed_tokens"]), True, False),
    "the head alone": (lambda: _lora(target_modules=["lm_head"]), True, False),
    "a whole head, tied": (lambda: _lora(modules_to_save=["lm_head"]), True, False),
}  # fmt: skip


@lru_cache
def _base(tied):
    return _save(load_model(workspace() / "model" if tied else untied_folder()), workspace() / f"shards-{tied}", tokenizer_from="model")


def _adapter(config, tied, folder):
    torch.manual_seed(0)
    model = get_peft_model(load_model(_base(tied)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    config.base_model_name_or_path = str(_base(tied))
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_is_pefts_and_what_it_leaves_alone_keeps_its_bytes(kind, tmp_path):
    make, tied, tied_after = ADAPTERS[kind]
    model, adapter = _adapter(make(), tied, tmp_path / "adapter")
    inputs = {key: value for key, value in batch(2).items() if key in STOCK}
    with torch.no_grad():
        trained = model(**inputs).logits
    options = ExportOptions(verify=True, dtype="float32", data=workspace() / "data" / "test.jsonl", **CONTRACT)
    summary = export_checkpoint(adapter, tmp_path / "out", options)
    assert (summary.tied, summary.merged) == (tied_after, True)
    assert summary.difference <= 1e-5
    again = load_model(tmp_path / "out").eval()
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied_after
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits / trained.abs().max(), trained / trained.abs().max(), rtol=0, atol=1e-5)

    before, exact = _files(_base(tied)), {k: v for _, tensors in _files(tmp_path / "out").values() for k, v in tensors.items()}
    export_checkpoint(adapter, tmp_path / "half", ExportOptions(**CONTRACT))
    changed = set()
    for name, (metadata, tensors) in before.items():
        now_metadata, now = _stored(tmp_path / "half" / name)
        assert now_metadata == metadata
        assert [key for key in now if key in tensors] == list(tensors)
        for key, part in now.items():
            if part != tensors.get(key):
                changed.add(key)
                assert torch.equal(_tensor(part), _tensor(exact[key]).to(torch.bfloat16)), key
    # PEFT's own merge of the whole model; of one table in two layers, of which one changes, it makes one table all the same.
    if tied == tied_after:
        wanted = merge_whole(_base(tied), adapter).state_dict()
        for key, part in exact.items():
            torch.testing.assert_close(_tensor(part), wanted[key], rtol=1e-6, atol=1e-7)
    plain = load_model(_base(tied)).state_dict()
    moved = {key for key, part in exact.items() if not torch.equal(_tensor(part), plain[key])}
    # What moves by less than half a step of bfloat16 keeps its bytes.
    assert changed <= moved | {"lm_head.weight"}
    assert changed


def _quantised(folder):
    from safetensors.torch import load_file, save_file

    name = json.loads((folder / INDEX).read_text())["weight_map"]["model.language_model.layers.0.mlp.up_proj.weight"]
    tensors = load_file(folder / name)
    tensors["model.language_model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 48, dtype=torch.float8_e4m3fn)
    save_file(tensors, folder / name)


def _shards(folder):
    return sorted(folder.glob("*.safetensors"))


def _cut(folder):
    _shards(folder)[1].write_bytes(_shards(folder)[1].read_bytes()[:-100])


def _other_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))


def _untie(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "fp8 weights": (_quantised, "layers.0.mlp.up_proj.weight is of type F8_E4M3: quantised weights cannot be"),
    "a quantised folder": (lambda f: _edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "quantization_config: fp8"),
    "a missing shard": (lambda f: _shards(f)[1].unlink(), "which is not in the folder (1 of"),
    "a cut shard": (_cut, "its weights cannot be read"),
    "an empty shard": (lambda f: _shards(f)[0].write_bytes(b""), "its weights cannot be read"),
    "an index of elsewhere": (lambda f: _reindex(f, lambda m: m.update(x="../x.safetensors")), "it names ../x.safetensors"),
    "an index that is none": (lambda f: (f / INDEX).write_text("[]"), "expected an index of weights"),
    "a key too many in the index": (lambda f: _reindex(f, lambda m: m.update(x=min(m.values()))), "x is not in"),
    "a key too few in the index": (lambda f: _reindex(f, lambda m: m.pop(min(m))), "does not name: files of two models are mixed"),
    "a shard twice": (lambda f: shutil.copyfile(_shards(f)[0], _shards(f)[1]), "files of two models are mixed"),
    "two saves": (lambda f: shutil.copyfile(_shards(f)[0], f / SINGLE), "are both there"),
    "another configuration": (_other_width, "files of two models are mixed"),
    "a head that no file holds": (_untie, "no file holds lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_quantised_or_mixed_folders_are_one_line_and_write_nothing(damage, tmp_path, monkeypatch, capsys):
    make, message = DAMAGES[damage]
    shutil.copytree(_base(True), tmp_path / "model")
    make(tmp_path / "model")
    flags = [word for key, value in CONTRACT.items() for word in (f"--{key}", value)]
    for words in (["extend", tmp_path / "model", "--out", tmp_path / "out"], ["export", tmp_path / "model", tmp_path / "out", *flags]):
        code, out, err = call(monkeypatch, capsys, "vocab", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _change_config(**changes):
    return lambda folder: _edit(folder / "adapter_config.json", **changes)


def _lose_a_key(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_change_config(init_lora_weights="pissa_niter_4"), "init_lora_weights: pissa_niter_4 has changed the base weights"),
        (_change_config(init_lora_weights="olora"), "init_lora_weights: olora has changed the base weights"),
        (_change_config(layer_replication=[[0, 1], [0, 2]]), "layer_replication cannot be merged here"),
        (_change_config(peft_type="LOHA"), "peft_type: LOHA cannot be merged here"),
        (_lose_a_key, "Found missing adapter keys"),
    ],
    ids=["pissa", "olora", "replication", "loha", "a key less"],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(make, message, tmp_path, monkeypatch, capsys):
    adapter = tmp_path / "adapter"
    _adapter(_lora(), True, adapter)
    load_tokenizer(_base(True)).save_pretrained(adapter)
    make(adapter)
    flags = [word for key, value in CONTRACT.items() for word in (f"--{key}", value)]
    for words in (["extend", adapter, "--out", tmp_path / "out"], ["export", adapter, tmp_path / "out", *flags]):
        code, out, err = call(monkeypatch, capsys, "vocab", *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    shutil.copytree(workspace() / "tiny", tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        code, out, err = call(monkeypatch, capsys, "vocab", "extend", tmp_path / "model", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "cannot be written" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _peak(action):
    """By how much the process grows at most while it runs, in bytes."""

    def status(key):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts anew
    start = status("VmRSS")
    action()
    return status("VmHWM") - start


def test_memory_is_that_of_a_layer_and_not_of_the_model(tmp_path):
    """Of 12 layers of 25 MB in float32, merging, writing and comparing hold one at a time; the whole model in memory holds all."""
    config = Qwen3VLConfig(**load_model(workspace() / "model").config.to_dict())
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 512
    config.text_config.intermediate_size, config.text_config.num_hidden_layers = 4096, 12
    base = _save(Qwen3VLForConditionalGeneration(config), tmp_path / "base", tokenizer_from="model", size="40MB")
    total = 2 * sum(path.stat().st_size for path in _shards(base))
    adapter = tmp_path / "adapter"
    get_peft_model(open_model(base).model, _lora()).save_pretrained(adapter)
    _edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    options = ExportOptions(verify=True, dtype="float32", data=workspace() / "data" / "test.jsonl", **CONTRACT)
    streamed = _peak(lambda: export_checkpoint(adapter, tmp_path / "out", options))
    assert total > 3e8
    assert streamed < 0.4 * total
    assert _peak(lambda: load_model(base)) > 0.9 * total


def test_experts_that_the_class_puts_together_are_copied_and_neither_compared_nor_merged(tmp_path, monkeypatch):
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = load_model(workspace() / "model").config.to_dict()
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("model_type")
    config["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    base = _save(Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**config)), tmp_path / "base", tokenizer_from="model")
    monkeypatch.setitem(load.VISION_CLASSES, "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration")
    export_checkpoint(base, tmp_path / "out", ExportOptions(**CONTRACT))
    assert _files(tmp_path / "out") == _files(base)
    data = workspace() / "data" / "test.jsonl"
    with pytest.raises(ConfigError, match=r"mlp\.experts\.down_proj is stored in another form .* leave --verify out"):
        export_checkpoint(base, tmp_path / "verified", ExportOptions(verify=True, data=data, **CONTRACT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
