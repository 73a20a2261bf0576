"""The probe of a data file: sound files of any tool pass, a wrong unit, layout or grid is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from boxfiles import LARGE, LAYOUTS, PHOTO, rows, write
from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.doctor.data import check_data
from coordexp.doctor.sources import read_source_of
from coordexp.errors import DataError

# On some of these every whole pixel lies on k/1000 of the side, or half of them do.
TRAPS = ((1000, 1500), (2500, 500), (999, 333), (800, 800), (1023, 2046), (1998, 4000))


def checks(path):
    return {check.name.removeprefix("data."): check for check in check_data(path)}


def codec(name):
    return CoordCodec(CONVENTIONS[name].bins, name)


def quantised(name):
    return lambda boxes, sides: codec(name).quantize(boxes, np.broadcast_to(sides, boxes.shape))


def written_again(name, decimals):
    return lambda boxes, sides: np.round(codec(name).to_pixel(quantised(name)(boxes, sides), sides), decimals)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(8, 60),
    sizes=st.lists(
        st.one_of(st.sampled_from(PHOTO + LARGE + TRAPS), st.tuples(st.integers(200, 4000), st.integers(200, 4000))), min_size=1, max_size=4
    ),
    written=st.sampled_from(["whole", "2 decimals", "float"]),
)
def test_pixel_boxes_of_any_sizes_and_decimals_pass(tmp_path, seed, images, sizes, written):
    found = checks(write(tmp_path, rows(seed, images, sizes=sizes, written=written)))
    found.pop("duplicates")
    assert {name: check.seen for name, check in found.items() if check.outcome != "ok"} == {}


@pytest.mark.parametrize("sizes", [PHOTO, LARGE, PHOTO + LARGE])
@pytest.mark.parametrize(
    ("change", "units"),
    [
        (lambda b, s: b / s, "norm1"),
        (lambda b, s: b / s * 1000, "norm999 or norm1000"),
        (quantised("norm999"), "norm999 or norm1000"),
        (quantised("floor1000"), "norm999 or norm1000"),
        (quantised("norm1000"), "norm999 or norm1000"),
        (quantised("paligemma"), "paligemma"),
    ],
)
def test_records_that_are_not_in_pixels_fail_and_their_units_are_named(tmp_path, sizes, change, units):
    found = checks(write(tmp_path, rows(1, sizes=sizes, change=change)))
    assert (found["units"].outcome, found["units"].details["units"]) == ("fail", units)
    assert found["boxes"].outcome == "skipped"


@pytest.mark.parametrize(("convention", "units"), [("norm999", "norm999"), ("norm1000", "norm1000"), ("floor1000", "norm999")])
def test_boxes_on_the_border_tell_999_from_1000(tmp_path, convention, units):
    def to_border(boxes, sides):
        return quantised(convention)(
            np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], sides[2:] * (boxes[:, :1] < 60))], axis=1), sides
        )

    assert checks(write(tmp_path, rows(2, change=to_border)))["units"].details["units"] == units


@pytest.mark.parametrize("sizes", [PHOTO, LARGE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_in_another_layout_fail_and_it_is_named(tmp_path, sizes, layout):
    found = checks(write(tmp_path, rows(3, sizes=sizes, change=LAYOUTS[layout])))
    assert (found["layout"].outcome, found["layout"].details["layout"]) == ("fail", layout)
    assert found["units"].outcome == "ok"


def test_units_and_layout_can_be_wrong_together(tmp_path):
    found = checks(write(tmp_path, rows(4, change=lambda b, s: LAYOUTS["xywh"](b, s) / s * 1000)))
    assert (found["units"].details["units"], found["layout"].details["layout"]) == ("norm999 or norm1000", "xywh")


def test_a_few_boxes_outside_are_called_that_and_nothing_else(tmp_path):
    content = rows(5)
    for i in (3, 8, 20, 31):
        content[i]["objects"][0]["bbox_2d"][3] = content[i]["height"] + 9
    content[9]["objects"][1]["bbox_2d"] = [50, 50, 40, 60]
    found = checks(write(tmp_path, content))
    assert [name for name, check in found.items() if check.outcome != "ok"] == ["boxes"]
    assert (found["boxes"].outcome, found["boxes"].details["outside"], found["boxes"].details["reversed"]) == ("fail", 4, 1)
    assert "d.jsonl:4" in found["boxes"].seen


@pytest.mark.parametrize("decimals", [1, 2, 12])
@pytest.mark.parametrize(("name", "grid"), [("norm999", 999), ("norm1000", 1000), ("floor1000", 1000), ("paligemma", 1023)])
def test_pixels_that_were_quantised_before_are_seen(tmp_path, name, grid, decimals):
    found = checks(write(tmp_path, rows(6, change=written_again(name, decimals))))
    assert (found["grid"].outcome, found["grid"].details["grids"]) == ("warning", [grid])


def test_whole_pixels_of_large_images_show_the_grid_too(tmp_path):
    found = checks(write(tmp_path, rows(7, sizes=LARGE, change=written_again("norm999", 0))))
    assert found["grid"].details["grids"] == [999]


def test_copies_of_a_box_are_counted(tmp_path):
    content = rows(8)
    content[2]["objects"] += content[2]["objects"][:2]
    content[5]["objects"].append({**content[5]["objects"][0], "desc": "another"})
    assert checks(write(tmp_path, content))["duplicates"].details == {"duplicates": 2}


def test_rows_without_boxes_fail_unless_they_are_records(tmp_path):
    assert checks(write(tmp_path, [{"a": 1}]))["file"].outcome == "fail"
    assert checks(write(tmp_path, rows(9, per=0)))["file"].outcome == "ok"


def test_few_boxes_are_not_judged(tmp_path):
    found = checks(write(tmp_path, rows(9, images=2)))
    assert {found[name].outcome for name in ("units", "layout", "boxes", "grid", "duplicates")} == {"skipped"}


def as_coco(content, change=LAYOUTS["xywh"]):
    images = [{"id": i, "width": row["width"], "height": row["height"], "file_name": row["images"][0]} for i, row in enumerate(content)]
    boxes = [(i, np.array([item["bbox_2d"]])) for i, row in enumerate(content) for item in row["objects"]]
    annotations = [{"id": j, "image_id": i, "category_id": 1, "bbox": change(b, None)[0].tolist()} for j, (i, b) in enumerate(boxes)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


def test_coco_is_xywh_and_corners_in_it_are_found(tmp_path):
    found = checks(write(tmp_path, as_coco(rows(10)), "coco.json"))
    assert [check.outcome for check in found.values()] == ["ok"] * 6
    found = checks(write(tmp_path, as_coco(rows(10), lambda b, s: b), "coco.json"))
    assert (found["layout"].outcome, found["layout"].details["layout"]) == ("fail", "xyxy")


def qwen_row(row, scale):
    answer = [{"bbox_2d": (np.array(o["bbox_2d"]) * scale(row)).tolist(), "label": o["desc"]} for o in row["objects"]]
    text = "```json\n" + json.dumps(answer) + "\n```"
    return {"image": row["images"][0], "conversations": [{"from": "human", "value": "Find."}, {"from": "gpt", "value": text}]}


def test_qwen_answers_say_what_they_are_and_how_to_import_them(tmp_path):
    content = rows(11, sizes=((64, 48),))
    for row in content:
        Image.new("RGB", (64, 48)).save(tmp_path / row["images"][0])
    shares = [qwen_row(row, lambda r: 1000 / np.array([r["width"], r["height"]] * 2)) for row in content]
    found = checks(write(tmp_path, shares))
    assert (found["file"].details["format"], found["units"].details["units"]) == ("qwen", "norm999 or norm1000")
    assert found["units"].outcome == "warning"
    found = checks(write(tmp_path, [qwen_row(row, lambda r: 1) for row in content], "d.json"))
    assert (found["units"].outcome, found["units"].advice) == ("ok", "import with --coords absolute")


def test_without_sizes_small_numbers_are_left_open(tmp_path):
    content = [qwen_row(row, lambda r: 1) for row in rows(12)]
    found = checks(write(tmp_path, content))
    assert (found["units"].outcome, found["units"].details["units"]) == ("skipped", None)


def test_swift_rows_must_keep_what_bbox_type_promises(tmp_path):
    def swift(row, kind):
        boxes = [item["bbox_2d"] for item in row["objects"]]
        size = {"width": row["width"], "height": row["height"]}
        return {**size, "images": row["images"], "objects": {"ref": ["a"], "bbox": boxes, "bbox_type": kind}}

    assert checks(write(tmp_path, [swift(row, "real") for row in rows(13)]))["units"].outcome == "ok"
    found = checks(write(tmp_path, [swift(row, "norm1") for row in rows(13)]))
    assert (found["units"].outcome, found["units"].details["units"]) == ("fail", "pixel")


def test_objects_without_four_numbers_are_counted_and_placed(tmp_path):
    content = rows(14)
    content[1]["objects"][0]["bbox_2d"] = [1, 2, 3]
    content[1]["objects"][1]["bbox_2d"] = [1, 2, None, 4]
    content[2]["objects"].append({"desc": "tip", "point_2d": [3, 4]})
    file = checks(write(tmp_path, content))["file"]
    assert (file.outcome, file.details["unreadable"]) == ("fail", ["d.jsonl:2: objects[0].bbox_2d", "d.jsonl:2: objects[1].bbox_2d"])


KEYS = ("objects", "bbox", "bbox_2d", "poly", "ref", "annotations", "images", "width", "height", "conversations", "value", "id")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=JSON, lines=st.booleans())
def test_any_json_is_read_or_refused_in_one_line(tmp_path, content, lines):
    path = write(tmp_path, [content, content] if lines else content, "d.jsonl" if lines else "d.json")
    refused = ""
    try:
        file = read_source_of(path).boxes
    except DataError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(str(path))
        assert "\n" not in refused
        return
    assert np.isfinite(file.values).all()
    assert len(file.values) == len(file.sides) == len(file.image) == len(file.place) == len(file.label)
