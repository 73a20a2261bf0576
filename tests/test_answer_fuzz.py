"""Mutated answers: the parser neither fails nor reports a box that is not written in the text."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import time

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from coordexp.codec import CoordCodec
from coordexp.decode.generate import Generated
from coordexp.decode.options import DecodeOptions
from coordexp.decode.output import Output, Workers
from coordexp.decode.predict import read_answer
from coordexp.decode.tokens import token_bytes
from coordexp.errors import DataError
from coordexp.evaluate.predictions import read_predictions
from coordexp.grammar import COORD_TOKEN, Instance, parse, render
from coordexp.integrations.ms_swift.rows import row_targets
from tiny import records, template, vocab

COUNT = 10_000
# What ends a reader that trusts a model's text: halves of surrogate pairs, nesting, digits, blanks, controls.
HOSTILE = st.one_of(
    st.sampled_from(['{"objects": [', '{"desc": "', '", "bbox_2d": [', "<|coord_7|>", ", ", "]}", '{"object_1": ', '"object_2": {', '"']),
    st.sampled_from(["\ud800", "\udfff", "\\ud800", "\\udc00x", "\\u00", "\\", "\x00", "\x85", "\u2028", "<|coord_٣|>", "<|coord_007|>"]),
    st.builds(
        lambda piece, n: piece * n, st.sampled_from(["[", "{", '{"a":', "1", " ", "\n", "\\", '"', "]", "<|coord_"]), st.integers(1, 5000)
    ),
    st.integers(0, 5000).map(lambda n: f"<|coord_{'9' * n}|>"),
    st.text(alphabet=st.characters(), max_size=30),
)
PIECES = (
    '"', "\\", "{", "}", "[", "]", ",", ":", " ", "\n", "\x00", "é", "😀", "<|coord_", "|>", "<|coord_5|>", "<|coord_1000|>",
    "<|coord_-1|>",
    '"desc": "', '"bbox_2d": [', '"point_2d"', '"object_1": {', '{"objects": [', "null", "1e999", "\\ud800", '{"desc": "x", ',
)  # fmt: skip
# A box as it must stand in the text: its key, four tokens with at most commas, blanks and quotes between, and the end of the list.
BEFORE = re.compile(r'"bbox_2d"\s*:\s*\[\s*"?$')
BETWEEN = re.compile(r'"?\s*,\s*"?')
AFTER = re.compile(r'"?\s*\]\s*\}')


def original(rng: random.Random) -> str:
    items = []
    for _ in range(rng.randrange(0, 5)):
        x1, x2 = sorted(rng.sample(range(1000), 2))
        y1, y2 = sorted(rng.sample(range(1000), 2))
        name = rng.choice(["cat", 'a "quoted" one', "back\\slash", "zwölf", "bbox_2d", "{", "]}", ""])
        items.append(Instance(name, (x1, y1, x2, y2)) if rng.random() < 0.8 else Instance(name, (x1, y1), "point_2d"))
    text = render(items).text
    if rng.random() < 0.2:
        text = re.sub(r"<\|coord_\d+\|>", lambda m: f'"{m[0]}"', text)
    if rng.random() < 0.2:
        parts = [f'"object_{n}": {render([item]).text[13:-2]}' for n, item in enumerate(items, start=1)]
        text = "{" + ", ".join(parts) + "}"
    return text


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randrange(1, 6)):
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        j = min(j, i + rng.choice((1, 3, 12, 60)))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:i] + rng.choice(PIECES) + text[i:]
        elif kind == 2:
            text = text[:i] + rng.choice(PIECES) + text[j:]
        elif kind == 3:
            text = text[:j] + text[i:j] + text[j:]
        elif kind == 4:
            text = text[:i]
        elif kind == 5:
            k = rng.randrange(len(text) + 1)
            text = text[:i] + text[j:k] + text[i:j] + text[k:] if k > j else text[j:] + text[:i]
        else:
            text = text[:i] + text[i:j][::-1] + text[j:]
    return text


def test_mutated_answers_never_crash_the_parser_nor_invent_a_box() -> None:
    rng = random.Random(0)
    boxes = broken = 0
    for _ in range(COUNT):
        text = mutate(original(rng), rng)
        parsed = parse(text)
        tokens = list(COORD_TOKEN.finditer(text))
        used: set[int] = set()
        broken += bool(parsed.problems)
        assert all(isinstance(n, int) and n > 0 for n in parsed.problems.values())
        assert len(parsed.instances) == len(parsed.coord_index)
        for instance, index in zip(parsed.instances, parsed.coord_index, strict=True):
            own = [tokens[k] for k in index]
            assert instance.bins == tuple(int(m[1]) for m in own)
            assert not used & set(index), text
            used |= set(index)
            if instance.geometry != "bbox_2d":
                continue
            boxes += 1
            x1, y1, x2, y2 = instance.bins
            assert 0 <= x1 < x2 < 1000, text
            assert 0 <= y1 < y2 < 1000, text
            assert BEFORE.search(text[: own[0].start()]), text
            assert all(BETWEEN.fullmatch(text[a.end() : b.start()]) for a, b in itertools.pairwise(own)), text
            assert AFTER.match(text[own[-1].end() :]), text
    # The mutations must leave something to look at, and break something.
    assert boxes > COUNT / 10
    assert broken > COUNT / 3


@settings(max_examples=300, deadline=None)
@given(st.lists(HOSTILE, max_size=30).map("".join), st.booleans())
def test_whatever_a_model_writes_is_read_and_what_is_read_can_be_written(text, begun):
    parsed = parse('{"objects": [{"desc": "' * begun + text)
    for instance, (start, end) in zip(parsed.instances, parsed.desc_spans, strict=True):
        row = json.dumps({"desc": instance.desc, "bins": instance.bins}, ensure_ascii=False).encode()
        assert json.loads(row) == {"desc": instance.desc, "bins": list(instance.bins)}
        assert json.loads(('{"objects": [{"desc": "' * begun + text)[start - 1 : end + 1]) == instance.desc
        assert all(0 <= k < 1000 for k in instance.bins)


@pytest.mark.parametrize("start", ['{"objects": [', '{"object_1": ', '{"objects": [{"desc": "a", "bbox_2d": [', '{"objects": [{"desc": '])
def test_reading_takes_time_linear_in_the_text(start):
    boxes = ", ".join('{"desc": "a", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}' for _ in range(1000))
    pieces = (
        " ", "[", "{", "1", '"', "\\", '\\"', '{"desc": "', '{"desc": "a"}, ', '"object_1": ', '"object_1": {', '"object_1', "<|coord_1",
        "<|coord_1|>, ", '{"desc": "a", "bbox_2d": [ ', "{   ", boxes,
    )  # fmt: skip
    for piece in pieces:
        text = start + piece * (300_000 // len(piece))
        begin = time.perf_counter()
        parse(text)
        # Linear reading takes at most 0.1 s; quadratic took 12 s for a third of this length.
        assert time.perf_counter() - begin < 3, piece


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(st.lists(HOSTILE, max_size=20).map("".join), st.booleans())
def test_whatever_tokens_a_model_writes_make_a_row_that_is_read_again_and_is_no_traceback_as_a_training_row(tmp_path_factory, text, begun):
    tokenizer, coords, answer = template().tokenizer, vocab(), '{"objects": [{"desc": "' * begun + text
    ids = tokenizer.encode(answer.encode(errors="replace").decode(), add_special_tokens=False)
    places = sum(token in coords.ids for token in ids)
    made = Generated(ids, torch.zeros(places, 1000), truncated=False, log_probs=[None] * len(ids))
    row, _ = read_answer(records()[0], made, token_bytes(tokenizer), coords, CoordCodec(), DecodeOptions(score="none"))
    out = Output(tmp_path_factory.mktemp("fuzz") / "p.jsonl", Workers())
    out.append([row])
    out.merge()
    assert [item.desc for item in read_predictions(out.path)[0].objects] == [item["desc"] for item in row["objects"]]
    with contextlib.suppress(DataError):
        row_targets({"messages": [{"role": "assistant", "content": answer}]}, CoordCodec())
