"""Every format of the table: a file as its tool writes it gives the boxes that were drawn, and a broken twin is one line and exit code 2.

The boxes are stated once, in pixels (``DRAWN``); each writer turns them into its format by that format's own definition.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from command import call
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.files import head_of
from coordexp.data.importers.formats import FORMATS, detect, import_data
from coordexp.data.records import check_records, read_records
from coordexp.doctor.sources import read_source_of
from coordexp.errors import ConfigError, DataError

W, H = 200, 100
# By image: (name, x1, y1, x2, y2). The second image is a background.
DRAWN = {"a.jpg": [("cat", 20, 10, 60, 50), ("red dog", 100.5, 20, 200, 100)], "b.jpg": []}
MORE = {"a.jpg": [("cat", 20, 10, 60, 50), ("red dog", 100.5, 20, 200, 100)], "b.jpg": [("cat", 1, 2, 30, 40)]}


def picture(path: Path, size=(W, H), kind="L", **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(kind, size).save(path, **more)
    return path


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def coco(folder, drawn, name="instances_val2017.json"):
    annotations = [
        {
            "id": j,
            "image_id": i,
            "category_id": 1 + (d[0] != "cat"),
            "bbox": [d[1], d[2], d[3] - d[1], d[4] - d[2]],
            "area": 7.5,
            "iscrowd": 0,
        }
        for i, image in enumerate(drawn)
        for j, d in enumerate(drawn[image], start=10 * i)
    ]
    images = [{"id": i, "file_name": image, "width": W, "height": H} for i, image in enumerate(drawn)]
    categories = [{"id": 1, "name": "cat", "supercategory": "x"}, {"id": 2, "name": "red dog"}]
    return write(folder / "annotations" / name, {"info": {}, "images": images, "annotations": annotations, "categories": categories})


def voc(folder, drawn):
    for image, boxes in drawn.items():
        objects = "".join(
            f"<object><name>{n}</name><bndbox><xmin>{a + 1}</xmin><ymin>{b + 1}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
            for n, a, b, c, d in boxes
        )
        write(folder / "Annotations" / f"{Path(image).stem}.xml", f"<annotation><filename>{image}</filename>{objects}</annotation>")
    return folder


def yolo(folder, drawn):
    names = ["cat", "red dog"]
    write(folder / "data.yaml", yaml.safe_dump({"names": names, "nc": 2, "train": "images"}))
    for image, boxes in drawn.items():
        rows = [
            f"{names.index(n)} {(a + c) / 2 / W:.8f} {(b + d) / 2 / H:.8f} {(c - a) / W:.8f} {(d - b) / H:.8f}" for n, a, b, c, d in boxes
        ]
        write(folder / "labels" / f"{Path(image).stem}.txt", "\n".join(rows))
    return folder


def swift(folder, drawn):
    rows = [
        {
            "messages": [],
            "images": [image],
            "objects": {"ref": [d[0] for d in boxes], "bbox": [[*d[1:]] for d in boxes], "bbox_type": "real"},
        }
        for image, boxes in drawn.items()
    ]
    return write(folder / "train.jsonl", lines(rows))


def qwen(folder, drawn):
    def turns(boxes):
        answer = json.dumps([{"bbox_2d": d[1:], "label": d[0]} for d in boxes])
        return [{"from": "human", "value": "<image>Find."}, {"from": "gpt", "value": answer}]

    return write(folder / "train.json", [{"image": image, "conversations": turns(boxes)} for image, boxes in drawn.items()])


def paligemma(folder, drawn):
    def tokens(d):
        return "".join(f"<loc{round(v / side * 1023):04d}>" for v, side in ((d[2], H), (d[1], W), (d[4], H), (d[3], W)))

    rows = [
        {"image": i, "prefix": "detect cat ; red dog", "suffix": " ; ".join(f"{tokens(d)} {d[0]}" for d in b)} for i, b in drawn.items()
    ]
    return write(folder / "_annotations.train.jsonl", lines(rows)).parent


def florence2(folder, drawn):
    def tokens(d):
        return "".join(f"<loc_{min(int(v / side * 1000), 999)}>" for v, side in zip(d[1:], (W, H, W, H), strict=True))

    rows = [{"image": i, "prefix": "<OD>", "suffix": "".join(d[0] + tokens(d) for d in b)} for i, b in drawn.items()]
    return write(folder / "train/annotations.jsonl", lines(rows)).parents[1]


def createml(folder, drawn):
    def item(n, a, b, c, d):
        return {"label": n, "coordinates": {"x": (a + c) / 2, "y": (b + d) / 2, "width": c - a, "height": d - b}}

    rows = [{"image": i, "annotations": [item(*d) for d in boxes]} for i, boxes in drawn.items()]
    return write(folder / "train/_annotations.createml.json", rows).parents[1]


def labelme(folder, drawn):
    for i, boxes in drawn.items():
        shapes = [
            {"label": n, "points": [[c, b], [a, d]], "shape_type": "rectangle", "flags": {}, "group_id": None} for n, a, b, c, d in boxes
        ]
        content = {
            "version": "5.4.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"..\\shots\\{i}",
            "imageData": None,
            "imageWidth": W,
            "imageHeight": H,
        }
        write(folder / f"{Path(i).stem}.json", content)
    return folder


def via(folder, drawn):
    def region(n, a, b, c, d):
        shape = {"name": "rect", "x": a, "y": b, "width": c - a, "height": d - b}
        return {"shape_attributes": shape, "region_attributes": {"species": n}}

    images = {f"{i}123": {"filename": i, "size": 123, "regions": [region(*d) for d in b], "file_attributes": {}} for i, b in drawn.items()}
    return write(folder / "project.json", {"_via_settings": {}, "_via_img_metadata": images, "_via_attributes": {}})


def labelstudio(folder, drawn):
    def region(n, a, b, c, d):
        value = {
            "x": a / W * 100,
            "y": b / H * 100,
            "width": (c - a) / W * 100,
            "height": (d - b) / H * 100,
            "rotation": 0,
            "rectanglelabels": [n],
        }
        return {"type": "rectanglelabels", "from_name": "l", "original_width": W, "original_height": H, "value": value}

    def task(k, image, boxes):
        done = {"result": [region(*d) for d in boxes], "was_cancelled": False}
        return {"id": k, "data": {"image": f"/data/upload/3/1a2b3c4d-{image}"}, "annotations": [done], "predictions": []}

    tasks = [task(k, *item) for k, item in enumerate(drawn.items())]
    return write(folder / "project-3.json", tasks)


def datumaro(folder, drawn):
    def box(n, a, b, c, d):
        return {
            "id": 0,
            "type": "bbox",
            "label_id": int(n != "cat"),
            "bbox": [a, b, c - a, d - b],
            "group": 0,
            "attributes": {"occluded": False},
        }

    items = [{"id": Path(i).stem, "annotations": [box(*d) for d in b], "image": {"path": i, "size": [H, W]}} for i, b in drawn.items()]
    labels = {"labels": [{"name": "cat", "parent": ""}, {"name": "red dog", "parent": ""}]}
    return write(folder / "annotations/train.json", {"info": {}, "categories": {"label": labels}, "items": items}).parents[1]


def table(folder, drawn):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
    for i, boxes in drawn.items():
        for n, *box in boxes or [("", "", "", "", "")]:
            writer.writerow([i, W, H, n, *box])
    return write(folder / "_annotations.csv", out.getvalue())


def refcoco(folder, drawn):
    rows = [
        {"image": i, "sent": n, "bbox": [a, b, c, d], "segmentation": [[a, b, c, b, c, d, a, d]], "width": W, "height": H}
        for i, boxes in drawn.items()
        for n, a, b, c, d in boxes
    ]
    return write(folder / "val.jsonl", lines(rows))


def hf(folder, drawn):
    def objects(boxes):
        made = [(n, [a, b, c - a, d - b]) for n, a, b, c, d in boxes]
        return {"bbox": [box for _, box in made], "categories": [n for n, _ in made], "area": [box[2] * box[3] for _, box in made]}

    rows = [{"file_name": i, "objects": objects(boxes)} for i, boxes in drawn.items()]
    return write(folder / "train/metadata.jsonl", lines(rows)).parents[1]


# By format: its writer, its options, and how exact it is in pixels.
WRITERS = {
    "coco": (coco, {}, 0),
    "voc": (voc, {}, 0),
    "yolo": (yolo, {}, 1e-5),
    "swift": (swift, {}, 0),
    "hf": (hf, {}, 0),
    "refcoco": (refcoco, {}, 0),
    "labelstudio": (labelstudio, {}, 1e-9),
    "createml": (createml, {}, 0),
    "datumaro": (datumaro, {}, 0),
    "via": (via, {}, 0),
    "labelme": (labelme, {}, 0),
    "paligemma": (paligemma, {}, W / 1023 / 2),
    "florence2": (florence2, {}, W / 2000 + 1e-9),
    "csv": (table, {}, 0),
    "qwen": (qwen, {"coords": "absolute"}, 0),
}
HOMES = {
    "voc": "JPEGImages", "yolo": "images", "coco": "val2017", "datumaro": "images/train", "florence2": "train", "createml": "train",
    "hf": "train",
}  # fmt: skip


def source_of(name, folder, drawn=DRAWN):
    """A source with its images where the format has them."""
    source = WRITERS[name][0](folder, drawn)
    for image in drawn:
        picture(folder / HOMES.get(name, ".") / image)
    return source


def test_every_format_has_a_writer_here():
    assert set(WRITERS) == {name for name, one in FORMATS.items() if one.importable}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_as_its_tool_writes_it_gives_the_boxes_that_were_drawn(tmp_path, name):
    source, (_, options, exact) = source_of(name, tmp_path / "in"), WRITERS[name]
    report = import_data(name, source, tmp_path / "out", ImportOptions(**options))
    assert (report.dropped, report.repaired) == ((), ())
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert check_records(path).faults == ()
    records = read_records(path).records
    if name == "refcoco":
        assert [(r.image.name, r.metadata["phrase"]) for r in records] == [("a.jpg", d[0]) for d in DRAWN["a.jpg"]]
        found = {"a.jpg": [(o.desc, *o.values) for r in records for o in r.objects], "b.jpg": []}
    else:
        found = {r.image.name: [(o.desc, *o.values) for o in r.objects] for r in records}
    assert found.keys() == DRAWN.keys()
    for image, boxes in DRAWN.items():
        assert [d[0] for d in found[image]] == [d[0] for d in boxes]
        for got, drawn in zip(found[image], boxes, strict=True):
            assert got[1:] == pytest.approx(drawn[1:], abs=exact or 1e-12)


@pytest.mark.parametrize("name", WRITERS)
def test_doctor_knows_the_format_and_reads_the_same_boxes(tmp_path, name):
    source = source_of(name, tmp_path / "in")
    assert detect(head_of(source)) == name
    read = read_source_of(source)
    assert (read.boxes.format, len(read.boxes.values), read.problem) == (name, 2, None)
    if name not in ("refcoco",):
        assert (read.boxes.sides == [W, H]).all()


def spoil(path: Path) -> None:
    """Most of the file is gone, and with it its meaning."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 4] + b"\x00{[<")


@pytest.mark.parametrize("name", WRITERS)
def test_a_broken_twin_is_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    source, (_, options, _) = source_of(name, tmp_path / "in"), WRITERS[name]
    for path in (tmp_path / "in").rglob("*"):
        if path.is_file() and path.suffix not in (".jpg", ".png"):
            spoil(path)
    flags = [word for key, value in options.items() for word in (f"--{key}", value)]
    code, out, err = call(monkeypatch, capsys, "data", "import", name, source, "--out", tmp_path / "o", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


BODIES = int(os.environ.get("COORDEXP_FUZZ_BODIES", "12"))
SPARE = [
    None,
    True,
    -1,
    0,
    1e300,
    10**400,
    "",
    "x\n",
    "é\ud800",
    [],
    {},
    [[]],
    [1, 2, 3],
    {"a": 1},
    "1",
    "nan",
    "../../etc",
    "\0",
    [None] * 4,
]


def change(rng, value, depth=0):
    """A copy of a JSON value with one part of it replaced, removed or repeated."""
    if rng.random() < 0.12 + 0.1 * depth or not isinstance(value, dict | list) or not value:
        return rng.choice(SPARE)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: change(rng, value[key], depth + 1)}
    at = rng.randrange(len(value))
    if rng.random() < 0.2:
        return value[:at] + [value[at]] * rng.randrange(3) + value[at + 1 :]
    return [*value[:at], change(rng, value[at], depth + 1), *value[at + 1 :]]


def mangle(rng, text):
    """A text with some of its characters replaced, removed or repeated."""
    for _ in range(rng.randrange(1, 4)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice((1, 3, 20)))
        text = (
            text[:a]
            + rng.choice(("", text[a:b] * 2, "<", "&x;", "\0", "\x1b", "{", "-", ": *a\n", "!!python/name:os.system", "9" * 30, "é"))
            + text[b:]
        )
    return text


@pytest.mark.parametrize("name", WRITERS)
def test_no_body_makes_an_import_fail_otherwise_than_in_one_line(tmp_path, name):
    source, (_, options, _) = source_of(name, tmp_path / "in", MORE), WRITERS[name]
    paths = [p for p in sorted((tmp_path / "in").rglob("*")) if p.is_file() and p.suffix not in (".jpg", ".png")]
    kept = {path: path.read_text() for path in paths}
    rng = random.Random(name)
    for i in range(BODIES):
        path = rng.choice(paths)
        text = kept[path]
        if path.suffix == ".json" and rng.random() < 0.8:
            body = json.dumps(change(rng, json.loads(text)))
        elif path.suffix == ".jsonl" and rng.random() < 0.8:
            body = lines(change(rng, json.loads(line)) for line in text.splitlines())
        elif path.suffix == ".yaml" and rng.random() < 0.6:
            body = yaml.safe_dump(json.loads(json.dumps(change(rng, yaml.safe_load(text)), default=str).replace("\\ud800", "")))
        else:
            body = mangle(rng, text)
        path.write_bytes(body.encode("utf-8", "surrogatepass"))
        out = tmp_path / f"o{i}"
        refused = ""
        try:
            import_data(name, source, out, ImportOptions(**options))
        except (DataError, ConfigError) as error:
            refused = str(error)
        assert len(refused.splitlines()) <= 1, (body, refused)
        assert bool(refused) is not out.exists(), body
        for records in out.glob("*.jsonl"):
            assert check_records(records).faults == (), body
        path.write_text(text)


def test_coco_boxes_come_from_outlines_and_masks_where_there_are_none(tmp_path):
    from pycocotools import mask

    shape = np.zeros((H, W), dtype=np.uint8, order="F")
    shape[10:40, 20:90] = 1
    shape[60:71, 100:103] = 1
    packed = mask.encode(shape)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[-1], shape.ravel(order="F"), [-1]]).astype(int)))).tolist()
    forms = {
        "outline": ([[20, 10, 60.5, 10, 60.5, 50]], (20, 10, 60.5, 50)),
        "two parts": ([[20, 10, 60, 10, 60, 50], [90, 60, 95, 60, 95, 70]], (20, 10, 95, 70)),
        "packed mask": ({"size": [H, W], "counts": packed["counts"].decode()}, (20, 10, 103, 71)),
        "plain mask": ({"size": [H, W], "counts": runs}, (20, 10, 103, 71)),
    }
    assert mask.toBbox(packed).tolist() == [20, 10, 83, 61]
    for name, (segmentation, box) in forms.items():
        source = coco(tmp_path / name, DRAWN)
        picture(tmp_path / name / "val2017/a.jpg")
        picture(tmp_path / name / "val2017/b.jpg")
        content = json.loads(source.read_text())
        for empty in ({}, {"bbox": None}, {"bbox": []}, {"bbox": [0, 0, 0, 0]}):
            item = {"id": 1, "image_id": 0, "category_id": 1, "segmentation": segmentation, "iscrowd": int("mask" in name), **empty}
            write(source, {**content, "annotations": [item]})
            out = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
            import_data("coco", source, out)
            (found,) = read_records(out / "val.jsonl").records[0].objects
            assert (found.values, found.crowd) == (box, "mask" in name), (name, empty)


