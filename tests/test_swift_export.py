"""``data export swift``: what ms-swift reads back is what the records say, and nothing in it means something else to ms-swift."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from command import call
from coordexp.codec import CoordCodec
from coordexp.data.answers import record_instances
from coordexp.data.images import load_image
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import read_records
from coordexp.data.swift_rows import PLACEHOLDERS, SwiftExportOptions, export_swift
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import parse
from tiny import workspace

BOX = {"desc": "cat", "bbox_2d": [4.125, 5, 20.3, 30]}


def record_file(folder, name, *rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(image="a.png", **changes):
    return {"images": [image], "width": 40, "height": 32, "objects": [BOX], **changes}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 32), "white").save(tmp_path / "a.png")
    return tmp_path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_exported_rows_come_back_through_the_importer_as_the_same_records(tmp_path):
    source = workspace() / "data"
    export_swift([source / "train.jsonl", source / "val.jsonl"], tmp_path / "swift", SwiftExportOptions())
    import_data("swift", tmp_path / "swift", tmp_path / "back", ImportOptions(images=source))
    for split in ("train", "val"):
        before, after = (read_records(path / f"{split}.jsonl").records for path in (source, tmp_path / "back"))
        assert len(before) == len(after) > 0
        for a, b in zip(before, after, strict=True):
            assert (a.width, a.height, a.image) == (b.width, b.height, b.image.resolve())
            # The export writes them in the order of the answer.
            assert sorted((o.desc, o.values) for o in a.objects) == sorted((o.desc, o.values) for o in b.objects)


@pytest.mark.parametrize(("order", "convention"), [("sorted", "norm999"), ("random", "norm999"), ("sorted", "norm1000")])
def test_the_answer_is_that_of_training_and_its_numbers_stand_in_its_order(tmp_path, order, convention):
    source = workspace() / "data" / "train.jsonl"
    export_swift([source], tmp_path / "out", SwiftExportOptions(order=order, convention=convention, prompt="Point.", seed=3))
    codec = CoordCodec({"norm999": 1000, "norm1000": 1001}[convention], convention)
    for record, written in zip(read_records(source).records, rows_of(tmp_path / "out" / "train.jsonl"), strict=True):
        user, assistant = written["messages"]
        assert user == {"role": "user", "content": "<image>Point."}
        expected, _ = record_instances(record, codec, order=order, seed=3)
        assert list(parse(assistant["content"], strict=True, num_bins=codec.num_bins).instances) == expected
        assert written["objects"]["ref"] == [instance.desc for instance in expected]
        for box, instance in zip(written["objects"]["bbox"], expected, strict=True):
            sides = (record.width, record.height) * 2
            assert [codec.to_bin(v, s) for v, s in zip(box, sides, strict=True)] == list(instance.centers)
        assert written["images"] == [str(record.image)]


def test_polygons_are_written_as_vertices_points_as_points_and_crowds_not_at_all(folder):
    objects = [
        {"desc": "leaf", "poly": [10, 20, 30, 4, 36, 24]},
        {"desc": "eye", "point_2d": [7, 30.5]},
        {**BOX, "iscrowd": True},
        {"desc": "thin", "bbox_2d": [1, 31.5, 1.01, 32]},
    ]
    done = export_swift([record_file(folder, "d", row(objects=objects))], folder / "out", SwiftExportOptions())
    (written,) = rows_of(folder / "out" / "d.jsonl")
    # Sorted by (y1, x1); the polygon from its topmost vertex, clockwise.
    assert written["objects"]["bbox"] == [[30, 4], [36, 24], [10, 20], [7, 30.5], [1, 31.5, 1.01, 32]]
    assert written["objects"]["ref"] == ["leaf"] * 3 + ["eye", "thin"]
    assert (done.objects, done.crowd, done.adjusted) == (3, 1, 1)


@pytest.mark.parametrize("how", ["turned", "transparent", "16 bits"])
def test_images_that_ms_swift_would_read_otherwise_are_written_anew(folder, how):
    if how == "turned":
        exif = Image.Exif()
        exif[0x0112] = 3
        picture = Image.new("RGB", (40, 32))
        picture.putpixel((0, 0), (255, 0, 0))
        picture.save(folder / "a.png", exif=exif)
    elif how == "transparent":
        Image.new("RGBA", (40, 32), (0, 0, 0, 0)).save(folder / "a.png")
    else:
        Image.new("I;16", (40, 32), 40_000).save(folder / "a.png")
    done = export_swift([record_file(folder, "d", row())], folder / "out", SwiftExportOptions())
    (written,) = rows_of(folder / "out" / "d.jsonl")
    assert done.copied == 1
    # What ms-swift does with a file.
    with Image.open(written["images"][0]) as image:
        assert image.convert("RGB").tobytes() == load_image(folder / "a.png").tobytes()


@pytest.mark.parametrize("token", PLACEHOLDERS)
def test_what_ms_swift_would_replace_is_refused_in_descriptions_and_prompts(folder, token):
    path = record_file(folder, "d", row(objects=[{**BOX, "desc": f"a {token} b"}]))
    with pytest.raises(DataError, match=f"d.jsonl:1: desc: .*{token}"):
        export_swift([path], folder / "out", SwiftExportOptions())
    assert not (folder / "out").exists()
    with pytest.raises(ConfigError, match="--prompt"):
        SwiftExportOptions(prompt=f"{token}Where?")


def test_the_command_says_what_it_wrote_and_mistakes_are_one_line_each(folder, monkeypatch, capsys):
    path = record_file(folder, "d", row(objects=[BOX, {**BOX, "iscrowd": True}]), row(objects=[], image_id="b"))
    code, out, err = call(monkeypatch, capsys, "data", "export", "swift", path, "--out", folder / "out")
    assert (code, err) == (0, "")
    assert out == f"2 d rows, 1 objects written to {folder / 'out'}; 1 crowd regions or difficult objects left out\n"
    other = folder / "other"
    other.mkdir()
    for arguments, said in (
        ((path, "--out", folder / "out"), "is not empty"),
        ((path, "--out", folder / "o", "--convention", "norm99"), "--convention: expected one of norm999"),
        ((path, "--out", folder / "o", "--geometry", "mask"), "--geometry: expected one of recorded, bbox_2d, point_2d, got mask"),
        ((path, "--out", folder / "o", "--copy"), "--copy: expected none for swift"),
        ((path, "--out", folder / "o", "--order", "up"), "--order: expected sorted or random, got up"),
        ((path, path, "--out", folder / "o"), "d.jsonl twice"),
        ((folder / "none.jsonl", "--out", folder / "o"), "expected a file of records"),
    ):
        code, out, err = call(monkeypatch, capsys, "data", "export", "swift", *arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert err.count("\n") == 1
    assert not (folder / "o").exists()
    code, _, err = call(monkeypatch, capsys, "data", "export", "coco", path, "--out", folder / "o", "--seed", 1)
    assert (code, err) == (2, "error: --seed: expected none for coco: only swift writes questions and answers\n")
    assert not (folder / "o").exists()


def test_the_earlier_name_writes_the_same_and_says_the_new_one(folder, monkeypatch, capsys):
    path = record_file(folder, "d", row(objects=[BOX, {**BOX, "desc": "other"}]))
    words = (path, "--order", "random", "--seed", 3, "--prompt", "Where?")
    _, new, _ = call(monkeypatch, capsys, "data", "export", "swift", *words, "--out", folder / "new")
    code, old, err = call(monkeypatch, capsys, "data", "export-swift", *words, "--out", folder / "old")
    assert (code, err) == (0, "note: data export-swift is now data export swift\n")
    assert old == new.replace(str(folder / "new"), str(folder / "old"))
    assert (folder / "old/d.jsonl").read_bytes() == (folder / "new/d.jsonl").read_bytes()
