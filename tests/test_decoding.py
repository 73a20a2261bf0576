"""Constrained decoding: what the automaton accepts, what it writes, and that the loop is ``generate``."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from coordexp.data.collate import collate_prompts
from coordexp.data.options import SynthOptions
from coordexp.data.records import read_records
from coordexp.data.synthetic import write_scenes
from coordexp.decode.automaton import AnswerGrammar
from coordexp.decode.characters import Characters, Desc, Right
from coordexp.decode.constraints import Follower, GrammarProcessor
from coordexp.decode.generate import Generator
from coordexp.decode.tokens import token_bytes, token_spans
from coordexp.errors import ConfigError
from coordexp.grammar import GEOMETRIES, Instance, parse, render
from coordexp.modeling.tiny import train_tokenizer
from coordexp.vocab.coord_vocab import CoordVocab
from tiny import fresh_model, records, template, vocab, workspace

RESERVED = re.compile(r"<\|[^|<>]*\|>")
spiced = st.one_of(
    st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=12),
    st.text(alphabet='"\\\n\t\x00\x1f\x7f<|>(),: aé日😀]}[{', max_size=12),
).filter(lambda s: not RESERVED.search(s))
edges = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(edges, edges).map(lambda e: (e[0][0], e[1][0], e[0][1], e[1][1]))
polys = st.integers(3, 5).flatmap(lambda n: st.tuples(*[st.integers(0, 999)] * (2 * n)))
points = st.tuples(st.integers(0, 999), st.integers(0, 999))
instances = st.one_of(
    st.builds(Instance, desc=spiced, bins=boxes),
    st.builds(Instance, desc=spiced, bins=polys, geometry=st.just("poly")),
    st.builds(Instance, desc=spiced, bins=points, geometry=st.just("point_2d")),
)
answers = st.lists(instances, max_size=4, unique_by=lambda i: (i.desc, i.geometry, i.bins))


@lru_cache
def merging_tokenizer():
    """A tokenizer with tokens across the borders of descriptions, such as `` "(`` and ``!",``."""
    from coordexp.modeling import tiny

    lines = tiny.corpus()
    tiny_corpus = tiny.corpus
    tiny.corpus = lambda: lines + ['{"objects": [{"desc": "(big) cat!", "bbox_2d": [', ' "(x', '!",', ' "",', ' "\\"', '\\"",'] * 40
    try:
        tokenizer = train_tokenizer(420)
    finally:
        tiny.corpus = tiny_corpus
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(f"<|coord_{k}|>", special=False, normalized=False) for k in range(1000)])
    return tokenizer


@lru_cache
def grammar(name="tiny", geometries=GEOMETRIES):
    tokenizer = template().tokenizer if name == "tiny" else merging_tokenizer()
    return AnswerGrammar(tokenizer, CoordVocab.from_tokenizer(tokenizer), geometries=geometries)


def follow(made, ids, **limits):
    """A follower that has taken ``ids``; every forced token on the way must be the one taken."""
    follower = Follower(made, **{"max_objects": 100, "max_tokens": 10_000, **limits})
    for token in ids:
        forced = follower.forced()
        assert forced in (None, token)
        follower.advance(token)
    return follower


@pytest.mark.parametrize("name", ["tiny", "merging"])
@settings(max_examples=150)
@given(answers)
def test_every_rendered_answer_is_accepted_token_by_token(name, items):
    made = grammar(name)
    ids = made.tokenizer(render(items).text, add_special_tokens=False)["input_ids"]
    follower = follow(made, [*ids, made.eos])
    assert follower.done
    assert follower.stopped is None


def test_tokens_that_span_format_and_description_exist_and_are_taken():
    made = grammar("merging")
    text = render([Instance("(big) cat!", (1, 2, 3, 4)), Instance("", (1, 2, 3, 4))]).text
    tokens = made.tokenizer.tokenize(text)
    assert {'Ġ"(', '!",', 'Ġ"",'} <= set(tokens)
    assert follow(made, [*made.tokenizer.convert_tokens_to_ids(tokens), made.eos]).done


def test_the_training_tokens_of_every_record_are_a_legal_path():
    chat, made = template(), grammar("tiny", ("bbox_2d",))
    for record in records("train"):
        example = chat.encode(record)
        answer = [i for i, role in zip(example.input_ids, example.roles, strict=True) if role]
        follower = follow(made, answer)
        assert follower.done


@settings(max_examples=100)
@given(spiced, st.integers(0, 200), st.integers(0, 255))
def test_bytes_are_legal_in_a_description_exactly_if_json_writes_them_so(text, place, byte):
    import json

    characters = Characters({"bbox_2d": b'", "bbox_2d": ['})
    written = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    assert characters.walk(Desc("", 0), written + b'"') == Right(b'"')
    changed = bytearray(written)
    if changed:
        changed[place % len(changed)] = byte
    end = characters.walk(Desc("", 0), bytes(changed))
    try:
        again = json.loads(f'"{changed.decode()}"')
        canonical = json.dumps(again, ensure_ascii=False)[1:-1].encode() == bytes(changed) and not RESERVED.search(changed.decode())
    except ValueError:
        canonical = False
    assert canonical == (end is not None and isinstance(end, Desc) and end.kind == "")


def _sampled(made, seed, **limits):
    """Tokens of a uniformly sampled answer."""
    random = torch.Generator().manual_seed(seed)
    follower = Follower(made, **limits)
    ids = []
    while not follower.done:
        bins = follower.bins()
        legal = sorted(follower.legal()) if bins is None else [made.vocab.start + k for k in bins]
        ids.append(legal[int(torch.randint(len(legal), (1,), generator=random))])
        follower.advance(ids[-1])
    return ids, follower


@pytest.mark.parametrize("name", ["tiny", "merging"])
@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(60, 300), st.integers(1, 3))
def test_every_sampled_answer_fits_its_room_and_is_what_render_writes(name, seed, room, most):
    made = grammar(name)
    ids, _ = _sampled(made, seed, max_objects=most, max_tokens=room)
    assert len(ids) <= room
    text = made.tokenizer.decode(ids[:-1])
    parsed = parse(text, strict=True)
    assert len(parsed.instances) <= most
    assert render(parsed.instances).text == text


@pytest.mark.parametrize(
    ("slot", "taken", "legal"),
    [(0, (), range(999)), (1, (998,), range(999)), (2, (998, 5), range(999, 1000)), (3, (998, 5, 999), range(6, 1000))],
)
def test_the_second_corner_lies_strictly_beyond_the_first(slot, taken, legal):
    made = grammar("tiny", ("bbox_2d",))
    text = render([Instance("cat", (1, 2, 3, 4))]).text
    head = text[: text.index("<|coord_1|>")] + ", ".join(f"<|coord_{k}|>" for k in taken) + (", " if taken else "")
    follower = follow(made, made.tokenizer(head, add_special_tokens=False)["input_ids"])
    assert follower.bins() == legal
    for k in {0, 998, 999} - set(legal):
        with pytest.raises(ValueError, match="no bin"):
            follower.advance(made.vocab.start + k)


def _write(items, **limits):
    """Feed the answer with ``items`` as far as it is legal, then what is forced: (complete, why it stopped, objects written)."""
    made = grammar("tiny", ("bbox_2d",))
    ids = made.tokenizer(render(items).text, add_special_tokens=False)["input_ids"]
    follower = Follower(made, **{"max_objects": 100, "max_tokens": 10_000, **limits})
    written = []
    for token in ids:
        if token not in (follower.legal() if follower.bins() is None else made.vocab.ids):
            break
        follower.advance(token)
        written.append(token)
    while (token := follower.forced()) is not None:
        follower.advance(token)
        written.append(token)
    parsed = parse(made.tokenizer.decode(written[:-1]), strict=True)
    return follower.done, follower.stopped, list(parsed.instances)


def test_a_repeated_object_ends_the_list_and_only_an_exact_repetition_does():
    cat, cats, shifted = Instance("cat", (1, 2, 3, 4)), Instance("cats", (1, 2, 3, 4)), Instance("cat", (1, 2, 3, 5))
    # The repetition is the last object; what the model would have written after it is not taken.
    assert _write([cat, cats, shifted, cat, cats]) == (True, "duplicate", [cat, cats, shifted, cat])
    assert _write([cat, cats, shifted]) == (True, None, [cat, cats, shifted])


def test_the_bound_on_objects_ends_the_list():
    items = [Instance("cat", (k, 2, 900, 4)) for k in range(4)]
    assert _write(items, max_objects=3) == (True, "max_objects", items[:3])
    assert _write(items[:2], max_objects=3) == (True, None, items[:2])


def test_no_room_for_an_answer_is_an_error():
    with pytest.raises(ConfigError, match="max_new_tokens: expected at least"):
        Follower(grammar(), max_objects=1, max_tokens=2)


# The loop


def test_where_only_an_empty_answer_has_room_it_is_written_without_a_pass():
    made = grammar("tiny", ("bbox_2d",))
    for answer in own(noisy_model(1), made, len(made.empty))(prompts()):
        assert template().tokenizer.decode(answer.token_ids) == '{"objects": []}'
        assert (answer.passes, answer.stopped, answer.truncated, len(answer.coord_logits)) == (0, "budget", True, 0)


@lru_cache
def prompts():
    """Prompts of images of different sizes: different lengths, different rope offsets."""
    folder = workspace() / "wide"
    write_scenes(folder, SynthOptions(train=1, val=1, test=3, side=40, seed=9))
    made = [*records("test")[:2], *read_records(folder / "test.jsonl").records]
    return [template().encode_prompt(r) for r in made]


def noisy_model(seed):
    """Random weights large enough that answers differ from row to row."""
    model = fresh_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def stock(model, batch_prompts, count, processors=()):
    tokenizer = template().tokenizer
    batch = collate_prompts(batch_prompts, pad_token_id=tokenizer.pad_token_id, image_token_id=model.config.image_token_id)
    ids = model.generate(
        **batch, max_new_tokens=count, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList(processors),
    )  # fmt: skip
    rows = ids[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in rows], batch["input_ids"].shape[1]


def own(model, made, count, **more):
    return Generator(model=model, tokenizer=template().tokenizer, vocab=vocab(), grammar=made, max_new_tokens=count, **more)


@pytest.mark.parametrize("seed", [0, 1])
def test_without_a_grammar_the_loop_is_generate_token_for_token(seed):
    model = noisy_model(seed)
    expected, _ = stock(model, prompts(), 24)
    assert [a.token_ids for a in own(model, None, 24)(prompts())] == expected
    assert len({tuple(row) for row in expected}) > 1


def _choices(made, ids, count):
    """Number of tokens of an answer that had an alternative, or are values; the prompt's own pass serves the first of them."""
    follower, choices = Follower(made, max_objects=100, max_tokens=count), 0
    for token in [*ids, made.eos]:
        choices += follower.bins() is not None or len(follower.legal()) > 1
        follower.advance(token)
    assert follower.done
    return choices


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_with_a_grammar_the_loop_is_generate_with_the_processor_and_takes_fewer_passes(seed):
    model, made, count = noisy_model(seed), grammar("tiny", ("bbox_2d",)), 90
    _, length = stock(model, prompts(), 1)
    processor = GrammarProcessor(made, prompt_length=length, max_objects=100, max_new_tokens=count)
    expected, _ = stock(model, prompts(), count, [processor])
    found = own(model, made, count)(prompts())
    assert [a.token_ids for a in found] == expected
    assert [a.passes for a in found] == [_choices(made, row, count) for row in expected]
    assert max(a.passes for a in found) < max(map(len, expected))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", [1, 2, 4])