@pytest.mark.parametrize("folder", ["data", "images", "."])
def test_fiftyone_and_flat_folders_of_coco_are_found(tmp_path, folder):
    source = coco(tmp_path / "x", DRAWN, "labels.json")
    source.rename(tmp_path / "labels.json")
    for image in DRAWN:
        picture(tmp_path / folder / image)
    report = import_data("coco", tmp_path, tmp_path / "out")
    assert (sum(report.splits.values()), report.objects) == (2, 2)


def test_area_crowd_and_ignored_objects_are_carried_on(tmp_path):
    source = coco(tmp_path / "in", DRAWN)
    content = json.loads(source.read_text())
    content["annotations"][0].update(area="321.5", iscrowd=1)
    content["annotations"][1].update(area=0, ignore=1)
    write(source, content)
    for image in DRAWN:
        picture(tmp_path / "in/val2017" / image)
    report = import_data("coco", tmp_path / "in", tmp_path / "out")
    cat, dog = read_records(tmp_path / "out/val.jsonl").records[0].objects
    assert ((cat.area, cat.crowd, cat.difficult), (dog.area, dog.crowd, dog.difficult)) == ((321.5, True, False), (None, False, True))
    assert (report.crowd, report.difficult, cat.taught, dog.taught) == (1, 1, False, False)


