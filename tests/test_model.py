"""Tiny model, vocabulary, binding, generation: the path a real checkpoint takes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from coordexp.decode.generate import generate
from coordexp.decode.options import DecodeOptions
from coordexp.decode.predict import predict
from coordexp.errors import ConfigError, VocabError
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.export import untie
from coordexp.modeling.extend import extend_model
from coordexp.modeling.load import load_image_processor, load_model, load_tokenizer
from coordexp.modeling.tiny import train_tokenizer, write_tiny_model
from coordexp.train.forward import bind_coord_loss, coord_loss
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.extend import initial_rows
from coordexp.vocab.options import VocabOptions
from tiny import SMALL, collator, fresh_model, records, template, vocab, workspace

STOCK = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def test_the_tiny_folder_has_the_layout_and_classes_of_a_real_checkpoint():
    folder = workspace() / "tiny"
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    processor = load_image_processor(folder)
    assert (processor.patch_size, processor.merge_size, processor.size["longest_edge"]) == (8, 2, 64 * 64)
    assert load_image_processor(folder, max_pixels=32 * 32).size["longest_edge"] == 32 * 32


def test_the_same_seed_writes_the_same_weights(tmp_path):
    write_tiny_model(tmp_path / "again", SMALL)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (workspace() / "tiny" / "model.safetensors").read_bytes()


def test_the_default_tokenizer_keeps_words_and_format_pieces_whole():
    tokenizer = train_tokenizer(640)
    for text in (" red", " circle", "small", "objects", "desc", "bbox", " square", "RBC"):
        assert len(tokenizer.encode(text)) == 1, text
    text = 'naïve "日本" \n 123'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_extension_adds_ordinary_contiguous_tokens_that_survive_saving_and_decoding():
    tokenizer = load_tokenizer(workspace() / "model")
    space = CoordVocab.from_tokenizer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(space.start + 999) == "<|coord_999|>"
    text = "[<|coord_0|>, <|coord_999|>]"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert load_model(workspace() / "model").get_input_embeddings().weight.shape[0] % 128 == 0
    assert "<|im_start|>" in tokenizer.all_special_tokens


def test_extension_keeps_every_old_row_and_ties_what_was_tied(tmp_path):
    before, after = load_model(workspace() / "tiny"), fresh_model()
    rows = len(load_tokenizer(workspace() / "tiny"))
    old, new = before.get_input_embeddings().weight, after.get_input_embeddings().weight
    torch.testing.assert_close(new[:rows], old[:rows], rtol=0, atol=0)
    assert after.get_output_embeddings().weight.data_ptr() == new.data_ptr()
    import dataclasses

    write_tiny_model(tmp_path / "untied", dataclasses.replace(SMALL, tie_word_embeddings=False))
    summary = extend_model(tmp_path / "untied", tmp_path / "untied-x", VocabOptions())
    untied = load_model(tmp_path / "untied-x")
    assert not summary.tied
    assert untied.get_output_embeddings().weight.data_ptr() != untied.get_input_embeddings().weight.data_ptr()
    for weight in (untied.get_output_embeddings().weight, untied.get_input_embeddings().weight):
        assert _neighbour_similarity(weight[summary.start : summary.start + 1000]) > 0.9


def _neighbour_similarity(rows):
    centred = rows - rows.mean(0)
    return torch.cosine_similarity(centred[:-1], centred[1:]).mean().item()


def test_ordinal_rows_are_smooth_and_mean_rows_are_not():
    table = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    space = CoordVocab(300, 1000)
    digits = [[k % 300] for k in range(1000)]
    ordinal = initial_rows(table, space, "ordinal", digits, 0)
    assert _neighbour_similarity(ordinal) > 0.95
    assert abs(torch.cosine_similarity(ordinal[0] - ordinal.mean(0), ordinal[500] - ordinal.mean(0), dim=0)) < 0.8
    assert _neighbour_similarity(initial_rows(table, space, "mean", digits, 0)) < 0.2
    torch.testing.assert_close(initial_rows(table, space, "digits", digits, 0)[7], table[7])
    torch.testing.assert_close(initial_rows(table, space, "ordinal", digits, 0), ordinal, rtol=0, atol=0)


def test_a_tokenizer_without_coordinates_is_refused_with_the_way_out():
    with pytest.raises(VocabError, match="coordexp vocab extend"):
        CoordVocab.from_tokenizer(load_tokenizer(workspace() / "tiny"))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such model folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "thesis.txt").touch()
    for overwrite, word in ((False, "is not empty"), (True, "is no model that coordexp wrote")):
        with pytest.raises(ConfigError, match=word):
            write_tiny_model(tmp_path, SMALL, overwrite=overwrite)


def test_binding_changes_no_state_key_and_no_stock_output():
    stock, bound = fresh_model(), fresh_model()
    bind_coord_loss(bound, vocab=vocab(), objective=CoordObjective())
    assert bound.state_dict().keys() == stock.state_dict().keys()
    batch = collator()([template().encode(r) for r in records()[:2]])
    inputs = {k: batch[k] for k in STOCK}
    with torch.no_grad():
        torch.testing.assert_close(bound(**inputs).logits, stock(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before binding", "after binding"])
def test_a_head_whose_weight_was_never_gathered_is_named_in_one_line(when):
    """ZeRO-3 leaves an empty weight of one dimension in a module whose hooks did not run."""
    model = fresh_model()
    untie(model)
    head = model.get_output_embeddings()

    def empty():
        head.weight = torch.nn.Parameter(torch.empty(0))

    if when == "before binding":
        empty()
    bind_coord_loss(model, vocab=vocab(), objective=CoordObjective())
    if when == "after binding":
        empty()
    batch = collator()([template().encode(r) for r in records()[:2]])
    with pytest.raises(ConfigError, match=r"^the output head: weight is empty \(\[0\]\): under ZeRO-3, gather it") as caught:
        coord_loss(model, batch)
    assert len(str(caught.value).splitlines()) == 1


def test_an_error_on_the_way_leaves_a_model_that_still_gives_logits():
    model = fresh_model()
    bind_coord_loss(model, vocab=vocab(), objective=CoordObjective())
    batch = collator()([template().encode(r) for r in records()[:2]])
    wrong = {**batch, "targets": batch["targets"].divided_by(None)}
    wrong["targets"].labels = wrong["targets"].labels[:, :-1]
    with pytest.raises(ValueError, match="labels must have shape"):
        coord_loss(model, wrong)
    with torch.no_grad():
        assert model(**{k: batch[k] for k in STOCK}).logits.ndim == 3
    assert torch.isfinite(coord_loss(model, batch).loss)


def test_generated_tokens_equal_step_by_step_argmax_and_distributions_equal_a_fresh_forward():
    model, chat, space = fresh_model(), template(), vocab()
    # Push the head towards coordinates, so that an untrained model writes some.
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[space.start : space.start + 1000] *= 6.0
    prompts = [chat.encode_prompt(r) for r in records()[:3]]
    answers = generate(model, chat.tokenizer, prompts, vocab=space, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, found = list(prompt.input_ids), 0
        for token in answer.token_ids:
            tensor = torch.tensor([ids])
            image = (tensor == model.config.image_token_id).long()
            with torch.no_grad():
                logits = model(
                    input_ids=tensor, mm_token_type_ids=image, pixel_values=prompt.pixel_values, image_grid_thw=prompt.image_grid_thw
                ).logits[0, -1]
            assert logits.argmax().item() == token
            if token in space.ids:
                expected = logits[space.start : space.start + 1000]
                torch.testing.assert_close(answer.coord_logits[found], expected, rtol=1e-4, atol=1e-4)
                found += 1
            ids.append(token)
        assert found == answer.coord_logits.shape[0]
    assert sum(a.coord_logits.shape[0] for a in answers) > 0
    assert all(a.truncated for a in answers)


def test_predictions_have_a_row_per_record_and_do_not_depend_on_the_batch_size(tmp_path):
    model, chat = fresh_model(), template()
    outputs = []
    for size in (1, 4):
        out = tmp_path / f"p{size}.jsonl"
        options = DecodeOptions(batch_size=size, max_new_tokens=8, constrained=False)
        predict(model, chat, records("test"), out, vocab=vocab(), options=options)
        outputs.append([json.loads(line) for line in out.read_text().splitlines()])
        assert not list(tmp_path.glob("*.tmp"))
    assert outputs[0] == outputs[1]
    assert [row["image_id"] for row in outputs[0]] == [r.image_id for r in records("test")]
    assert all(row["problems"] and row["truncated"] for row in outputs[0])


@pytest.mark.parametrize(
    ("name", "content", "load"),
    [("config.json", "{", load_model), ("tokenizer.json", "{}", load_tokenizer), ("model.safetensors", "cut", load_model)],
)
def test_a_damaged_model_folder_is_one_line(tmp_path, name, content, load):
    folder = tmp_path / "m"
    shutil.copytree(workspace() / "model", folder)
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"m: its .* cannot be read") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