def test_random_weights_write_answers_that_parse_with_no_reversed_box(seed, temperature):
    made = grammar("tiny", ("bbox_2d",))
    found = own(noisy_model(seed), made, 110, temperature=temperature)(prompts(), seeds=[seed * 100 + i for i in range(len(prompts()))])
    for answer in found:
        parsed = parse(template().tokenizer.decode(answer.token_ids), strict=True)
        assert answer.coord_logits.shape[0] == 4 * len(parsed.instances)
        for box in parsed.instances:
            x1, y1, x2, y2 = box.bins
            assert (x2 > x1, y2 > y1) == (True, True)
    # Answers without a box would make the comparisons above empty.
    assert sum(a.coord_logits.shape[0] for a in found) > 0


def test_a_sampled_answer_does_not_depend_on_its_batch():
    model, made = noisy_model(2), grammar("tiny", ("bbox_2d",))
    together = own(model, made, 80, temperature=1.0)(prompts(), seeds=range(5))
    alone = [own(model, made, 80, temperature=1.0)([p], seeds=[i])[0] for i, p in enumerate(prompts())]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert sum(a.coord_logits.shape[0] for a in together) > 0


def test_distributions_and_log_probabilities_are_the_models_own_before_any_constraint():
    model, made, space = noisy_model(1), grammar("tiny", ("bbox_2d",)), vocab()
    for prompt, answer in zip(prompts(), own(model, made, 90)(prompts()), strict=True):
        ids = torch.tensor([prompt.input_ids + answer.token_ids])
        with torch.no_grad():
            logits = model(
                input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).long(), pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.image_grid_thw,
            ).logits[0, len(prompt.input_ids) - 1 : -1]  # fmt: skip
        places = [n for n, i in enumerate(answer.token_ids) if i in space.ids]
        torch.testing.assert_close(answer.coord_logits, logits[places, space.start : space.start + 1000], rtol=1e-3, atol=1e-3)
        for n, value in enumerate(answer.log_probs):
            if value is not None:
                assert value == pytest.approx(float(logits[n].log_softmax(-1)[answer.token_ids[n]]), abs=1e-3)


def test_what_is_forced_between_the_choices_of_an_answer_is_the_training_token():
    chat, made = template(), grammar("tiny", ("bbox_2d",))
    for record in records("train")[:4]:
        example = chat.encode(record)
        answer = [i for i, role in zip(example.input_ids, example.roles, strict=True) if role]
        follower, written = Follower(made, max_objects=100, max_tokens=1000), []
        while not follower.done:
            token = follower.forced()
            written.append(answer[len(written)] if token is None else token)
            follower.advance(written[-1])
        assert written == answer


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=20))
def test_token_spans_are_the_characters_of_the_decoded_text(text):
    tokenizer = merging_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, spans = token_spans(ids, token_bytes(tokenizer))
    assert decoded == text == tokenizer.decode(ids)
    assert [0, *(end for _, end in spans)] == [*(start for start, _ in spans), len(text)]
