"""The coordinate vocabulary on the real Qwen tokenizer and on every model class it is meant for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import AddedToken

from command import call
from coordexp.errors import VocabError
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_model, load_tokenizer, save_model_folder
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.extend import add_coord_tokens, initial_rows, padded_rows
from coordexp.vocab.options import VocabOptions
from qwen import ADDED, BASE, needs_qwen, qwen_tokenizer, ranks, tiny_qwen
from tiny import workspace

TEXTS = ("Locate every black cat.", "naïve 日本語 \n\n  123.45 don't", '{"objects": [{"desc": "a"}]}')


@needs_qwen
def test_the_rebuilt_tokenizer_is_qwens_ids_and_all():
    import tiktoken

    tokenizer = qwen_tokenizer()
    pattern = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    reference = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks(), special_tokens={})
    assert len(tokenizer) == BASE + len(ADDED) == 151_669
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|image_pad|>", "</think>"]) == [151_643, 151_655, 151_668]
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


@needs_qwen
def test_coordinates_land_on_the_known_ids_of_qwen_and_survive_saving_and_decoding(tmp_path):
    tokenizer = qwen_tokenizer()
    before = [tokenizer.encode(text) for text in TEXTS]
    vocab = add_coord_tokens(tokenizer)
    assert (vocab.start, vocab.ids[-1], len(tokenizer)) == (151_670, 152_669, 152_670)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert CoordVocab.from_tokenizer(again) == vocab
    assert again.convert_ids_to_tokens(list(vocab.ids)) == [f"<|coord_{k}|>" for k in range(1000)]
    text = '"bbox_2d": [<|coord_0|>, <|coord_7|>, <|coord_99|>, <|coord_999|>]'
    ids = again.encode(text, add_special_tokens=False)
    assert [i for i in ids if i >= vocab.start] == [vocab.start + k for k in (0, 7, 99, 999)]
    assert again.decode(ids, skip_special_tokens=True) == text
    assert {"<|im_start|>", "<|im_end|>", "<|image_pad|>"} <= set(again.all_special_tokens)
    assert [again.encode(text) for text in TEXTS] == before


def test_the_table_grows_to_a_multiple_of_128_and_never_shrinks():
    assert padded_rows(152_670, 151_936) == 152_704
    assert padded_rows(152_670, 152_670) == 152_670
    assert padded_rows(152_670, 160_000) == 160_000
    assert padded_rows(128, 127) == 128


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory):
    """The real tokenizer on disk, and the id of every digit."""
    folder, tokenizer = tmp_path_factory.mktemp("qwen"), qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    digit_ids = [tokenizer.encode(d, add_special_tokens=False) for d in "0123456789"]
    assert all(len(ids) == 1 for ids in digit_ids)
    return folder, [ids[0] for ids in digit_ids]


@needs_qwen
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "qwen3"])
def test_every_model_class_is_extended_at_the_size_of_its_releases(kind, tied, qwen_files, tmp_path):
    model, (tokenizer, digit_ids) = tiny_qwen(kind, tied=tied), qwen_files
    tables = [model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()]
    shutil.copytree(tokenizer, tmp_path / "old")
    model.save_pretrained(tmp_path / "old", max_shard_size="3MB")
    summary = extend_model(tmp_path / "old", tmp_path / "new", VocabOptions(init="digits", seed=1))
    assert (summary.start, summary.rows_before, summary.rows_after, summary.tied) == (151_670, 151_936, 152_704, tied)
    again = load_model(tmp_path / "new", text_only=True)
    assert again.config.model_type == kind
    weights = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (weights[0].data_ptr() == weights[1].data_ptr()) == tied
    assert again.config.get_text_config().vocab_size == 152_704
    for old, new in zip(tables, weights, strict=True):
        assert new.shape[0] == 152_704
        torch.testing.assert_close(new[:151_669], old[:151_669], rtol=0, atol=0)
        for k in (0, 7, 10, 437, 999):
            expected = torch.stack([old[digit_ids[int(d)]] for d in str(k)]).mean(dim=0)
            torch.testing.assert_close(new[summary.start + k], expected)
        torch.testing.assert_close(new[152_670:], old[:151_669].mean(dim=0).expand(34, -1))
    with torch.no_grad():
        logits = again(input_ids=torch.tensor([[1, summary.start, 152_669]])).logits
    assert logits.shape[-1] == 152_704
    assert bool(logits.isfinite().all())


def _rows(init, *, seed=0, width=64, scale=0.02):
    """Rows over a table with a mean, like trained ones have, and tokens of three digits."""
    generator = torch.Generator().manual_seed(5)
    table = scale * (torch.randn(4000, width, generator=generator) + 0.3 * torch.randn(width, generator=generator))
    digits = [[ord(c) for c in str(k)] for k in range(1000)]
    return table, initial_rows(table, CoordVocab(4000, 1000), init, digits, seed), digits


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ordinal_rows_make_neighbours_closer_than_strangers_at_every_distance(seed):
    _, rows, _ = _rows("ordinal", seed=seed)
    distance = torch.cdist(rows, rows)
    k = torch.arange(1000)
    mean_at = [distance[(k[:, None] - k).abs() == gap].mean().item() for gap in (1, 4, 16, 64)]
    assert mean_at == sorted(mean_at)
    strangers = distance[(k[:, None] - k).abs() > 200]
    assert mean_at[0] < 0.1 * strangers.mean()
    assert distance[k[:-1], k[1:]].max() < strangers.min()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ordinal_rows_have_norms_like_their_family(seed):
    table, rows, _ = _rows("ordinal", seed=seed)
    family, own = table.norm(dim=1), rows.norm(dim=1)
    assert 0.8 < own.mean() / family.mean() < 1.25
    assert own.min() > 0.4 * family.mean()
    assert own.max() < 2.5 * family.mean()


def test_digit_rows_are_the_mean_of_their_pieces_and_mean_rows_lie_near_the_mean():
    table, rows, digits = _rows("digits")
    for k in (0, 9, 10, 437, 999):
        torch.testing.assert_close(rows[k], sum(table[i] for i in digits[k]) / len(digits[k]))
    table, rows, _ = _rows("mean")
    assert (rows - table.mean(dim=0)).norm(dim=1).max() < 0.05 * (table - table.mean(dim=0)).norm(dim=1).mean()
    assert len({tuple(row.tolist()) for row in rows}) == 1000


@pytest.mark.parametrize("init", ["mean", "ordinal"])
def test_the_seed_alone_decides_the_rows(init):
    torch.manual_seed(1)
    one = _rows(init, seed=3)[1]
    torch.manual_seed(2)
    torch.testing.assert_close(_rows(init, seed=3)[1], one, rtol=0, atol=0)
    assert not torch.equal(_rows(init, seed=4)[1], one)


def test_extending_twice_changes_nothing(tmp_path, monkeypatch, capsys):
    source, out = workspace() / "model", tmp_path / "twice"
    code, said, err = call(monkeypatch, capsys, "vocab", "extend", source, "--out", out, "--init", "mean", "--seed", 9)
    assert (code, err) == (0, "")
    assert "1000 coordinate tokens" in said
    for name in ("model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def _with(names):
    tokenizer = load_tokenizer(workspace() / "tiny")
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer


NAMES = [f"<|coord_{k}|>" for k in range(1000)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[:500], "500 of 1000"),
        (NAMES[1:], "999 of 1000"),
        ([*NAMES[:10], *NAMES[11:], NAMES[10]], "not contiguous and ascending"),
        (NAMES[::-1], "not contiguous and ascending"),
        ([*NAMES[:10], "<|coord_*|>", *NAMES[10:]], "not contiguous and ascending"),
    ],
    ids=["half", "all but the first", "one moved", "backwards", "a gap"],
)
def test_a_tokenizer_with_a_part_of_the_tokens_or_another_order_is_refused(names, message, tmp_path, monkeypatch, capsys):
    tokenizer = _with(names)
    with pytest.raises(VocabError, match=message):
        add_coord_tokens(tokenizer)
    with pytest.raises(VocabError):
        CoordVocab.from_tokenizer(tokenizer)
    broken = tmp_path / "broken"
    shutil.copytree(workspace() / "tiny", broken)
    tokenizer.save_pretrained(broken)
    code, out, err = call(monkeypatch, capsys, "vocab", "extend", broken, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == [broken]


def test_special_coordinates_are_refused_because_decoding_drops_them():
    tokenizer = load_tokenizer(workspace() / "tiny")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES], special_tokens=True)
    assert tokenizer.decode(tokenizer.encode("<|coord_3|>"), skip_special_tokens=True) == ""
    with pytest.raises(VocabError, match="decoding would drop them"):
        CoordVocab.from_tokenizer(tokenizer)


def test_a_model_without_the_rows_of_its_tokenizer_gets_them_and_one_with_a_part_is_refused(tmp_path):
    tokenizer = load_tokenizer(workspace() / "model")
    model, vocab = load_model(workspace() / "tiny"), CoordVocab.from_tokenizer(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] <= vocab.start
    save_model_folder(model, tokenizer, tmp_path / "none", processor_from=workspace() / "tiny")
    summary = extend_model(tmp_path / "none", tmp_path / "out", VocabOptions(init="ordinal"))
    assert (summary.start, summary.added) == (vocab.start, False)
    rows = load_model(tmp_path / "out").get_input_embeddings().weight.detach()[vocab.start : vocab.start + 1000]
    assert torch.cdist(rows[:1], rows[1:2]) < 0.2 * torch.cdist(rows[:1], rows[500:501])
    model.resize_token_embeddings(vocab.start + 10)
    save_model_folder(model, tokenizer, tmp_path / "part", processor_from=workspace() / "tiny")
    with pytest.raises(VocabError, match="a part of their rows is missing"):
        extend_model(tmp_path / "part", tmp_path / "other", VocabOptions())
    assert not (tmp_path / "other").exists()


def test_extending_keeps_the_type_of_the_weights(tmp_path, monkeypatch, capsys):
    half = load_model(workspace() / "tiny").to(torch.bfloat16)
    save_model_folder(half, load_tokenizer(workspace() / "tiny"), tmp_path / "half", processor_from=workspace() / "tiny")
    code, _, err = call(monkeypatch, capsys, "vocab", "extend", tmp_path / "half", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.6 * (workspace() / "model" / "model.safetensors").stat().st_size
