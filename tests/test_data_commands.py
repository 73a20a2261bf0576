"""``data validate``, ``data stats`` and ``data render``: every fault at once, ceilings against brute force, pictures."""

from __future__ import annotations

import itertools
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from command import call
from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.drawing import class_color, paint
from coordexp.data.records import RecordObject, check_records, read_records
from coordexp.data.stats import ceiling_iou, label_iou
from tiny import workspace

BOX = {"desc": "cat", "bbox_2d": [4, 5, 20, 30]}


def row(**changes):
    return {"images": ["a.png"], "width": 40, "height": 32, "objects": [BOX], **changes}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 32), "white").save(tmp_path / "a.png")
    return tmp_path


def write(folder, *rows):
    path = folder / "d.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_validate_prints_every_fault_of_every_record(folder, monkeypatch, capsys):
    bad = [{"desc": "", "bbox_2d": [9, 5, 4, 30], "x": 1}, {"desc": "a", "poly": [1, None, 2, "b", 3, 4]}, BOX]
    path = write(
        folder, row(width=0, objects=bad, images=["../a.png"], colour=1), row(), "{", row(image_id="a"), row(height=33, image_id="b")
    )
    code, out, err = call(monkeypatch, capsys, "data", "validate", path)
    assert (code, out) == (2, "")
    assert [line.removeprefix(f"error: {path}:").split(": expected")[0] for line in err.splitlines()] == [
        "1: colour", "1: width", "1: objects[0].x", "1: objects[0].desc", "1: objects[0].bbox_2d", "1: objects[1].poly[1]",
        "1: objects[1].poly[3]", "1: images[0]", "3", "4: image_id", "5: images[0]",
    ]  # fmt: skip
    code, out, _ = call(monkeypatch, capsys, "data", "validate", path, "--json")
    assert code == 2
    assert len(json.loads(out)["faults"]) == 11
    assert json.loads(out)["records"] == 1


