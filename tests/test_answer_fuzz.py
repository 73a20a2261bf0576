"""Mutated answers: the parser neither fails nor reports a box that is not written in the text."""

from __future__ import annotations

import itertools
import random
import re

from coordexp.grammar import COORD_TOKEN, Instance, parse, render

COUNT = 10_000
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
