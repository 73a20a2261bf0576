"""The answer format: round trip, salvage, counted problems, token roles."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.grammar import COORD_TOKEN, ROLE_CODES, Instance, parse, render, token_roles

descs = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=20).filter(lambda s: "<|" not in s)
edges = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(edges, edges).map(lambda e: (e[0][0], e[1][0], e[0][1], e[1][1]))
polys = st.integers(3, 6).flatmap(lambda n: st.tuples(*[st.integers(0, 999)] * (2 * n)))
instances = st.one_of(
    st.builds(Instance, desc=descs, bins=boxes),
    st.builds(Instance, desc=descs, bins=polys, geometry=st.just("poly")),
    st.builds(Instance, desc=descs, bins=st.tuples(st.integers(0, 999), st.integers(0, 999)), geometry=st.just("point_2d")),
)


@given(st.lists(instances, max_size=5))
def test_parse_inverts_render(items):
    parsed = parse(render(items).text, strict=True)
    assert list(parsed.instances) == items
    assert parsed.problems == {}


@given(st.lists(instances, max_size=4))
def test_spans_hold_exactly_the_coordinate_tokens_and_descriptions(items):
    rendered = render(items)
    coords = [rendered.text[s.start : s.end] for s in rendered.spans if s.role == "coord"]
    assert coords == [m.group(0) for m in COORD_TOKEN.finditer(rendered.text)]
    assert coords == [f"<|coord_{b}|>" for i in items for b in i.bins]
    written = [rendered.text[s.start : s.end] for s in rendered.spans if s.role == "desc"]
    assert [json.loads(f'"{text}"') for text in written] == [i.desc for i in items]


@given(st.lists(instances, min_size=1, max_size=4), st.data())
def test_a_cut_answer_keeps_its_whole_objects_and_says_truncated(items, data):
    text = render(items).text
    cut = data.draw(st.integers(0, len(text) - 1))
    parsed = parse(text[:cut])
    assert list(parsed.instances) == items[: len(parsed.instances)]
    assert set(parsed.problems) <= {"truncated", "no_answer", "bad_object"}
    assert parsed.problems


@given(st.text(max_size=80))
def test_parse_never_fails_on_any_text(text):
    parse(text)
    parse('{"objects": [' + text)


def test_the_older_keyed_format_is_read():
    cat = '"object_1": {"desc": "cat", "bbox_2d": ["<|coord_1|>", "<|coord_2|>", "<|coord_3|>", "<|coord_4|>"]}'
    text = "{" + cat + ', "object_2": {"desc": "dog", "point_2d": ["<|coord_7|>", "<|coord_8|>"]}}'
    parsed = parse(text, strict=True)
    assert parsed.instances == (Instance("cat", (1, 2, 3, 4)), Instance("dog", (7, 8), "point_2d"))
    assert parsed.coord_index == ((0, 1, 2, 3), (4, 5))


def test_problems_are_counted_by_reason_and_the_rest_is_salvaged():
    good = '{"desc": "b", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}'
    arity = '{"desc": "a", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>]}'
    reversed_box = '{"desc": "c", "bbox_2d": [<|coord_5|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}'
    outside = '{"desc": "d", "point_2d": [<|coord_1000|>, <|coord_2|>]}'
    broken = '{"desc": "e" "bbox_2d": [<|coord_1|>]}'
    text = '{"objects": [' + ", ".join([arity, good, reversed_box, outside, broken, good]) + "]} and more"
    parsed = parse(text)
    assert [i.desc for i in parsed.instances] == ["b", "b"]
    assert parsed.problems == {"bad_arity": 1, "degenerate_box": 1, "bin_out_of_range": 1, "bad_object": 1, "trailing_text": 1}
    assert parsed.coord_index == ((3, 4, 5, 6), (14, 15, 16, 17))
    with pytest.raises(ValueError, match="bad_arity"):
        parse(text, strict=True)


@pytest.mark.parametrize(
    ("text", "problems"),
    [('{"objects": []}', {}), ("{}", {}), ("I see a cat.", {"no_answer": 1}), ("", {"no_answer": 1})],
)
def test_empty_answers(text, problems):
    assert parse(text).problems == problems


def test_render_refuses_a_wrong_number_of_values():
    for geometry, bins in (("bbox_2d", (1, 2, 3)), ("point_2d", (1,)), ("poly", (1, 2, 3, 4)), ("poly", (1, 2, 3, 4, 5, 6, 7))):
        with pytest.raises(ValueError, match="expects"):
            render([Instance("x", bins, geometry)])


def test_a_token_across_a_boundary_is_format():
    rendered = render([Instance("red", (1, 2), "point_2d")])
    start = rendered.text.index("red")
    first = rendered.text.index("<|coord_1|>")
    offsets = [(start - 1, start + 1), (start + 1, start + 3), (start + 3, first), (first, first + len("<|coord_1|>"))]
    roles, slots = token_roles(offsets, rendered.spans)
    assert roles == [ROLE_CODES[r] for r in ("format", "desc", "format", "coord")]
    assert slots == [None, None, None, (0, 0)]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ('{"objects": [{"desc": "cat", "bbox_2d": [1, 2, 30, 40]}]}', {"bad_object": 1}),
        ('{"objects": [{"desc": "cat", "bbox_2d": [1, 2, 30, 40]} ] }\n', {"bad_object": 1}),
        ('{"object_1": {"desc": "cat", "bbox_2d": [1, 2, 30, 40]}}', {"bad_object": 1}),
        ('{"objects": [{"desc": "cat", "bbox_2d": [1, 2, 30, 40]}]', {"bad_object": 1, "truncated": 1}),
        ('{"objects": [{"desc": "cat", "bbox_2d": [1, 2, 30', {"bad_object": 1, "truncated": 1}),
    ],
)
def test_a_whole_answer_with_a_bad_object_is_not_truncated(text, problems):
    assert parse(text).problems == problems