def test_lvis_files_bring_what_federated_evaluation_needs(tmp_path):
    from coordexp.data.importers.base import Job
    from coordexp.data.importers.coco import read

    size = {"width": W, "height": H}
    url = "http://images.example/"
    images = [
        {"id": 1, "coco_url": f"{url}val2017/a.jpg", "neg_category_ids": [2], "not_exhaustive_category_ids": [3], **size},
        {"id": 2, "coco_url": f"{url}train2017/b.jpg", "neg_category_ids": [], "not_exhaustive_category_ids": [], **size},
    ]
    cat = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [20, 10, 40, 40], "area": 900.5, "segmentation": [[20, 10, 60, 10, 60, 50]]}
    known = ((1, "cat", "f"), (2, "dog", "r"), (3, "eel", "c"))
    content = {"images": images, "annotations": [cat], "categories": [{"id": i, "name": n, "frequency": f} for i, n, f in known]}
    for split, image in (("val2017", "a.jpg"), ("train2017", "b.jpg"), ("train2017", "a.jpg")):
        picture(tmp_path / "in" / split / image)
    source = write(tmp_path / "in/annotations/lvis_v1_val.json", content)
    assert [split.name for split in read(Job(source, ImportOptions()))] == ["val"]
    import_data("coco", source, tmp_path / "out")
    a, b = read_records(tmp_path / "out/val.jsonl").records
    assert (a.image, b.image) == (tmp_path / "in/val2017/a.jpg", tmp_path / "in/train2017/b.jpg")
    assert a.metadata == {
        "neg_categories": ["dog"],
        "not_exhaustive_categories": ["eel"],
        "category_frequency": {"cat": "f", "dog": "r", "eel": "c"},
    }
    assert b.metadata == {"neg_categories": [], "not_exhaustive_categories": []}
    assert (a.objects[0].area, a.objects[0].values) == (900.5, (20, 10, 60, 50))


