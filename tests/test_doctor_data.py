"""The codec probe: every wrong convention is named, right data is left in peace, and offsets are traced to their pair."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.doctor.annotations import Boxes, read_boxes
from coordexp.doctor.conventions import check_convention, check_inside, readings
from coordexp.doctor.offsets import check_offset, explain, fit_line, pairs
from coordexp.errors import DataError

SIZES = {"small": (640, 480), "large": (3840, 2160), "square": (1000, 1000), "odd": (375, 500)}


def _pixels(seed, size, count=300):
    """Boxes like a detection set's, whole pixels, some on the border."""
    rng = np.random.default_rng(seed)
    side = np.array(size)
    extent = np.exp(rng.uniform(np.log(0.03), np.log(0.9), (count, 2)))
    low = rng.uniform(0, 1, (count, 2)) * (1 - extent)
    boxes = np.round(np.concatenate([low * side, np.minimum((low + extent) * side + 1, side)], axis=1))
    return boxes.astype(float)


def _boxes(values, size):
    sizes = np.tile(np.array(size, dtype=float), (len(values), 1))
    return Boxes(values, sizes, tuple(f"x:{i}" for i in range(len(values))), len(values))


def _as(scale, layout, pixels, size):
    """Pixel corners as another tool writes them, by plain loops."""
    found = []
    for x1, y1, x2, y2 in pixels:
        box = {"xyxy": [x1, y1, x2, y2], "xywh": [x1, y1, x2 - x1, y2 - y1], "cxcywh": [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]}
        box["yxyx"] = [y1, x1, y2, x2]
        sides = (size[1], size[0]) * 2 if layout == "yxyx" else size * 2
        if scale == "pixels":
            found.append(box[layout])
        elif scale == "0..1":
            found.append([v / side for v, side in zip(box[layout], sides, strict=True)])
        else:
            most = int(scale.rpartition(".")[2])
            found.append([float(round(v / side * most)) for v, side in zip(box[layout], sides, strict=True)])
    return np.array(found)


def _told_apart(scale, layout, size):
    """On a square grid the order of axes leaves no trace; in a picture of 1000 x 1000 bins are pixels."""
    square = scale != "pixels" or size[0] == size[1]
    return not (layout == "yxyx" and square) and not (scale in ("0..999", "0..1000") and size == (1000, 1000))


WRITTEN = [
    (scale, layout, size)
    for scale in ("pixels", "0..1", "0..999", "0..1000", "0..1023")
    for layout in ("xyxy", "xywh", "cxcywh", "yxyx")
    for size in SIZES.values()
    if _told_apart(scale, layout, size)
]


@pytest.mark.parametrize(("scale", "layout", "size"), WRITTEN, ids=[f"{scale} {layout} {size[0]}" for scale, layout, size in WRITTEN])
def test_the_reading_is_the_one_the_file_was_written_in(scale, layout, size):
    values = _as(scale, layout, _pixels(1, size), size)
    best = readings(_boxes(values, size))[0]
    assert (best.scale, best.layout) == (scale, layout)
    check = check_convention(_boxes(values, size), name="x")
    if (scale, layout) == ("pixels", "xyxy"):
        assert check.outcome == "ok"
    else:
        # Bins of large pictures fit into them as pixels do; all others cannot be pixel corners.
        fits = size == SIZES["large"] and layout == "xyxy" and scale != "0..1"
        assert check.outcome == ("warning" if fits else "fail")
        assert layout in check.seen
        assert check.advice


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(sorted(SIZES)), st.integers(1, 60))
def test_pixel_corners_are_never_called_wrong(seed, size, count):
    check = check_convention(_boxes(_pixels(seed, SIZES[size], count), SIZES[size]), name="x")
    assert check.outcome in ("ok", "warning")
    if count >= 20:
        assert check.outcome == "ok"


