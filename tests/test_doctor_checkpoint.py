"""Checks of a checkpoint folder: a sound one passes, and each planted fault is found by its own check."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapted import adapted_model, untied_folder
from coordexp.doctor.checkpoint import check_checkpoint
from coordexp.doctor.tokenizer import check_round_trip, check_special, check_tokens
from coordexp.doctor.weights import find_tables
from coordexp.modeling.load import load_tokenizer
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest
from coordexp.vocab.adapters import adapt
from coordexp.vocab.extend import add_coord_tokens, initial_rows
from coordexp.vocab.options import AdapterOptions
from qwen import needs_qwen, qwen_tokenizer
from tiny import SMALL, fresh_model, template, vocab, workspace

EMBEDDING = "model.language_model.embed_tokens.weight"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def manifest(**changes):
    values = {
        "convention": "norm999", "num_bins": 1000, "coord_start": vocab().start, "order": "sorted", "prompt": "Find.",
        "min_pixels": SMALL.min_pixels, "max_pixels": SMALL.max_pixels,
    }  # fmt: skip
    return CheckpointManifest(**(values | changes)).text()


def train_rows(tensors, key=EMBEDDING):
    """What training does to the rows, as far as the check can know: each moves on its own."""
    rows = tensors[key][vocab().start : vocab().start + 1000]
    rows += 0.05 * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))


def trained(tmp_path, source=None):
    folder = tmp_path / "model"
    shutil.copytree(source or workspace() / "model", folder)
    edit_weights(folder, train_rows)
    if source is not None:
        edit_weights(folder, lambda tensors: train_rows(tensors, "lm_head.weight"))
    (folder / CHECKPOINT_MANIFEST).write_text(manifest())
    return folder


@pytest.fixture
def folder(tmp_path):
    return trained(tmp_path)


def outcomes(folder):
    return {check.name.removeprefix("checkpoint."): check for check in check_checkpoint(folder)}


def not_ok(folder):
    return {name: check.outcome for name, check in outcomes(folder).items() if check.outcome != "ok"}


def test_a_trained_checkpoint_passes_tied_and_untied(tmp_path, folder):
    assert not_ok(folder) == {}
    (tmp_path / "other").mkdir()
    assert not_ok(trained(tmp_path / "other", untied_folder())) == {}


def test_a_fresh_extended_model_warns_of_untrained_rows_and_no_contract():
    assert not_ok(workspace() / "model") == {"rows": "warning", "contract": "warning"}


def test_a_model_without_coordinate_tokens_fails_at_them():
    assert not_ok(workspace() / "tiny") == {"tokens": "fail", "round_trip": "skipped", "rows": "skipped", "contract": "warning"}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"]
)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    files = outcomes(folder)["files"]
    assert files.outcome == "fail"
    assert name.replace("model.", "*.") in files.seen


def special_coordinates(folder):
    def mark(content):
        for token in content["added_tokens"]:
            token["special"] = token["special"] or "coord_" in token["content"]

    edit(folder / "tokenizer.json", mark)
    edit(folder / "tokenizer_config.json", lambda c: [t.update(special=True) for t in c.get("added_tokens_decoder", {}).values()])


def swapped_coordinates(folder):
    def swap(content):
        ids = {token["content"]: token for token in content["added_tokens"]}
        one, other = ids["<|coord_17|>"], ids["<|coord_18|>"]
        one["content"], other["content"] = other["content"], one["content"]

    edit(folder / "tokenizer.json", swap)
    _no_decoder(folder)


def missing_coordinate(folder):
    edit(
        folder / "tokenizer.json",
        lambda c: c.update(added_tokens=[t for t in c["added_tokens"] if t["content"] != "<|coord_999|>"]),
    )
    _no_decoder(folder)


def plain_im_start(folder):
    def mark(content):
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<|im_start|>"

    edit(folder / "tokenizer.json", mark)
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(extra_special_tokens=[t for t in c["extra_special_tokens"] if t != "<|im_start|>"]),
    )
    _no_decoder(folder)


def _no_decoder(folder):
    """The other file that lists added tokens, where this version writes it."""
    edit(folder / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder", None))


def image_token(folder):
    edit(folder / "config.json", lambda c: c.update(image_token_id=7))


def other_end(folder):
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))


def fewer_rows(folder):
    edit_weights(folder, lambda t: t.update({EMBEDDING: t[EMBEDDING][:1280]}))
    edit(folder / "config.json", lambda c: c["text_config"].update(vocab_size=1280))


def other_vocab_size(folder):
    edit(folder / "config.json", lambda c: c["text_config"].update(vocab_size=1500))


def headless(folder):
    edit(folder / "config.json", lambda c: (c.update(tie_word_embeddings=False), c["text_config"].update(tie_word_embeddings=False)))


def other_head(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] * 1.5}))


def torn(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def no_shard(folder):
    weight_map = {EMBEDDING: "model.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def nan_rows(folder):
    def spoil(tensors):
        tensors[EMBEDDING][vocab().start + 5, 3] = float("nan")

    edit_weights(folder, spoil)


def contract(**changes):
    return lambda folder: (folder / CHECKPOINT_MANIFEST).write_text(manifest(**changes))


FAULTS = {
    "special coordinates": (special_coordinates, {"tokens": "fail", "round_trip": "fail", "rows": "skipped"}),
    "swapped coordinates": (swapped_coordinates, {"tokens": "fail", "rows": "skipped"}),
    "missing coordinate": (missing_coordinate, {"tokens": "fail", "round_trip": "skipped", "rows": "skipped"}),
    "plain <|im_start|>": (plain_im_start, {"special_tokens": "fail"}),
    "other image token": (image_token, {"special_tokens": "fail"}),
    "other end": (other_end, {"special_tokens": "fail"}),
    "fewer rows than tokens": (fewer_rows, {"sizes": "fail", "rows": "skipped"}),
    "other vocab_size": (other_vocab_size, {"sizes": "fail"}),
    "untied without head": (headless, {"head": "fail"}),
    "tied with another head": (other_head, {"head": "fail"}),
    "half a file": (torn, {"weights": "fail", "sizes": "skipped", "head": "skipped", "rows": "skipped"}),
    "missing shard": (no_shard, {"weights": "fail"}),
    "NaN": (nan_rows, {"rows": "fail"}),
    "unknown convention": (contract(convention="norm998"), {"contract": "fail"}),
    "other number of bins": (contract(num_bins=1024), {"contract": "fail"}),
    "other start": (contract(coord_start=3), {"contract": "fail"}),
    "other pixel budget": (contract(max_pixels=12345), {"pixels": "fail"}),
    "no JSON": (lambda folder: (folder / CHECKPOINT_MANIFEST).write_text("{"), {"contract": "fail", "pixels": "fail"}),
    "tying disagrees": (
        lambda f: edit(f / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False)),
        {"head": "warning"},
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("["),
        {"files": "fail", "tokens": "fail"}
        | dict.fromkeys(("round_trip", "special_tokens", "weights", "sizes", "head", "rows"), "skipped"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_by_its_own_check(folder, fault):
    plant, expected = FAULTS[fault]
    plant(folder)
    found = outcomes(folder)
    assert {name: check.outcome for name, check in found.items() if check.outcome != "ok"} == expected
    assert all(check.advice for check in found.values() if check.outcome in ("fail", "warning"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["mean", "digits", "ordinal", "identical"])
def test_rows_as_they_were_made_are_known_from_trained_ones(folder, start, dtype):
    tokenizer, coords = template().tokenizer, vocab()

    def remake(tensors):
        table = tensors[EMBEDDING]
        digits = [tokenizer.encode(str(k), add_special_tokens=False) for k in range(1000)]
        rows = initial_rows(table[: coords.start], coords, "mean" if start == "identical" else start, digits, 3)
        table[coords.start : coords.start + 1000] = rows[:1] if start == "identical" else rows
        tensors[EMBEDDING] = table.to(dtype)

    edit_weights(folder, remake)
    assert not_ok(folder) == {"rows": "warning"}
    edit_weights(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].float()}))
    edit_weights(folder, train_rows)
    assert not_ok(folder) == ({} if start not in ("mean", "identical") else {"rows": "warning"})


def test_real_training_of_a_few_steps_is_seen(folder):
    model = fresh_model()
    table = model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW([table], lr=1e-3)
    inputs = torch.arange(vocab().start, vocab().start + 1000)[None]
    for _ in range(4):
        optimizer.zero_grad()
        hidden = table[inputs[0]]
        torch.nn.functional.cross_entropy(hidden @ table.T, inputs[0].roll(1)).backward()
        optimizer.step()
    edit_weights(folder, lambda tensors: tensors.update({EMBEDDING: table.detach().clone()}))
    assert not_ok(folder) == {}


def test_only_rows_that_are_needed_are_read(folder):
    size = 6 << 30
    header = json.dumps({"model.big": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / "other.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not_ok(folder) == {}
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 1 << 30


def adapter(tmp_path, *, tied=True, **options):
    folder = tmp_path / "adapter"
    adapted_model(tied=tied, **options).save_pretrained(folder)
    template().tokenizer.save_pretrained(folder)
    (folder / CHECKPOINT_MANIFEST).write_text(manifest())
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_adapter_passes(tmp_path, tied):
    assert not_ok(adapter(tmp_path, tied=tied, kind="lora", rank=2)) == {}


def test_an_untrained_adapter_warns_of_its_rows(tmp_path):
    folder = tmp_path / "adapter"
    adapt(fresh_model(), AdapterOptions(kind="rows"), vocab(), base=workspace() / "model").save_pretrained(folder)
    assert not_ok(folder) == {"rows": "warning", "contract": "warning"}


def test_an_adapter_without_its_base_fails_at_it(tmp_path):
    folder = adapter(tmp_path, kind="lora", rank=2)
    edit(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(tmp_path / "gone")))
    found = not_ok(folder)
    assert found["base"] == "fail"
    assert found["weights"] == "skipped"


@pytest.mark.parametrize(("tied", "dropped"), [(True, "embed_tokens"), (False, "lm_head")])
def test_an_adapter_that_lost_its_rows_fails(tmp_path, tied, dropped):
    folder = adapter(tmp_path, tied=tied, kind="lora", rank=2)

    def drop(tensors):
        for key in [key for key in tensors if "trainable_tokens" in key and dropped in key]:
            del tensors[key]

    edit_weights(folder, drop, "adapter_model.safetensors")
    assert outcomes(folder)["adapter"].outcome == "fail"


def test_an_adapter_of_other_rows_fails(tmp_path):
    folder = adapter(tmp_path, kind="lora", rank=2)
    edit(folder / "adapter_config.json", lambda c: c.update(trainable_token_indices=list(range(1000))))
    assert outcomes(folder)["adapter"].outcome == "fail"


def test_an_adapter_without_rows_on_an_untrained_base_warns(tmp_path):
    folder = adapter(tmp_path, kind="lora", rank=2, new_rows=False)
    assert not_ok(folder) == {"adapter": "warning", "rows": "warning"}


def test_tables_are_found_in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    rest = {key: value for key, value in tensors.items() if key != EMBEDDING}
    save_file({EMBEDDING: tensors[EMBEDDING]}, folder / "a.safetensors")
    save_file(rest, folder / "b.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: "a.safetensors" if key == EMBEDDING else "b.safetensors" for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    table = find_tables(folder).embedding
    assert table.file.name == "a.safetensors"
    torch.testing.assert_close(table.read(5, 9), tensors[EMBEDDING][5:9], rtol=0, atol=0)
    assert not_ok(folder) == {}


@needs_qwen
def test_the_real_qwen_vocabulary_passes():
    tokenizer = qwen_tokenizer()
    add_coord_tokens(tokenizer)
    tokens, coords = check_tokens(tokenizer, 1000)
    assert (tokens.outcome, coords.start) == ("ok", 151_670)
    assert check_round_trip(tokenizer, 1000).outcome == "ok"
    config = {"image_token_id": 151_655, "vision_start_token_id": 151_652}
    assert check_special(tokenizer, config).outcome == "ok"
    assert check_special(tokenizer, config | {"image_token_id": 151_656}).outcome == "fail"


def test_adding_coordinates_as_special_tokens_is_seen_in_both_its_faults():
    tokenizer = load_tokenizer(workspace() / "tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|coord_{k}|>" for k in range(1000)]})
    assert check_tokens(tokenizer, 1000)[0].outcome == "fail"
    assert check_round_trip(tokenizer, 1000).outcome == "fail"
    special = check_special(tokenizer, None)
    assert (special.outcome, "<|im_start|>" in special.details["unlisted"]) == ("warning", True)
