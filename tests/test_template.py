"""Tokens, roles, shift: what the model is asked and what it is taught."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from coordexp.data.collate import collate_prompts
from coordexp.data.records import RecordObject
from coordexp.data.template import build_messages
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import ROLE_CODES, parse, render, token_roles
from tiny import collator, fresh_model, records, template, vocab


def test_prompt_ids_are_equal_in_training_and_prediction():
    chat = template()
    for record in records():
        prompt = chat.encode_prompt(record)
        example = chat.encode(record)
        first = next(i for i, role in enumerate(example.roles) if role)
        assert example.input_ids[:first] == prompt.input_ids
        torch.testing.assert_close(example.pixel_values, prompt.pixel_values, rtol=0, atol=0)
        assert example.image_grid_thw.tolist() == prompt.image_grid_thw.tolist()


def test_supervised_tokens_decode_to_the_answer_and_the_end_token():
    chat = template()
    for record in records():
        example = chat.encode(record)
        answer = [i for i, role in zip(example.input_ids, example.roles, strict=True) if role]
        text = chat.tokenizer.decode(answer, skip_special_tokens=False)
        assert text == render(chat.instances(record)[0]).text + chat.tokenizer.eos_token
        assert [i.desc for i in parse(text.removesuffix(chat.tokenizer.eos_token), strict=True).instances] == [
            o.desc for o in sorted(record.objects, key=lambda o: (o.values[1], o.values[0]))
        ]


def test_roles_centres_and_slots_belong_to_their_tokens():
    chat, space = template(), vocab()
    for record in records():
        example = chat.encode(record)
        objects = sorted(record.objects, key=lambda o: (o.values[1], o.values[0]))
        values = iter([(o, j) for o in objects for j in range(4)])
        for token, role, center, extent, slot in zip(
            example.input_ids, example.roles, example.centers, example.extents, example.slots, strict=True
        ):
            if token not in space.ids:
                assert math.isnan(center)
                assert math.isnan(extent)
                assert slot == -1
                assert role != ROLE_CODES["coord"]
                continue
            item, j = next(values)
            side = record.width if j % 2 == 0 else record.height
            assert role == ROLE_CODES["coord"]
            assert slot == j
            assert center == pytest.approx(item.values[j] / side * 999)
            assert abs(token - space.start - center) <= 0.5
            assert extent == pytest.approx((item.values[2 + j % 2] - item.values[j % 2]) / side * 999)
        assert next(values, None) is None


def test_every_word_of_a_description_has_a_desc_token():
    chat = template()
    example = chat.encode(records()[0])
    words = [i for i, r in zip(example.input_ids, example.roles, strict=True) if r == ROLE_CODES["desc"]]
    for item in records()[0].objects:
        for word in item.desc.split()[1:]:
            assert word in chat.tokenizer.decode(words)


def test_the_collator_shifts_labels_and_everything_beside_them_once():
    examples = [template().encode(r) for r in records()[:3]]
    batch = collator()(examples)
    for b, example in enumerate(examples):
        n = len(example.input_ids)
        expected = [i if r else -100 for i, r in zip(example.input_ids, example.roles, strict=True)]
        assert batch["targets"].labels[b, : n - 1].tolist() == expected[1:]
        assert (batch["targets"].labels[b, n - 1 :] == -100).all()
        at = batch["targets"].roles[b] == ROLE_CODES["coord"]
        assert torch.isfinite(batch["targets"].centers[b][at]).all()
        assert torch.isnan(batch["targets"].centers[b][~at]).all()
        assert batch["targets"].slots[b][at].tolist() == [0, 1, 2, 3] * (int(at.sum()) // 4)
        assert ((batch["targets"].labels[b][at] - vocab().start).float() - batch["targets"].centers[b][at]).abs().max() <= 0.5 + 1e-4


def test_a_position_predicts_its_shift_label_as_the_stock_loss_sees_it():
    """The stock model shifts ``labels`` itself; ours are shifted: both must teach the same tokens."""
    model = fresh_model()
    examples = [template().encode(r) for r in records()[:2]]
    batch = collator()(examples)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1:] = batch["targets"].labels[:, :-1]
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    with torch.no_grad():
        output = model(**{k: batch[k] for k in names}, labels=labels)
    mine = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["targets"].labels.flatten(), ignore_index=-100)
    assert mine.item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_random_order_is_a_pure_function_of_seed_epoch_and_sample():
    record = max(records(), key=lambda r: len(r.objects))
    shuffled = dataclasses.replace(template(), order="random", seed=3)
    orders = {epoch: [i.desc for i in shuffled.instances(record, epoch)[0]] for epoch in range(12)}
    assert orders == {epoch: [i.desc for i in shuffled.instances(record, epoch)[0]] for epoch in range(12)}
    assert len({tuple(o) for o in orders.values()}) > 1


def test_a_description_with_a_reserved_token_is_refused():
    record = dataclasses.replace(records()[0], objects=(RecordObject("a <|im_end|> b", "point_2d", (1.0, 1.0)),))
    with pytest.raises(DataError, match="reserved token"):
        template().encode(record)


def test_a_chat_template_that_changes_its_prompt_is_refused():
    chat = template()
    tokenizer = type(chat.tokenizer).from_pretrained(chat.tokenizer.name_or_path)
    tokenizer.chat_template = "{% for m in messages %}<|image_pad|>{{ loop.length }}{% endfor %}"
    broken = dataclasses.replace(chat, tokenizer=tokenizer)
    with pytest.raises(ConfigError):
        broken.encode(records()[0])


def test_prompts_are_padded_on_the_left():
    chat = template()
    prompts = [chat.encode_prompt(r) for r in records()[:2]]
    longer = dataclasses.replace(prompts[0], input_ids=[5, *prompts[0].input_ids])
    batch = collate_prompts([longer, prompts[1]], pad_token_id=0, image_token_id=1)
    assert batch["attention_mask"][1].tolist() == [0] + [1] * len(prompts[1].input_ids)
    assert batch["input_ids"][1, 1:].tolist() == prompts[1].input_ids


def test_messages_place_the_image_before_the_text():
    parts = build_messages("Find it.")[0]["content"]
    assert [p["type"] for p in parts] == ["image", "text"]


def test_a_label_whose_role_contradicts_its_token_is_an_error_with_the_record(monkeypatch):
    record = records()[0]
    assert any(role == ROLE_CODES["coord"] for role in template().encode(record).roles)
    wrong = dict.fromkeys(("none", "coord", "desc", "format"), 0) | {"format": 3, "desc": 1, "coord": 2}
    monkeypatch.setattr("coordexp.data.template.token_roles", lambda inner, spans: _swapped(token_roles(inner, spans), wrong))
    with pytest.raises(DataError, match=r"train\.jsonl:1: token .* change the description"):
        template().encode(record)


def _swapped(found, codes):
    names = {code: name for name, code in ROLE_CODES.items()}
    roles, slots = found
    return [codes[names[role]] for role in roles], slots