def test_a_few_bad_boxes_do_not_change_the_reading_and_are_named():
    values = _pixels(2, (640, 480), 400)
    values[7] = [600, 10, 700, 50]
    values[9] = [50, 50, 40, 60]
    boxes = _boxes(values, (640, 480))
    assert check_convention(boxes, name="x").outcome == "ok"
    check = check_inside(boxes, name="x")
    assert (check.outcome, check.values["outside"], check.values["reversed_or_empty"]) == ("warning", 1, 1)
    assert "x:7 [600.0, 10.0, 700.0, 50.0] in [640.0, 480.0]" in check.seen
    assert check_inside(_boxes(_pixels(2, (640, 480)), (640, 480)), name="x").outcome == "ok"


def test_boxes_of_pictures_that_were_scaled_down_are_a_warning_and_scaled_up_a_failure():
    values = _pixels(5, (640, 480))
    half = check_convention(_boxes(values / 2, (640, 480)), name="x")
    assert (half.outcome, half.values["reach"]) == ("warning", pytest.approx(0.5, abs=0.01))
    assert "none reaches beyond 50% of its image" in half.seen
    twice = check_convention(_boxes(values * 2, (640, 480)), name="x")
    assert twice.outcome == "fail"
    assert "images of another size" in twice.advice


def test_unknown_sizes_are_said_and_not_guessed():
    values = _as("0..1000", "xyxy", _pixels(1, (640, 480)), (640, 480))
    boxes = Boxes(values, np.full((len(values), 2), np.nan), ("",) * len(values), 1)
    check = check_convention(boxes, name="x")
    assert check.outcome == "warning"
    assert "sizes are unknown" in check.seen
    assert check_inside(boxes, name="x").outcome == "skipped"


def test_files_of_four_tools_give_the_same_boxes(tmp_path):
    from PIL import Image

    box, size = [10.0, 20.0, 30.0, 60.0], {"width": 64, "height": 80}
    Image.new("RGB", (64, 80)).save(tmp_path / "a.png")
    files = {
        "records.jsonl": json.dumps({"images": ["a.png"], **size, "objects": [{"desc": "x", "bbox_2d": box}]}) + "\n",
        "coco.json": json.dumps({"images": [{"id": 1, **size}], "annotations": [{"image_id": 1, "bbox": box}], "categories": []}),
        "swift.jsonl": json.dumps({"messages": [], "images": ["a.png"], "objects": {"ref": ["x"], "bbox": [box]}}) + "\n\n",
        "qwen.json": json.dumps([{"image": "a.png", "conversations": [{"value": f'```json\n[{{"bbox_2d": {box}}}]\n```'}]}]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        found = read_boxes(tmp_path / name)
        assert found.values.tolist() == [box], name
        assert found.sizes.tolist() == [[64.0, 80.0]], name
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"answer": "[<|coord_1|>, <|coord_2|>, <|coord_30|>, <|coord_999|>]"}))
    assert read_boxes(tmp_path / "tokens.jsonl").values.tolist() == [[1, 2, 30, 999]]