def test_openimages_and_other_tables(tmp_path):
    picture(tmp_path / "0a1b.jpg")
    write(tmp_path / "class-descriptions-boxable.csv", "/m/01yrx,Cat\n/m/0bt9lr,Dog\n")
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
    rows = "0a1b,xclick,/m/01yrx,1,0.1,0.3,0.1,0.5,0,0,0,0,0\n0a1b,xclick,/m/0bt9lr,1,0.5,1,0.2,1,0,0,1,0,0\n"
    source = write(tmp_path / "train-annotations-bbox.csv", head + rows)
    import_data("csv", source, tmp_path / "oi")
    objects = read_records(tmp_path / "oi/train.jsonl").records[0].objects
    assert [(o.desc, o.values, o.crowd) for o in objects] == [("Cat", (20, 10, 60, 50), False), ("Dog", (100, 20, 200, 100), True)]
    tables = {
        "image;label;x_min;y_min;x_max;y_max\n0a1b.jpg;Cat;20;10;60;50\n": {},
        "\ufeffimage_id,x,y,w,h,Class\n0a1b,20,10,40,40,Cat\n": {},
        "path/0a1b.jpg,20,10,60,50,Cat\n": {},
        "image_id\twidth\theight\tbbox\tname\n0a1b\t200\t100\t[20.0, 10, 40, 40]\tCat\n": {"layout": "xywh"},
        "image,bbox\n0a1b.jpg,\"[20, 10, 60, 50]\"\n": {"layout": "xyxy", "name": "Cat"},
        "image,left,top,width,height,label\n0a1b.jpg,20,10,40,40,Cat\n": {},
        "image,xmin,ymin,xmax,ymax,label\n0a1b.jpg,100,100,300,500,Cat\n": {"coords": "norm1000"},
    }
    for i, (text, options) in enumerate(tables.items()):
        import_data("csv", write(tmp_path / "t.csv", text), tmp_path / f"t{i}", ImportOptions(**options))
        (path,) = (tmp_path / f"t{i}").glob("*.jsonl")
        assert [(o.desc, o.values) for o in read_records(path).records[0].objects] == [("Cat", (20, 10, 60, 50))], text
    with pytest.raises(ConfigError, match="--layout"):
        import_data("csv", write(tmp_path / "t.csv", 'image,bbox,label\n0a1b.jpg,"20 10 60 50",x\n'), tmp_path / "no")


