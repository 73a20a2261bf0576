"""Record files: what is read, what is refused and how it is said, and that writes are all or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from coordexp.data.records import open_image, read_records, verify_images, write_records
from coordexp.errors import ConfigError, DataError

BOX = {"desc": "small red circle", "bbox_2d": [4, 5, 20, 30]}


def row(**changes):
    return {"images": ["img/a.png"], "width": 40, "height": 32, "objects": [BOX], **changes}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "img").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / "img" / f"{name}.png")
    return tmp_path


def write(folder: Path, *lines) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_records_are_read_as_written(folder):
    poly = {"desc": "leaf", "poly": [0, 0, 40, 0, 40, 32.0]}
    point = {"desc": "tip", "point_2d": [40, 32]}
    path = write(folder, row(objects=[BOX, poly, point], image_id="x", metadata={"k": [1, None]}), row(objects=[]))
    first, second = read_records(path).records
    assert [(o.desc, o.geometry, o.values) for o in first.objects] == [
        ("small red circle", "bbox_2d", (4.0, 5.0, 20.0, 30.0)),
        ("leaf", "poly", (0.0, 0.0, 40.0, 0.0, 40.0, 32.0)),
        ("tip", "point_2d", (40.0, 32.0)),
    ]
    assert (first.image, first.width, first.height) == ((folder / "img/a.png").resolve(), 40, 32)
    assert (first.image_id, first.metadata, first.source) == ("x", {"k": [1, None]}, f"{path}:1")
    assert (second.objects, second.metadata) == ((), {})


def test_a_missing_image_id_is_the_stem_made_unique_in_file_order(folder):
    path = write(folder, row(), row(), row(images=["img/b.png"]), row(image_id="c"), row())
    assert [r.image_id for r in read_records(path).records] == ["a", "a-2", "b", "c", "a-3"]
    assert [r.image_id for r in read_records(path, limit=2).records] == ["a", "a-2"]


def test_image_ids_do_not_depend_on_whether_images_are_checked(folder):
    Image.new("RGB", (9, 9)).save(folder / "img" / "c.png")
    path = write(folder, row(images=["img/c.png"], image_id="a"), row())
    assert read_records(path, on_invalid="skip").records[0].image_id == read_records(path, check_images=False).records[1].image_id == "a-2"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(objects=[{"desc": "a", "bbox_2d": [9, 5, 4, 30]}]), "objects[0].bbox_2d: expected x2 > x1 and y2 > y1, got [9, 5, 4, 30]"),
        (row(objects=[{"desc": "a", "bbox_2d": [4, 5, 4, 30]}]), "objects[0].bbox_2d: expected x2 > x1 and y2 > y1"),
        (row(objects=[BOX, {"desc": "a", "bbox_2d": [4, 5, 41, 30]}]), "objects[1].bbox_2d: expected a box inside the 40x32 image"),
        (row(objects=[{"desc": "a", "bbox_2d": [4, 5, 6]}]), "objects[0].bbox_2d: expected 4 numbers"),
        (row(objects=[{"desc": "a", "bbox_2d": [4, float("nan"), 6, 7]}]), "objects[0].bbox_2d[1]: expected a finite number, got NaN"),
        (row(objects=[{"desc": "a", "bbox_2d": [4, 5, float("inf"), 7]}]), "objects[0].bbox_2d[2]: expected a finite number, got Infinity"),
        (row(objects=[{"desc": "a", "bbox_2d": [4, 5, 10**400, 7]}]), "objects[0].bbox_2d[2]: expected a finite number"),
        (row(objects=[{"desc": "a", "bbox_2d": [False, 5, True, 7]}]), "objects[0].bbox_2d[0]: expected a finite number, got false"),
        (row(objects=[{"desc": "a", "bbox_2d": ["4", 5, 6, 7]}]), 'objects[0].bbox_2d[0]: expected a finite number, got "4"'),
        (row(objects=[{"desc": "a", "bbox_2d": {"x": 1}}]), "objects[0].bbox_2d: expected a list of numbers"),
        (row(objects=[{"desc": "a"}]), "objects[0]: expected exactly one of bbox_2d, poly, point_2d, got none"),
        (row(objects=[{**BOX, "point_2d": [1, 2]}]), "exactly one of bbox_2d, poly, point_2d, got bbox_2d and point_2d"),
        (row(objects=[{"desc": " ", "bbox_2d": [4, 5, 6, 7]}]), "objects[0].desc: expected a non-empty string"),
        (row(objects=[{"bbox_2d": [4, 5, 6, 7]}]), "objects[0].desc: expected a non-empty string, got null"),
        (row(objects=[{"desc": "\ud800", "bbox_2d": [4, 5, 6, 7]}]), "objects[0].desc: expected valid Unicode"),
        (row(objects=[{"desc": "a", "bbox": [4, 5, 6, 7]}]), "objects[0].bbox: expected one of the keys desc, bbox_2d, poly, "),
        (row(objects=[{"desc": "a", "bbox": [4, 5, 6, 7]}]), "did you mean 'bbox_2d'?"),
        (row(objects=[{"desc": "a", "poly": [1, 1, 9, 9]}]), "objects[0].poly: expected at least 3 points"),
        (row(objects=[{"desc": "a", "poly": [1, 1, 9, 9, 3, 4, 5]}]), "objects[0].poly: expected at least 3 points"),
        (row(objects=[{"desc": "a", "poly": [1, 1, 9, 1, 5, 1]}]), "objects[0].poly: expected a polygon that extends in x and in y"),
        (row(objects=[{"desc": "a", "poly": [1, 1, 9, 1, 5, 33]}]), "objects[0].poly: expected points inside the 40x32 image"),
        (row(objects=[{"desc": "a", "point_2d": [1]}]), "objects[0].point_2d: expected 2 numbers"),
        (row(objects=[{"desc": "a", "point_2d": [-1, 2]}]), "objects[0].point_2d: expected points inside"),
        (row(objects=["a"]), "objects[0]: expected an object"),
        (row(objects={}), "objects: expected a list, got {}"),
        (row(objects=[{**BOX, "iscrowd": 1}]), "objects[0].iscrowd: expected true or false, got 1"),
        (row(objects=[{"desc": "a", "point_2d": [1, 2], "iscrowd": True}]), "objects[0].iscrowd: expected a crowd to cover a region"),
        (row(width=True), "width: expected a positive whole number of pixels, at most 1000000, got true"),
        (row(width=40.0), "width: expected a positive whole number"),
        (row(height=0), "height: expected a positive whole number"),
        (row(width=10**400), "width: expected a positive whole number"),
        (row(width=41), "images[0]: expected an image of the record's 41x32 pixels, got 40x32"),
        (row(width=32, height=40), "width and height are swapped"),
        (row(images=[]), "images: expected a list of one path"),
        (row(images="img/a.png"), "images: expected a list of one path"),
        (row(images=["img/a.png", "img/b.png"]), "images: expected a list of one path"),
        (row(images=[3]), "images[0]: expected a non-empty string, got 3"),
        (row(images=["img/none.png"]), "images[0]: expected an image file, got nothing at"),
        (row(images=["train.jsonl"]), "images[0]: expected an image file, got something else at"),
        (row(images=["img"]), "images[0]: expected a whole image"),
        (row(images=["../a.png"]), "images[0]: expected a path inside the folder of the record file"),
        (row(images=["img/../../a.png"]), "images[0]: expected a path inside"),
        (row(images=["/etc/hostname"]), "images[0]: expected a path inside"),
        (row(images=["."]), "images[0]: expected a path inside"),
        (row(images=["a\0b.png"]), "images[0]: expected a path inside"),
        (row(images=["a" * 5000]), "images[0]: expected a"),
        (row(image_id=7), "image_id: expected a non-empty string, got 7"),
        (row(metadata=[]), "metadata: expected an object, got []"),
        (row(metadata={"a": [float("-inf")]}), "metadata.a[0]: expected a finite number, got -Infinity"),
        (row(metadata=json.loads('{"a":' * 200 + "1" + "}" * 200)), "expected at most 50 levels of nesting"),
        (row(image="img/a.png"), "image: expected one of the keys images, width, height, objects, image_id, metadata"),
        (row(image="img/a.png"), "did you mean 'images'?"),
        ({k: v for k, v in row().items() if k != "height"}, "height: expected this key, got none"),
        ([1], "expected one JSON object, got [1]"),
        ('{"images": ', "expected one JSON object, got a line that fails with"),
        ("[" * 200_000, "expected one JSON object, got a line that fails with"),
        ('{"width": 1, "width": 2}', "width: expected the key once in its object, got it 2 times"),
    ],
)  # fmt: skip
def test_a_bad_record_is_refused_with_file_line_and_field(folder, bad, message):
    path = write(folder, row(), row(image_id="second"), bad)
    said = refusal(path)
    assert said.startswith(f"{path}:3: ")
    assert message in said
    file = read_records(path, on_invalid="skip")
    assert [r.image_id for r in file.records] == ["a", "second"]
    assert file.skipped == (said,)


def test_a_duplicate_image_id_names_both_lines(folder):
    path = write(folder, row(), row(image_id="a"))
    assert f"train.jsonl:2: image_id: expected one record per id, got 'a' again (first at {path}:1)" in refusal(path)


def test_a_link_out_of_the_data_folder_is_an_escape(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "c.png"
    Image.new("RGB", (40, 32)).save(outside)
    (folder / "img" / "c.png").symlink_to(outside)
    assert "images[0]: expected a path inside" in refusal(write(folder, row(images=["img/c.png"])))


def test_files_without_records_are_refused(folder):
    assert "got an empty file" in refusal(write(folder))
    assert "got an empty file" in refusal(write(folder, "", "  "))
    assert "got nothing there" in refusal(folder / "none.jsonl")
    assert "got a folder" in refusal(folder)


def test_line_numbers_count_blank_lines_and_a_byte_order_mark_is_no_error(folder):
    path = write(folder, "\ufeff" + json.dumps(row()), "", row(width=0))
    assert ":3: width" in refusal(path)


def test_bytes_that_are_not_utf8_are_blamed_on_their_line(folder):
    path = folder / "train.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + b'{"images": ["\xff"]}\n')
    assert ":2: expected UTF-8 text, got byte 0xff at column 14" in refusal(path)


def test_unchecked_images_may_be_missing(folder):
    path = write(folder, row(images=["img/none.png"]))
    assert read_records(path, check_images=False).records[0].image == (folder / "img/none.png").resolve()


@pytest.mark.parametrize(("options", "message"), [({"limit": 0}, "limit"), ({"on_invalid": "warn"}, "on_invalid")])
def test_impossible_options_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        read_records(write(folder, row()), **options)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "RGB"])
def test_open_image_gives_rgb_pixels_of_any_8_bit_image(folder, mode):
    image = Image.new("RGB", (40, 32), (255, 255, 255)).convert(mode)
    image.save(folder / "img" / "a.png")
    opened = open_image(read_records(write(folder, row())).records[0])
    assert (opened.mode, opened.size) == ("RGB", (40, 32))
    np.testing.assert_array_equal(np.asarray(opened), 255)


def test_verify_images_lists_every_damaged_image_and_reading_headers_does_not_notice(folder):
    rng = np.random.default_rng(0)
    for name in ("b", "c"):
        pixels = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img" / f"{name}.png")
        data = (folder / "img" / f"{name}.png").read_bytes()
        (folder / "img" / f"{name}.png").write_bytes(data[: len(data) // 2])
    records = read_records(write(folder, row(), row(images=["img/b.png"]), row(images=["img/c.png"]))).records
    verify_images(records[:1])
    with pytest.raises(DataError) as caught:
        verify_images(records)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [records[1].source, records[2].source]
    assert all("expected a whole image" in line for line in lines)


def test_written_rows_read_back_and_parents_are_made(folder):
    path = folder / "new" / "train.jsonl"
    write_records(path, [{"a": "ü\u2028"}, {"b": [1.5]}])
    assert [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] == [{"a": "ü\u2028"}, {"b": [1.5]}]
    assert os.listdir(path.parent) == ["train.jsonl"]


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, bad):
    path = tmp_path / "train.jsonl"
    write_records(path, [{"a": 1}])
    with pytest.raises(DataError, match=r"train.jsonl:2: expected values that JSON can hold"):
        write_records(path, [{"a": 2}, bad])
    assert path.read_text() == '{"a": 1}\n'
    assert os.listdir(tmp_path) == ["train.jsonl"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["images", "width", "height", "objects", "image_id", "metadata", "x"]), json_values), st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused_in_one_line(folder, changes, data):
    candidate = {**row(), **changes} if data.draw(st.booleans()) else changes
    path = write(folder, candidate)
    file = read_records(path, on_invalid="skip")
    assert len(file.records) + len(file.skipped) == 1
    assert all(reason.startswith(f"{path}:1: ") and "\n" not in reason for reason in file.skipped)