@pytest.mark.parametrize("text", ["", "{}", "[1, 2", '{"bbox": [1, 2, 3]}\n', '{"bbox": [NaN, 1, 2, 3]}\n', "\xff"])
def test_a_file_without_usable_boxes_is_one_line(text, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as error:
        read_boxes(path)
    assert "\n" not in str(error.value)
    assert "x.jsonl" in str(error.value)


KEYS = st.sampled_from(["bbox", "bbox_2d", "width", "height", "images", "image", "annotations", "id", "x"])
LEAF = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20)
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@given(ANY)
def test_any_json_is_read_or_refused_in_one_line(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("any") / "x.json"
    path.write_text(json.dumps(value))
    found = None
    try:
        found = read_boxes(path)
    except DataError as error:
        refusal = str(error)
    if found is None:
        assert "x.json" in refusal
        assert "\n" not in refusal
    else:
        assert found.values.shape == (len(found.places), 4)
        assert check_convention(found, name="x").code == "D02"
        assert check_inside(found, name="x").code == "D03"


def _files(folder, encode, decode, *, images=400, noise=0.0, seed=0):
    """Truth, and predictions of a model that learned ``encode`` and is read by ``decode``, by the codec itself."""
    rng = np.random.default_rng(seed)
    written, read = (CoordCodec(CONVENTIONS[name].bins, name) for name in (encode, decode))
    records, predictions = [], []
    for i in range(images):
        width, height = (640, 480) if i % 2 else (500, 900)
        sides = np.array([width, height] * 2, dtype=float)
        low = rng.uniform(0, 0.6, 2)
        box = np.concatenate([low, low + rng.uniform(0.15, 0.4, 2)]) * sides
        bins = np.asarray(written.quantize(box, sides)) + np.round(rng.normal(0, noise, 4))
        found = np.asarray(read.to_pixel(bins, sides))
        common = {"image_id": str(i), "width": width, "height": height}
        records.append({"images": [f"{i}.png"], **common, "objects": [{"desc": "x", "bbox_2d": box.tolist()}]})
        predictions.append({**common, "objects": [{"desc": "x", "bbox_2d": found.tolist()}], "score_source": None})
    for name, rows in (("r.jsonl", records), ("p.jsonl", predictions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "p.jsonl", folder / "r.jsonl"


@pytest.mark.parametrize(("encode", "decode"), list(pairs()), ids=lambda name: name)
def test_an_offset_is_traced_to_its_pair_of_conventions(encode, decode, tmp_path):
    check = check_offset(*_files(tmp_path, encode, decode))
    offset, slope = pairs()[encode, decode]
    assert check.values["offset"] == pytest.approx(offset, abs=4 * check.values["offset_se"] + 1e-9)
    assert check.values["slope"] == pytest.approx(slope, abs=4 * check.values["slope_se"] + 1e-9)
    if (offset, slope) == (0.0, 0.0):
        assert check.outcome == "ok"
        return
    assert check.outcome == "fail"
    named = {(item["encode"], item["decode"]) for item in check.values["pairs"]}
    assert (encode, decode) in named
    # Pairs that make the same line cannot be told apart; no other is left.
    assert named == {pair for pair, line in pairs().items() if line == pytest.approx((offset, slope), abs=1e-4)}
    assert abs(float(check.advice.rpartition("left is ")[2].split(" px")[0])) < 0.1


def test_a_blurred_but_unbiased_model_is_ok_and_a_stretched_one_is_no_convention(tmp_path):
    predictions, records = _files(tmp_path, "norm999", "norm999", noise=8)
    assert check_offset(predictions, records).outcome == "ok"
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for row in rows:
        row["objects"][0]["bbox_2d"] = [v + 6 for v in row["objects"][0]["bbox_2d"]]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check = check_offset(predictions, records)
    assert (check.outcome, check.values["pairs"]) == ("warning", [])
    assert check.values["mean_px"] == pytest.approx(6, abs=1)


def test_too_few_matches_are_skipped(tmp_path):
    check = check_offset(*_files(tmp_path, "norm999", "norm1000", images=19))
    assert check.outcome == "skipped"


def test_the_fitted_line_is_numpys_and_its_errors_are_those_of_a_bootstrap_over_images():
    rng = np.random.default_rng(4)
    image = np.repeat(np.arange(200), 4)
    true = rng.uniform(0, 1, 800)
    predicted = true + 0.01 + 0.02 * true + np.repeat(rng.normal(0, 0.02, 200), 4) + rng.normal(0, 0.01, 800)
    line = fit_line(true, predicted, image)
    slope, offset = np.polyfit(true, predicted - true, 1)
    assert (line.slope, line.offset) == (pytest.approx(slope), pytest.approx(offset))
    drawn = []
    for _ in range(400):
        chosen = np.concatenate([np.flatnonzero(image == i) for i in rng.integers(0, 200, 200)])
        drawn.append(np.polyfit(true[chosen], (predicted - true)[chosen], 1))
    assert np.sqrt(np.diag(line.covariance))[::-1] == pytest.approx(np.std(drawn, axis=0), rel=0.2)
    assert explain(line) == []