def test_refcoco_as_refer_and_hugging_face_have_it(tmp_path):
    picture(tmp_path / "images/COCO_train2014_000000000009.jpg")
    instances = {
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": W, "height": H}],
        "annotations": [{"id": 77, "image_id": 9, "category_id": 1, "bbox": [20, 10, 40, 40]}],
    }
    refs = [
        {"ref_id": i, "ann_id": 77, "image_id": 9, "split": split, "file_name": "COCO_train2014_000000000009_77.jpg",
         "sentences": [{"sent_id": 1, "sent": "left cat", "raw": "Left cat"}, {"sent_id": 2, "sent": "the cat", "raw": "the cat"}]}
        for i, split in enumerate(("train", "testA"))
    ]  # fmt: skip
    write(tmp_path / "instances.json", instances)
    write(tmp_path / "refs(unc).json", refs)
    report = import_data("refcoco", tmp_path, tmp_path / "out")
    assert report.splits == {"train": 2, "testA": 2}
    records = read_records(tmp_path / "out/testA.jsonl").records
    assert [(r.metadata["phrase"], [(o.desc, o.values) for o in r.objects]) for r in records] == [
        (phrase, [(phrase, (20, 10, 60, 50))]) for phrase in ("left cat", "the cat")
    ]
    raw = json.dumps({"bbox": [20, 10, 40, 40], "image_id": 9})
    row = {
        "image_path": "images/COCO_train2014_000000000009.jpg",
        "sentences": [{"sent": "left cat"}],
        "raw_anns": raw,
        "bbox": [20, 10, 60, 50],
    }
    import_data("refcoco", write(tmp_path / "rows/val.jsonl", json.dumps(row)), tmp_path / "hf", ImportOptions(images=tmp_path / "images"))
    assert read_records(tmp_path / "hf/val.jsonl").records[0].objects[0].values == (20, 10, 60, 50)
    plain = write(tmp_path / "rows/test.jsonl", json.dumps({"image": row["image_path"], "sent": "left cat", "bbox": [20, 10, 40, 40]}))
    with pytest.raises(ConfigError, match="--layout: expected xyxy, xywh"):
        import_data("refcoco", plain, tmp_path / "no")
    (tmp_path / "p").mkdir()
    (tmp_path / "p/refs(unc).p").write_bytes(b"\x80\x03cos\nsystem\n.")
    for target in (tmp_path / "p", tmp_path / "p/refs(unc).p"):
        with pytest.raises(DataError, match="got a pickle, which can run programs"):
            import_data("refcoco", target, tmp_path / "no")