def test_validate_mentions_rotated_images(folder, monkeypatch, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (40, 32)).save(folder / "a.png", exif=exif)
    code, out, _ = call(monkeypatch, capsys, "data", "validate", write(folder, row()))
    assert code == 0
    assert out.startswith("note: 1 images have an EXIF rotation")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["a.png", ".", "..", "/", "\0"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
thing = st.fixed_dictionaries(
    {}, optional={k: anything | st.lists(st.floats(0, 40), max_size=8) for k in ("bbox_2d", "poly", "point_2d", "desc", "iscrowd", "odd")}
)
fuzzed = st.fixed_dictionaries(
    {"images": st.just(["a.png"]) | anything, "width": st.just(40) | anything, "height": st.just(32) | anything},
    optional={"objects": st.lists(thing, max_size=3) | anything, "metadata": anything, "image_id": anything, "x\n": anything},
)
FUZZ = int(os.environ.get("COORDEXP_FUZZ", "300"))


@given(st.lists(fuzzed | st.text(max_size=30) | anything, min_size=1, max_size=3))
@settings(max_examples=FUZZ, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_content_makes_the_validator_fail_or_break_a_line(folder, rows):
    path = folder / "fuzz.jsonl"
    path.write_bytes(
        b"".join((r if isinstance(r, str) else json.dumps(r)).encode("utf-8", "surrogatepass") + b"\n" for r in [row(), *rows])
    )
    check = check_records(path)
    assert check.records >= 1
    assert all(line.startswith(f"{path}:") and len(line.splitlines()) == 1 for line in check.faults)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_ceiling_is_what_a_search_over_the_whole_neighbourhood_finds(convention):
    codec = CoordCodec(CONVENTIONS[convention].bins, convention)
    rng = np.random.default_rng(1)
    boxes, sides = [], []
    for _ in range(40):
        width, height = rng.integers(50, 5000, 2)
        low, size = rng.uniform(0, 0.9, 2), rng.uniform(0.0003, 0.02, 2)
        edges = np.minimum(np.concatenate([low, low + size]), 1) * [width, height, width, height]
        boxes.append(edges)
        sides.append([width, height, width, height])
    found = ceiling_iou(np.array(boxes), np.array(sides, dtype=float), codec)
    labels = label_iou(np.array(boxes), np.array(sides, dtype=float), codec)
    for box, side, value, label in zip(boxes, sides, found, labels, strict=True):
        around = [range(max(0, int(b) - 2), min(codec.num_bins, int(b) + 4)) for b in np.array(box) / side * codec.scale]
        best = 0.0
        for bins in itertools.product(*around):
            x1, y1, x2, y2 = (b / codec.scale * s for b, s in zip(bins, side, strict=True))
            overlap = max(min(x2, box[2]) - max(x1, box[0]), 0) * max(min(y2, box[3]) - max(y1, box[1]), 0)
            union = max(x2 - x1, 0) * max(y2 - y1, 0) + (box[2] - box[0]) * (box[3] - box[1]) - overlap
            best = max(best, overlap / union)
        assert value == pytest.approx(best)
        assert label <= value + 1e-12


def test_stats_count_what_is_there(folder, monkeypatch, capsys):
    crowd = {"desc": "cats", "bbox_2d": [0, 0, 40, 32], "iscrowd": True}
    point = {"desc": "tip", "point_2d": [1, 1]}
    path = write(folder, row(objects=[BOX, crowd, point]), row(objects=[]))
    code, out, err = call(monkeypatch, capsys, "data", "stats", path, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert {k: found[k] for k in ("images", "images_without_objects", "objects", "crowd_regions")} == {
        "images": 2, "images_without_objects": 1, "objects": 2, "crowd_regions": 1
    }  # fmt: skip
    assert (found["geometries"], found["classes"]) == ({"bbox_2d": 1, "point_2d": 1}, {"cat": 1, "tip": 1})
    assert (found["box_width"]["max"], found["objects_per_image"]["mean"]) == (16, 1)
    assert (found["quantisation"]["small"]["boxes"], found["quantisation"]["large"]["ceiling_iou"]) == (1, None)
    assert "tokens" not in found
    code, out, _ = call(monkeypatch, capsys, "data", "stats", path, "--tokenizer", workspace() / "model", "--json")
    # Six coordinates, and at least a token for each of the two descriptions.
    assert json.loads(out)["tokens"]["max"] >= 8
    code, out, err = call(monkeypatch, capsys, "data", "stats", path, "--tokenizer", workspace() / "tiny")
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, _ = call(monkeypatch, capsys, "data", "stats", path)
    assert code == 0
    assert "best reachable mean IoU" in out


def test_painted_outlines_lie_on_the_edges_and_colours_belong_to_classes():
    objects = [RecordObject("a", "bbox_2d", (40, 40, 160, 160)), RecordObject("b", "point_2d", (180, 20))]
    picture = np.asarray(paint(Image.new("RGB", (200, 200), "black"), objects))
    scale = 4
    assert picture.shape == (800, 800, 3)
    for x, y in ((160, 100), (40, 100), (100, 160)):
        assert tuple(picture[y * scale, x * scale]) == class_color("a")
    assert tuple(picture[20 * scale, 180 * scale]) == class_color("b")
    assert tuple(picture[100 * scale, 100 * scale]) == (0, 0, 0)
    assert len({class_color(name) for name in ("RBC", "WBC", "Platelets", "cat", "dog")}) == 5


def test_render_writes_pictures_answers_and_a_page_or_nothing(folder, monkeypatch, capsys):
    objects = [BOX, {"desc": "<b>&", "poly": [1, 1, 30, 2, 20, 31]}, {"desc": "猫", "point_2d": [40, 32]}]
    path = write(folder, row(objects=objects), row(objects=[]))
    code, _, err = call(monkeypatch, capsys, "data", "render", path, "--out", folder / "r")
    assert (code, err) == (0, "")
    assert sorted(os.listdir(folder / "r")) == ["0001.png", "0001.txt", "0002.png", "0002.txt", "index.html"]
    answer = (folder / "r/0001.txt").read_text()
    page = (folder / "r/index.html").read_text()
    assert answer.startswith('{"objects": [{"desc": "<b>&", "poly": [<|coord_25|>, <|coord_31|>')
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert (folder / "r/0002.txt").read_text() == '{"objects": []}\n'
    row_of = {"image_id": "nowhere", "width": 9, "height": 9, "score_source": None, "objects": [{"desc": "<i>", "bbox_2d": [1, 1, 20, 20]}]}
    record = read_records(path).records[0]
    (folder / "p.jsonl").write_text(
        json.dumps(row_of | {"image_id": record.image_id, "width": record.width, "height": record.height}) + "\n"
    )
    code, _, err = call(monkeypatch, capsys, "data", "render", path, "--out", folder / "both", "--predictions", folder / "p.jsonl")
    assert (code, err) == (0, "")
    page = (folder / "both/index.html").read_text()
    assert ("1 predicted" in page, "0 predicted" in page, ">A</b>&lt;i&gt;: bbox_2d 1, 1, 20, 20" in page) == (True, True, True)
    assert (folder / "both/0001.png").read_bytes() != (folder / "r/0001.png").read_bytes()
    assert (folder / "both/0002.png").read_bytes() == (folder / "r/0002.png").read_bytes()
    (folder / "p.jsonl").write_text(json.dumps(row_of) + "\n")
    code, _, err = call(monkeypatch, capsys, "data", "render", path, "--out", folder / "other", "--predictions", folder / "p.jsonl")
    assert (code, err.count("\n"), "expected predictions of the records" in err) == (2, 1, True)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:50])
    code, _, err = call(monkeypatch, capsys, "data", "render", path, "--out", folder / "again")
    assert (code, err.count("\n")) == (2, 1)
    assert not (folder / "again").exists()
