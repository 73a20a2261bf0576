"""Records to answer text and tokens and back to pixels: boxes, polygons, points, crowds; and real annotations whole."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.boxes import polygon_order
from coordexp.codec import CoordCodec
from coordexp.data.answers import instance_pixels, record_instances
from coordexp.data.importers.formats import import_data
from coordexp.data.records import Record, RecordObject, read_records
from coordexp.grammar import parse, render
from tiny import template

BCCD = Path(__file__).parents[1].parent / "shared" / "data" / "bccd"
CODEC = CoordCodec()
corner = st.integers(0, 6).map(float)
polygons = st.lists(st.tuples(corner, corner), min_size=3, max_size=8)


def record(*objects, width=640, height=480):
    return Record(Path("a.png"), width, height, tuple(objects), "a", {}, "x.jsonl:1")


def through_tokens(found: Record):
    """Instances after rendering, tokenising, decoding and parsing."""
    chat = template()
    grid = torch.tensor([[1, 2, 2]])
    instances, _ = record_instances(found, CODEC)
    encoded = chat.encode_answer(chat.prompt, instances, grid)
    ids = [token for token, role in zip(encoded["input_ids"], encoded["roles"], strict=True) if role]
    text = chat.tokenizer.decode(ids, skip_special_tokens=False).removesuffix(chat.tokenizer.eos_token)
    return instances, parse(text, strict=True).instances, encoded


@given(polygons, st.integers(0, 7), st.booleans())
def test_a_polygon_is_written_the_same_whatever_its_start_and_direction_and_its_walk_is_kept(points, turn, reverse):
    def canonical(corners):
        return [corners[i] for i in polygon_order([v for corner in corners for v in corner])]

    written = canonical(points)
    other = points[turn % len(points) :] + points[: turn % len(points)]
    assert canonical(other[::-1] if reverse else other) == written
    rotations = [points[i:] + points[:i] for i in range(len(points))]
    assert written in rotations or written in [walk[::-1] for walk in rotations]
    assert (written[0][1], written[0][0]) == min((y, x) for x, y in points)
    ends = written[1:] + written[:1]
    assert sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(written, ends, strict=True)) >= 0


def test_a_square_starts_at_the_top_left_and_runs_clockwise_on_the_screen():
    square = [(9.0, 9.0), (9.0, 1.0), (1.0, 1.0), (1.0, 9.0)]
    assert [square[i] for i in polygon_order([v for p in square for v in p])] == [(1, 1), (9, 1), (9, 9), (1, 9)]


values = st.integers(0, 999)


@settings(max_examples=40)
@given(st.lists(st.tuples(values, values), min_size=3, max_size=12), st.tuples(values, values), st.integers(0, 2**31))
def test_polygons_and_points_come_back_within_half_a_bin_through_the_tokens(corners, point, seed):
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(300, 3000, 2))
    flat = [float(v) / 999 * (width, height)[i % 2] for i, v in enumerate(v for c in corners for v in c)]
    here = (point[0] / 999 * width, point[1] / 999 * height)
    objects = (RecordObject("leaf", "poly", tuple(flat)), RecordObject("tip", "point_2d", here))
    instances, parsed, encoded = through_tokens(record(*objects, width=width, height=height))
    assert list(parsed) == [dataclasses.replace(i, centers=(), extents=()) for i in instances]
    by_name = {i.desc: instance_pixels(i, CODEC, width, height) for i in parsed}
    order = polygon_order(flat)
    sides = np.array([width, height])
    walked = np.array(flat).reshape(-1, 2)[list(order)]
    assert (np.abs(np.array(by_name["leaf"]).reshape(-1, 2) - walked) <= sides / 999 / 2 + 1e-9).all()
    assert (np.abs(np.array(by_name["tip"]) - here) <= sides / 999 / 2 + 1e-9).all()
    # One centre and one extent a coordinate token, in the order of the text; a point has no extent.
    centers = [c for c in encoded["centers"] if c == c]
    assert centers == [c for i in instances for c in i.centers]
    assert next(i for i in instances if i.desc == "tip").extents == (0, 0)


def test_a_crowd_is_no_training_target():
    crowd = RecordObject("people", "bbox_2d", (0, 0, 640, 480), crowd=True)
    single = RecordObject("person", "bbox_2d", (10, 10, 60, 200))
    assert [i.desc for i in record_instances(record(crowd, single), CODEC)[0]] == ["person"]


def test_every_real_box_comes_back_within_half_a_bin(tmp_path):
    if not BCCD.is_dir():
        pytest.skip(f"the blood cell images are not at {BCCD}")
    report = import_data("voc", BCCD, tmp_path / "out")
    assert (report.objects, len(report.dropped)) == (4886, 2)
    assert sorted(line.split(":")[0] for line in report.dropped) == ["BloodImage_00338.xml", "BloodImage_00343.xml"]
    seen = 0
    for split in report.splits:
        for number, found in enumerate(read_records(tmp_path / "out" / f"{split}.jsonl", check_images=False).records):
            instances, _ = record_instances(found, CODEC)
            # All through the text; every tenth through the tokenizer as well, which takes longer.
            parsed = through_tokens(found)[1] if number % 10 == 0 else parse(render(instances).text, strict=True).instances
            truth = sorted((o for o in found.objects), key=lambda o: (o.values[1], o.values[0]))
            assert [i.desc for i in parsed] == [o.desc for o in truth]
            read = np.array([instance_pixels(i, CODEC, found.width, found.height) for i in parsed])
            error = np.abs(read - np.array([o.values for o in truth])) / np.array([found.width, found.height] * 2) * 999
            assert error.max() <= 0.5 + 1e-9
            seen += len(parsed)
    assert seen == 4886


def test_reserved_tokens_in_a_description_are_refused_by_line():
    with pytest.raises(Exception, match=re.escape("x.jsonl:1: desc: expected plain text, got 'a <|coord_1|>'")):
        record_instances(record(RecordObject("a <|coord_1|>", "point_2d", (1, 1))), CODEC)