def test_shapes_of_the_annotation_tools(tmp_path):
    picture(tmp_path / "a.jpg")
    circle = {"label": "c", "points": [[50, 50], [50, 60]], "shape_type": "circle"}
    poly = {"label": "p", "points": [[1, 2], [30, 2], [20, 40]], "shape_type": "polygon", "difficult": True}
    line = {"label": "l", "points": [[1, 2], [30, 2]], "shape_type": "line"}
    write(tmp_path / "lm/a.json", {"shapes": [circle, poly, line, circle, circle], "imagePath": "a.jpg"})
    report = import_data("labelme", tmp_path / "lm", tmp_path / "o1", ImportOptions(images=tmp_path))
    objects = read_records(tmp_path / "o1/all.jsonl").records[0].objects
    assert [(o.desc, o.geometry, o.values, o.difficult) for o in objects[:2]] == [
        ("c", "bbox_2d", (40, 40, 60, 60), False), ("p", "poly", (1, 2, 30, 2, 20, 40), True)
    ]  # fmt: skip
    assert "got a line of 2 points" in report.dropped[0]
    sheared = {
        "x": 50,
        "y": 50,
        "width": 10,
        "height": 10,
        "rotation": 90,
        "rectanglelabels": ["r"],
        "original_width": W,
        "original_height": H,
    }
    point = {"x": 5, "y": 10, "width": 1, "keypointlabels": ["k"], "original_width": W, "original_height": H}
    write(tmp_path / "ls/min.json", [{"image": "http://host/x/a.jpg", "id": 4, "label": [sheared, point]}])
    import_data("labelstudio", tmp_path / "ls/min.json", tmp_path / "o2", ImportOptions(images=tmp_path))
    rotated, key = read_records(tmp_path / "o2/min.jsonl").records[0].objects
    assert rotated.values == pytest.approx((100, 50, 100, 70, 90, 70, 90, 50))
    assert (key.geometry, key.values) == ("point_2d", (10, 10))
    outline = {"name": "polygon", "all_points_x": [1, 30, 20], "all_points_y": [2, 2, 40]}
    oval = {"name": "ellipse", "cx": 50, "cy": 50, "rx": 10, "ry": 5}
    regions = {
        "0": {"shape_attributes": outline, "region_attributes": {"kind": "x", "label": {"p": True, "q": False}}},
        "1": {"shape_attributes": oval, "region_attributes": {"label": "e"}},
    }
    write(tmp_path / "via.json", {"a.jpg1": {"filename": "a.jpg", "size": 1, "regions": regions}})
    import_data("via", tmp_path / "via.json", tmp_path / "o3")
    assert [(o.desc, o.values) for o in read_records(tmp_path / "o3/via.jsonl").records[0].objects] == [
        ("p", (1, 2, 30, 2, 20, 40)), ("e", (40, 45, 60, 55))
    ]  # fmt: skip


