"""Records written as another format and imported again are the same records, to the last digit that the format's arithmetic allows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from command import call
from coordexp.data.exporting import EXPORTS, export_data
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import read_records, write_records
from pages import pages

W, H = 319, 211
# What each format has no place for.
LACKS = {
    "coco": {"points"}, "fiftyone": {"points"}, "yolo": {"points", "crowds", "difficult"}, "voc": {"points", "crowds", "outlines"},
    "labelstudio": {"crowds"},
}  # fmt: skip
# What is written and read back; the rest of an object's fields is lost.
KEEPS = {"coco": {"crowd", "difficult", "area"}, "fiftyone": {"crowd", "difficult", "area"}, "voc": {"difficult"}}
READERS = {"fiftyone": "coco"}


@pytest.fixture
def records(tmp_path):
    rng = np.random.default_rng(1)
    for split, count in (("train", 5), ("val", 3)):
        rows = []
        for i in range(count):
            name = f"images/{split}/{i:03d}.png"
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (W, H)).save(tmp_path / "in" / name)
            low = rng.uniform(0, 0.5, (3, 2)) * [W, H]
            boxes = np.hstack([low, low + rng.uniform(5, 60, (3, 2))]).tolist()
            objects = [{"desc": d, "bbox_2d": b} for d, b in zip(("cat & 'dog'", "猫", "x: y"), boxes, strict=True)] if i else []
            objects += [
                {"desc": "tree", "poly": [1, 2, 30.5, 2, 20, 40], "area": 500.25},
                {"desc": "tip", "point_2d": [3, 4.5]},
                {"desc": "cats", "bbox_2d": [0, 0, W, H], "iscrowd": True},
                {"desc": "far", "bbox_2d": [5, 5, 9, 9.25], "difficult": True},
            ][: 4 if i else 0]  # fmt: skip
            rows.append({"images": [name], "width": W, "height": H, "objects": objects, "image_id": str(10 + i)})
        write_records(tmp_path / "in" / f"{split}.jsonl", rows)
    return [tmp_path / "in" / f"{split}.jsonl" for split in ("train", "val")]


def kind(item):
    by = {"points": item.geometry == "point_2d", "crowds": item.crowd, "outlines": item.geometry == "poly", "difficult": item.difficult}
    return {name for name, yes in by.items() if yes}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_comes_back_as_the_same_records(tmp_path, records, name, copy):
    report = export_data(name, records, tmp_path / "out", copy=copy)
    true = {path.stem: read_records(path).records for path in records}
    every = [item for rs in true.values() for r in rs for item in r.objects]
    assert report.objects == sum(not kind(item) & LACKS[name] for item in every)
    assert sum(report.left_out.values()) == len(every) - report.objects
    if name == "labelstudio":
        sources = [tmp_path / "out" / f"{split}.json" for split in true]
    elif name == "fiftyone":
        sources = [tmp_path / "out" / split for split in true]
    else:
        sources = [tmp_path / "out"]
    for i, source in enumerate(sources):
        import_data(READERS.get(name, name), source, tmp_path / f"back{i}", ImportOptions(follow_links=not copy))
    found = {path.stem: read_records(path).records for path in sorted(tmp_path.glob("back*/*.jsonl"))}
    assert found.keys() == true.keys()
    for split, rs in true.items():
        assert len(found[split]) == len(rs)
        for want, got in zip(rs, sorted(found[split], key=lambda r: r.image.name), strict=True):
            assert got.image.read_bytes() == want.image.read_bytes()
            kept = [item for item in want.objects if not kind(item) & LACKS[name]]
            assert [(o.desc, o.geometry) for o in got.objects] == [
                (o.desc, "bbox_2d" if name in ("coco", "fiftyone") and o.geometry == "poly" else o.geometry) for o in kept
            ]
            for a, b in zip(got.objects, kept, strict=True):
                if a.geometry == b.geometry:
                    assert a.values == pytest.approx(b.values, abs=1e-10)
                keeps = KEEPS.get(name, set())
                assert "crowd" not in keeps or a.crowd == b.crowd
                assert "difficult" not in keeps or a.difficult == b.difficult
                if "area" in keeps and b.area is not None:
                    assert a.area == b.area


def test_exports_refuse_what_they_cannot_do_and_leave_nothing(tmp_path, records, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "data", "export", "kitti", records[0], "--out", tmp_path / "o")
    assert (code, err.startswith("error: FORMAT: expected coco, ")) == (2, True)
    code, _, err = call(monkeypatch, capsys, "data", "export", "coco", records[0], records[0], "--out", tmp_path / "o")
    assert (code, "got train.jsonl twice" in err, (tmp_path / "o").exists()) == (2, True, False)
    code, out, _ = call(monkeypatch, capsys, "data", "export", "yolo", *records, "--out", tmp_path / "o")
    assert (code, "5 train, 3 val images, " in out, "6 points left out" in out) == (0, True, True)
    assert call(monkeypatch, capsys, "data", "export", "yolo", *records, "--out", tmp_path / "o")[0] == 2
    assert call(monkeypatch, capsys, "data", "export", "yolo", *records, "--out", tmp_path / "o", "--overwrite")[0] == 0


def test_predictions_come_back_from_coco_results_and_become_pre_annotations(tmp_path, records, monkeypatch, capsys):
    export_data("coco", records, tmp_path / "coco", copy=True)
    import_data("coco", tmp_path / "coco", tmp_path / "data")
    data = tmp_path / "data/val.jsonl"
    found = [{"desc": d, "bbox_2d": [1.25, 2, 30, 40.5], "score": 0.1 + i / 10} for i, d in enumerate(("猫", "TREE", "unknown"))]
    same = {"width": W, "height": H, "score_source": "token", "objects": found}
    rows = [{"image_id": record.image_id, **same} for record in read_records(data).records]
    write_records(tmp_path / "p.jsonl", rows)
    words = ("predictions", "export", "coco", tmp_path / "p.jsonl", "--data", data, "--out", tmp_path / "r.json")
    code, out, _ = call(monkeypatch, capsys, *words)
    assert (code, "3 boxes of descriptions that are no category left out (unknown 3)" in out) == (0, True)
    results = json.loads((tmp_path / "r.json").read_text())
    names = {c["id"]: c["name"] for c in json.loads((tmp_path / "coco/annotations/instances_val.json").read_text())["categories"]}
    assert [(r["image_id"], names[r["category_id"]], r["bbox"], r["score"]) for r in results[:2]] == [
        (10, "猫", [1.25, 2.0, 28.75, 38.5], 0.1), (10, "tree", [1.25, 2.0, 28.75, 38.5], 0.2)
    ]  # fmt: skip
    assert call(monkeypatch, capsys, *words)[0] == 2
    assert call(monkeypatch, capsys, "evaluate", tmp_path / "r.json", "--data", data, "--out", tmp_path / "e", "--bootstrap", 0)[0] == 0
    words = ("predictions", "export", "labelstudio", tmp_path / "p.jsonl", "--data", data, "--out", tmp_path / "ls.json")
    assert call(monkeypatch, capsys, *words)[0] == 0
    (region, *_) = json.loads((tmp_path / "ls.json").read_text())[0]["predictions"][0]["result"]
    assert (region["value"]["rectanglelabels"], region["score"]) == (["猫"], 0.1)
    assert region["value"]["x"] == pytest.approx(1.25 / W * 100)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("scored", [True, False])
def test_the_documented_lines_make_what_the_constructor_of_supervision_accepts(count, scored):
    """Its rules: ``xyxy`` is an array [n, 4], ``confidence`` and ``class_id`` are [n] or None, every value of ``data`` has n entries."""
    (block,) = [block for one in pages() for block in one.blocks if block.info == "python" and "def arrays" in block.text]
    scope = {}
    exec(compile(block.text, block.place, "exec"), scope)
    names = ["dog", "black cat"]
    objects = [{"desc": names[i % 2], "bbox_2d": [i, 2, 30.5 + i, 40], **({"score": 0.25 * i} if scored else {})} for i in range(count)]
    found = scope["arrays"]({"objects": objects, "score_source": "token" if scored else None}, names)
    assert found.keys() == {"xyxy", "confidence", "class_id", "data"}
    assert (found["xyxy"].shape, found["xyxy"].dtype.kind) == ((count, 4), "f")
    assert found["xyxy"].tolist() == [[i, 2, 30.5 + i, 40] for i in range(count)]
    assert (found["class_id"].shape, found["class_id"].dtype.kind) == ((count,), "i")
    assert found["class_id"].tolist() == [i % 2 for i in range(count)]
    assert found["data"]["class_name"].tolist() == [names[i % 2] for i in range(count)]
    if scored:
        assert (found["confidence"].shape, found["confidence"].dtype.kind) == ((count,), "f")
        assert found["confidence"].tolist() == [0.25 * i for i in range(count)]
    else:
        assert found["confidence"] is None