def test_tasks_with_several_annotations_are_not_guessed(tmp_path):
    region = {
        "type": "rectanglelabels",
        "original_width": W,
        "original_height": H,
        "value": {"x": 10, "y": 10, "width": 20, "height": 40, "rectanglelabels": ["cat"]},
    }
    tasks = [
        {"id": i, "data": {"image": name}, "annotations": done}
        for i, (name, done) in enumerate({
            "a.jpg": [{"result": [region], "ground_truth": True}, {"result": []}],
            "b.jpg": [{"result": [region]}, {"result": []}],
            "c.jpg": [{"result": [region], "was_cancelled": True}, {"result": [region]}],
            "d.jpg": [],
        }.items())
    ]  # fmt: skip
    for name in "abcd":
        picture(tmp_path / f"{name}.jpg")
    report = import_data("labelstudio", write(tmp_path / "t.json", tasks), tmp_path / "o")
    assert [r.image.name for r in read_records(tmp_path / "o/t.jsonl").records] == ["a.jpg", "c.jpg"]
    assert report.left_out["t"]["reasons"] == {"images: several annotations": 1}


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs the extra parquet")
def test_parquet_files_bring_their_images_and_names(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def image(color):
        out = io.BytesIO()
        Image.new("RGB", (W, H), color).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": "same.png"}

    rows = [
        {
            "image_id": i,
            "image": image(color),
            "width": W,
            "height": H,
            "objects": {"bbox": boxes, "category": [1] * len(boxes), "area": areas},
        }
        for i, (color, boxes, areas) in enumerate([("red", [[20.0, 10, 40, 40]], [1600.0]), ("blue", [], [])])
    ]
    features = {
        "objects": {
            "feature": {"category": {"_type": "ClassLabel", "names": ["x", "cat"]}, "bbox": {"_type": "Sequence"}},
            "_type": "Sequence",
        }
    }
    made = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "in/data").mkdir(parents=True)
    parquet.write_table(made, tmp_path / "in/data/train-00000-of-00001.parquet")
    report = import_data("hf", tmp_path / "in", tmp_path / "out")
    assert (report.splits, report.classes) == ({"train": 2}, {"cat": 1})
    a, b = read_records(tmp_path / "out/train.jsonl").records
    assert ([(o.desc, o.values, o.area) for o in a.objects], b.objects) == ([("cat", (20, 10, 60, 50), 1600)], ())
    assert [Image.open(r.image).getpixel((0, 0)) for r in (a, b)] == [(255, 0, 0), (0, 0, 255)]
    assert json.loads((tmp_path / "out/import.json").read_text())["image_roots"] == []
    spoil(tmp_path / "in/data/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="expected a parquet file"):
        import_data("hf", tmp_path / "in", tmp_path / "no")


def test_a_source_of_another_format_is_named(tmp_path):
    source = source_of("createml", tmp_path / "in")
    with pytest.raises(DataError, match="it looks like createml: CreateML JSON"):
        import_data("coco", source, tmp_path / "o")


def test_the_table_of_formats_in_the_docs_is_whole():
    text = (Path(__file__).parents[1] / "docs/formats.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.partition("## Imports")[2].partition("## The answer")[0], re.MULTILINE) == list(WRITERS)
