"""Other people's layouts, one case each, made here as they were found: read right, or refused in one line with the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from command import call
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import check_records, read_records
from coordexp.doctor.data import check_data
from coordexp.errors import DataError

CAT, DOG = ("cat", (10, 20, 40, 60)), ("dog", (100, 100, 150, 160))
YOLO_CAT, YOLO_DOG = ("cat", (240, 120, 400, 360)), ("dog", (128, 96, 192, 144))
LABELS = "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.1 0.1\n"


def picture(path: Path, size=(640, 480)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", size).convert("L").save(path)
    return path


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(kind, source, out, **options):
    """The report, and by split and image name the objects."""
    report = import_data(kind, source, out, ImportOptions(**options))
    found = {}
    for path in sorted(out.glob("*.jsonl")):
        assert check_records(path).faults == ()
        found[path.stem] = [(r.image.name, [(o.desc, o.values) for o in r.objects]) for r in read_records(path).records]
    return report, found


def coco(images=("a.jpg", "b.jpg"), ids=(1, 2), *, bbox=(10, 20, 30, 40), **changes):
    content = {
        "images": [{"id": i, "file_name": name, "width": 640, "height": 480} for i, name in zip(ids, images, strict=True)],
        "annotations": [
            {"id": 1, "image_id": ids[0], "category_id": 1, "bbox": list(bbox) if isinstance(bbox, tuple) else bbox, "iscrowd": 0},
            {"id": 2, "image_id": ids[1], "category_id": 1, "bbox": [10, 20, 30, 40], "iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return {**content, **changes}


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["images\\1/90-a.jpg", "images\\1/91-b.jpg"], "images/90-a.jpg images/91-b.jpg"),
        (["..\\..\\label-studio\\media\\upload\\4\\cb06-a.png", "..\\..\\upload\\4\\cb07-b.png"], "images/cb06-a.png images/cb07-b.png"),
        (["/data/local-files/?d=set%2F90%20a.jpg", "https://host.example/up/b.jpg?x=1"], "images/set/90 a.jpg images/b.jpg"),
        (["C:\\photos\\A.JPG", "deep/er/b.jpeg"], "images/a.jpg images/b.jpg"),
        (["/mnt/x/1/cb06aa11-a.jpg", "one/b.jpg"], "images/a.jpg images/one/b.jpg"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_an_image_is_found_by_its_name_however_its_path_is_written(tmp_path, names, folder, given):
    files = ["".join(f"{part}.") + suffix for part, suffix in (f.rsplit(".", 1) for f in folder.split(" images/"))]
    files = [name if name.startswith("images/") else f"images/{name}" for name in files]
    for name in files:
        picture(tmp_path / name)
    source = write(tmp_path / "instances.json", coco(names))
    _, found = read("coco", source, tmp_path / "out", images=tmp_path / "images" if given else None)
    assert [name for name, _ in found["instances"]] == [Path(name).name for name in files]


def test_two_images_that_fit_a_name_alike_are_not_guessed(tmp_path):
    for name in ("x/a.jpg", "y/a.jpg", "b.jpg"):
        picture(tmp_path / name)
    write(tmp_path / "instances.json", coco())
    report, found = read("coco", tmp_path / "instances.json", tmp_path / "out")
    assert found == {"instances": [("b.jpg", [CAT])]}
    assert "expected one image a.jpg, got x/a.jpg and y/a.jpg" in report.dropped[0]
    write(tmp_path / "instances.json", coco(("y/a.jpg", "b.jpg")))
    assert len(read("coco", tmp_path / "instances.json", tmp_path / "out2")[1]["instances"]) == 2


def pair(folder: Path) -> Path:
    picture(folder / "a.jpg")
    picture(folder / "b.jpg")
    return folder / "instances.json"


@pytest.mark.parametrize("ids", [("1", "2"), (1.0, 2.0), ("01", "02"), (1, 2), ("x", "y")])
@pytest.mark.parametrize("category", [1, "1", 1.0, "cat"])
def test_ids_are_matched_as_text(tmp_path, ids, category):
    content = coco()
    for i, item in enumerate(content["annotations"]):
        item.update(image_id=ids[i], category_id=category)
    if ids[0] == "x":
        for i, item in enumerate(content["images"]):
            item.update(id=ids[i])
    _, found = read("coco", write(pair(tmp_path), content), tmp_path / "out")
    assert found == {"instances": [("a.jpg", [CAT]), ("b.jpg", [CAT])]}


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([float("nan"), 20, 30, 40], "expected finite numbers, got [nan, 20, 30, 40]"),
        ([None, 20, 30, 40], "expected finite numbers, got [None, 20, 30, 40]"),
        (["x", 20, 30, 40], "expected finite numbers"),
        ([1e400, 20, 30, 40], "expected finite numbers"),
        ({"x": 10, "y": 20, "width": 30, "height": 40}, "expected a list of numbers"),
        ("10 20 30 40", "expected a list of numbers"),
        ([10, 20, 30], "expected 4 numbers, got 3"),
        (None, "expected [x, y, width, height], got none"),
        ([10, 20, -30, 40], "expected a box that extends in x and in y"),
        ([600, 20, 90, 40], "expected a box inside the 640x480 image"),
        ([[10, 20], [30, 40]], "expected finite numbers"),
    ],
)
def test_one_bad_box_costs_itself_and_its_image_is_no_background(tmp_path, bad, why):
    report, found = read("coco", write(pair(tmp_path), coco(bbox=bad)), tmp_path / "out")
    assert found == {"instances": [("b.jpg", [CAT])]}
    assert [line.split(" (a.jpg): ")[0] for line in report.dropped] == ["instances.json: annotation id 1", "instances.json: image 1"]
    assert why in report.dropped[0]
    assert report.left_out["instances"]["objects_lost"] == 1
    with pytest.raises(DataError, match="annotation id 1"):
        import_data("coco", tmp_path / "instances.json", tmp_path / "o2", ImportOptions(on_invalid="error"))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        (("annotations", 0, "bbox"), ["10", "20.0", " 30", "4e1"]),
        (("images", 0, "width"), 640.0),
        (("images", 0, "width"), "640"),
        (("images", 0, "height"), 0),
        (("images", 0, "height"), None),
        (("categories", 0, "id"), "1"),
        (("annotations", 0, "iscrowd"), "0"),
        (("annotations", 0, "iscrowd"), None),
        (("annotations", 0, "segmentation"), {"counts": "garbage", "size": [1]}),
        (("images", 0, "license"), {"a": [1]}),
        (("annotations", 0, "id"), None),
    ],
)
def test_what_is_unambiguous_is_read(tmp_path, change, value):
    content = coco()
    content[change[0]][change[1]][change[2]] = value
    source = write(pair(tmp_path), "\ufeff" + json.dumps(content))
    assert read("coco", source, tmp_path / "out")[1] == {"instances": [("a.jpg", [CAT]), ("b.jpg", [CAT])]}


def test_numeric_names_are_names(tmp_path):
    _, found = read("coco", write(pair(tmp_path), coco(categories=[{"id": 1, "name": 7}])), tmp_path / "out")
    assert [items[0][0] for _, items in found["instances"]] == ["7", "7"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"categories": [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]},
            "categories: expected an id once, got 1 as 'cat' and as 'dog'",
        ),
        ({"categories": [{"id": "1", "name": "cat"}, {"id": 1, "name": "dog"}]}, "got 1 as 'cat' and as 'dog'"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 1, "file_name": "b.jpg"}]},
            "images: expected an id once, got 1 as 'a.jpg' and",
        ),
        ({"images": []}, "images: expected at least one"),
        ({"annotations": None}, "got none as annotations"),
    ],
)
def test_what_is_ambiguous_is_refused_in_one_line(tmp_path, monkeypatch, capsys, changes, says):
    source = write(pair(tmp_path), {**coco(), **changes})
    code, out, err = call(monkeypatch, capsys, "data", "import", "coco", source, "--out", tmp_path / "o")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not (tmp_path / "o").exists()


def test_boxes_of_another_layout_stop_with_the_cause_and_doctor_says_the_same(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "a.png", (640, 640))
    boxes = [(155, 288, 346, 265), (242, 79, 352, 284), (69, 74, 259, 252), (0, 1, 341, 635), (343, 31, 293, 588), (58, 77, 478, 427)]
    rows = [{"messages": [], "images": ["a.png"], "objects": {"ref": ["apple"], "bbox": [[*box]]}} for box in boxes]
    source = write(tmp_path / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ("data", "import", "swift", source, "--coords", "absolute", "--out", tmp_path / "o")
    code, _, err = call(monkeypatch, capsys, *words)
    assert (code, err.count("\n")) == (2, 1)
    assert "2 of 6 objects (33%) left out: 2 reversed or empty: the boxes look like [x, y, width, height], not [x1, y1, x2, y2]" in err
    check = check_data(source)[0]
    assert check.outcome == "fail"
    assert "an import would stop: split 'train': 2 of 6 objects (33%) left out" in check.seen
    # What is left is taken when it is asked for, without the images that lost all they had; validate goes on saying it.
    code, out, _ = call(monkeypatch, capsys, *words, "--allow-loss")
    assert (code, "4 train images, 4 objects" in out) == (0, True)
    code, out, _ = call(monkeypatch, capsys, "data", "validate", tmp_path / "o/train.jsonl")
    assert (code, "warning: the import left out 2 of 6 objects and 2 of 6 images: 2 reversed or empty" in out) == (0, True)
    assert "the import left out 2 of 6 objects" in check_data(tmp_path / "o/train.jsonl")[0].seen


@pytest.mark.parametrize(
    ("bbox", "options", "says"),
    [
        ([0.1, 0.2, 0.3, 0.4], {"coords": "absolute"}, "no number of its 3 boxes is above 1: they look like shares of the side (0..1)"),
        ([100, 700, 990, 1000], {"coords": "absolute"}, "the numbers look like 0..1000 of each side (--coords norm1000)"),
    ],
)
def test_numbers_of_another_unit_stop_with_the_cause(tmp_path, bbox, options, says):
    picture(tmp_path / "a.png")
    row = {"messages": [], "images": ["a.png"], "objects": {"ref": ["x"] * 3, "bbox": [bbox] * 3}}
    with pytest.raises(DataError) as caught:
        import_data("swift", write(tmp_path / "train.jsonl", json.dumps(row)), tmp_path / "o", ImportOptions(**options))
    assert says in str(caught.value)


def turns(*texts):
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt") * len(texts), texts, strict=False)]


LOCATE = "<image>\nLocate house in this image and output the bbox coordinates in JSON format."
BOX = [43, 240, 150, 426]
MAN = '{"bbox_2d": [43, 240, 150, 426], "label": "man"}'
DOG_TOO = [("man", BOX), ("dog", (1, 2, 3, 4))]
REGION = "<image>bounding box of the region this sentence describes: "
QWEN2 = "<|object_ref_start|>man<|object_ref_end|><|box_start|>(43,240),(150,426)<|box_end|>"
# By spelling: the turns, and what they hold.
ANSWERS = {
    "no label": ([LOCATE, '{\n"bbox_2d": [135, 114, 1016, 672]\n}'], [("house", (135, 114, 1016, 672))]),
    "bbox": ([LOCATE, '[{"bbox": [43, 240, 150, 426], "label": "man"}]'], [("man", BOX)]),
    "text_content": ([LOCATE, '[{"bbox_2d": [43, 240, 150, 426], "text_content": "OPEN"}]'], [("OPEN", BOX)]),
    "box_2d, y first": ([LOCATE, '[{"box_2d": [240, 43, 426, 150], "label": "man"}]'], [("man", BOX)]),
    "repeated keys": ([LOCATE, MAN[:-1] + ', "bbox_2d": [1, 2, 3, 4], "label": "dog"}'], DOG_TOO),
    "fence and words": ([LOCATE, f"Here it is:\n```json\n[{MAN}]\n```\nDone."], [("man", BOX)]),
    "tags": ([LOCATE, f"<think>[hm]</think><answer>{MAN}</answer>"], [("man", BOX)]),
    "several boxes": ([LOCATE, '{"bbox_2d": [[43, 240, 150, 426], [1, 2, 3, 4]], "label": "a"}'], [("a", BOX), ("a", (1, 2, 3, 4))]),
    "names as keys": ([LOCATE, '{"man": [43, 240, 150, 426], "dog": [[1, 2, 3, 4]]}'], DOG_TOO),
    "bare list": (["<image>Detect the red car.", "[43, 240, 150, 426]"], [("red car", BOX)]),
    "Qwen2-VL": (["<image>find", QWEN2], [("man", BOX)]),
    "InternVL": (["find <ref>x</ref>", "<ref>man</ref><box>[[43, 240, 150, 426]]</box><ref>dog</ref><box>[[1,2,3,4]]</box>"], DOG_TOO),
    "InternVL, two boxes": ([LOCATE, "<ref>a</ref><box>[[43, 240, 150, 426],[1, 2, 3, 4]]</box>"], [("a", BOX), ("a", (1, 2, 3, 4))]),
    "named by the question": ([REGION + "<ref>red hat</ref>", "<box>[[43, 240, 150, 426]]</box>"], [("red hat", BOX)]),
    "MiniCPM": (["<image>find", "<ref>man</ref><box>43 240 150 426</box>"], [("man", BOX)]),
    "DeepSeek-VL2": (["find", "<|ref|>man<|/ref|><|det|>[[43, 240, 150, 426]]<|/det|>"], [("man", BOX)]),
    "as Python prints it": ([LOCATE, "[{'bbox_2d': [43, 240, 150, 426], 'label': 'man'}]"], [("man", BOX)]),
    "two turns": (["<image> find man", f"[{MAN}]", "find dog", '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]'], DOG_TOO),
    "a turn in words": (["<image>hi", "Hello.", "find man", f"[{MAN}]"], [("man", BOX)]),
    "nothing there": (["<image>find man", "[]"], []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_chat_models_are_read_in_every_spelling(tmp_path, name):
    texts, expected = ANSWERS[name]
    conversations = turns(*texts)
    picture(tmp_path / "a.png", (1200, 800))
    other = turns("find", '[{"bbox_2d": [1, 2, 3, 4], "label": "z"}]')
    rows = [{"image": "a.png", "conversations": talk} for talk in (conversations, other)]
    source = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _, found = read("qwen", source, tmp_path / "out", coords="absolute")
    assert found["d"][0][1] == [(desc, tuple(box)) for desc, box in expected]
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": [{"type": "text", "text": t["value"]}]} for t in conversations
    ]
    write(source, json.dumps({"images": [{"path": "a.png"}], "messages": messages}) + "\n" + json.dumps(rows[1]))
    assert read("qwen", source, tmp_path / "again", coords="absolute")[1]["d"][0][1] == [(desc, tuple(box)) for desc, box in expected]


def test_an_answer_without_a_name_or_a_box_is_no_background(tmp_path):
    picture(tmp_path / "a.png", (1200, 800))
    texts = ("[[43, 240, 150, 426]]", "There is none, I think.", '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]')
    rows = [{"image": "a.png", "conversations": turns("What is it?", text)} for text in texts]
    source = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    report, found = read("qwen", source, tmp_path / "out", coords="absolute")
    assert found == {"d": [("a.png", [("a", (1, 2, 3, 4))])]}
    assert report.left_out["d"]["reasons"] == {"no name": 1, "images: all objects left out": 1}
    assert "split 'd': 1 rows without any box left out" in report.warnings
    _, found = read("qwen", source, tmp_path / "named", coords="absolute", name="thing")
    assert found["d"][0] == ("a.png", [("thing", (43, 240, 150, 426))])


def test_refs_of_ms_swift_belong_to_boxes_by_place(tmp_path):
    picture(tmp_path / "b.png")
    two = [[90.9, 160.8, 135, 212.8], [360.9, 480.8, 495, 532.8]]
    item = '{"bbox_2d": <bbox>, "label": "<ref-object>"}'
    cases = [
        (("Locate the <ref-object>", f"[{item}, {item}]"), ["sheep", "ram", "ewe"], ["ram", "ewe"]),
        (("Find <ref-object>.", "<bbox><bbox>"), ["sheep"], ["sheep", "sheep"]),
        (("Find <ref-object> and <ref-object>.", "<bbox>, <bbox>"), ["ram", "ewe"], ["ram", "ewe"]),
        (("Find them.", '[{"bbox_2d": <bbox>, "label": "ram"}, {"bbox_2d": <bbox>, "label": "ewe"}]'), [], ["ram", "ewe"]),
        (("<image>Detect sheep.", "<bbox> <bbox>"), [], [None, None]),
        (("plain", "words"), ["ram", "ewe"], ["ram", "ewe"]),
    ]
    for i, ((question, answer), refs, names) in enumerate(cases):
        messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        row = {"messages": messages, "images": ["b.png"], "objects": {"ref": refs, "bbox": two}}
        picture(tmp_path / "b.png", (600, 600))
        source = write(tmp_path / "d.jsonl", json.dumps(row))
        _, found = read("swift", source, tmp_path / f"o{i}", coords="absolute", name="unnamed")
        assert found["d"][0][1] == [(name or "unnamed", tuple(box)) for name, box in zip(names, two, strict=True)]


def xml(*objects, filename="x.jpg", more=""):
    body = "".join(
        f"<object><name>{name}</name>{extra}<bndbox>"
        + "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        + "</bndbox></object>"
        for name, box, extra in objects
    )
    return f"<annotation><filename>{filename}</filename><size><width>640</width><height>480</height></size>{more}{body}</annotation>"


TWO = xml(("cat", (11, 21, 40, 60), ""), ("dog", (101, 101, 150, 160), "<difficult>1</difficult>"))
BOTH = {"train": ["a.jpg"], "val": ["a.jpg"]}
# By layout: places of XML and image for each split, and what is found.
VOC = {
    "annotations and images": (["annotations/a.xml", "images/a.jpg"], {"all": ["a.jpg"]}),
    "side by side, by split": (["train/a.xml", "train/a.jpg", "valid/b.xml", "valid/b.jpg"], {"train": ["a.jpg"], "val": ["b.jpg"]}),
    "beside, one folder": (["a.xml", "a.jpg", "b.xml", "b.PNG"], {"all": ["a.jpg", "b.PNG"]}),
    "devkit": (["VOCdevkit/VOC2007/Annotations/a.xml", "VOCdevkit/VOC2007/JPEGImages/a.jpg"], {"all": ["a.jpg"]}),
    "folders by split": (
        [f"{kind}/{s}/a.{end}" for s in ("train", "val") for kind, end in (("Annotations", "xml"), ("JPEGImages", "jpg"))],
        BOTH,
    ),
    "split holds both": (
        [f"{s}/{kind}/a.{end}" for s in ("train", "val") for kind, end in (("annotations", "xml"), ("images", "jpg"))],
        BOTH,
    ),
}


@pytest.mark.parametrize("name", VOC)
def test_pascal_voc_in_every_layout(tmp_path, name):
    files, expected = VOC[name]
    for file in files:
        if file.endswith(".xml"):
            write(tmp_path / "v" / file, TWO)
        else:
            picture(tmp_path / "v" / file)
    report, found = read("voc", tmp_path / "v", tmp_path / "out")
    assert found == {split: [(image, [CAT, DOG]) for image in images] for split, images in expected.items()}
    assert (report.warnings, report.difficult) == ((), sum(map(len, expected.values())))


@pytest.mark.parametrize("line", ["{}", "{}.jpg", "JPEGImages/{}.jpg", "{} 1", "{}  -1", "./Annotations/{}.xml", "C:\\x\\{}.jpg"])
def test_lists_of_pascal_voc_name_images_in_every_way(tmp_path, line):
    for name in ("a", "b b"):
        write(tmp_path / f"Annotations/{name}.xml", TWO)
        picture(tmp_path / f"JPEGImages/{name}.jpg")
    write(tmp_path / "ImageSets/Main/train.txt", line.format("a") + "\n")
    write(tmp_path / "ImageSets/Main/val.txt", "b b\n")
    _, found = read("voc", tmp_path, tmp_path / "out")
    assert found == {"train": [("a.jpg", [CAT, DOG])], "val": [("b b.jpg", [CAT, DOG])]}


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("utf-8", ""),
        ("utf-8-sig", '<?xml version="1.0" encoding="utf-8"?>'),
        ("utf-16", ""),
        ("gbk", '<?xml version="1.0" encoding="gbk"?>'),
        ("utf-16", '<?xml version="1.0" encoding="utf-16"?>'),
        ("latin-1", '<?xml version="1.0" encoding="ISO-8859-1"?>'),
        ("cp1252", ""),
    ],
)
def test_pascal_voc_in_every_encoding(tmp_path, encoding, head):
    name = "猫" if encoding in ("gbk", "utf-16", "utf-8") else "café"
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_bytes((head + TWO.replace("cat", name)).encode(encoding))
    assert read("voc", tmp_path, tmp_path / "out")[1]["all"] == [("a.jpg", [(name, CAT[1]), DOG])]


def test_pascal_voc_that_counts_from_0_is_said_and_read_when_asked_for(tmp_path):
    write(tmp_path / "Annotations/a.xml", xml(("cat", ("0.00", 0.36, 40.1, 60.2), ""), ("dog", (100.5, 100.7, "640.0", "480.0"), "")))
    picture(tmp_path / "JPEGImages/a.jpg")
    report, found = read("voc", tmp_path, tmp_path / "zero", origin=0)
    assert found["all"][0][1] == [("cat", (0, 0.36, 40.1, 60.2)), ("dog", (100.5, 100.7, 640, 480))]
    assert report.warnings == ()
    report, found = read("voc", tmp_path, tmp_path / "one")
    assert len(found["all"][0][1]) == 2
    assert "speak for pixels counted from 0" in report.warnings[0]
    assert read("voc", tmp_path, tmp_path / "sure", origin=1)[0].warnings == ()


YAML = "names: ['cat', 'dog']\nnc: 2\ntrain: {0}train/images\nval: {0}valid/images\n"


def halves(image="{0}/images/{1}.jpg", label="{0}/labels/{1}.txt", **files):
    """Image and labels of a split of one image each, at these places."""
    places = [place.format(*names) for names in (("train", "a"), ("valid", "b")) for place in (image, label)]
    texts = {name.replace("__", "."): text for name, text in files.items()}
    return {**texts, **{place: LABELS if place.endswith(".txt") else "" for place in places}}


DATA = "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
LISTS = {"train__txt": "data/obj_train_data/a.jpg\n", "valid__txt": "data/obj_valid_data/b.jpg"}
YOLO = {
    "labels": halves(data__yaml=YAML.format("")),
    "Labels": halves(label="{0}/Labels/{1}.txt", data__yaml=YAML.format("")),
    "beside": halves(label="{0}/images/{1}.txt", data__yaml=YAML.format("")),
    "labels in the image's folder": halves("{0}/{1}.jpg", data__yaml=YAML.format("").replace("/images", "")),
    "IMAGES": halves(
        "Images/{0}/{1}.JPG", "LABELS/{0}/{1}.txt", d__yml="names: {'0': cat, 1: dog}\ntrain: Images/train\nval: Images/valid\n"
    ),
    "path of another machine": halves(data__yaml="path: /content/set\n" + YAML.format("")),
    "../ and a split that is missing": halves(data__yaml="test: ../test/images\n" + YAML.format("../")),
    "Darknet": halves("obj_{0}_data/{1}.jpg", "obj_{0}_data/{1}.txt", obj__data=DATA, obj__names="cat\ndog\n", **LISTS),
    "Roboflow Darknet": halves("{0}/{1}.jpg", "{0}/{1}.txt", **{f"{s}/_darknet__labels": "cat\ndog" for s in ("train", "valid")}),
    "classes.txt": halves("images/{0}/{1}.jpg", "labels/{0}/{1}.txt", classes__txt="cat\ndog\n"),
    "lists": halves(
        s__yml="names: [cat, dog]\ntrain: [t.txt]\nval: v.txt\n", t__txt="./train/images/a.jpg\n", v__txt="valid\\images\\b.jpg\n"
    ),
}


def tree(folder: Path, files) -> Path:
    for name, text in files.items():
        if text:
            write(folder / name, text)
        else:
            picture(folder / name)
    return folder


@pytest.mark.parametrize("name", YOLO)
def test_yolo_in_every_layout(tmp_path, name):
    report, found = read("yolo", tree(tmp_path / "y", YOLO[name]), tmp_path / "out")
    assert {split: [(image.lower(), items) for image, items in images] for split, images in found.items()} == {
        "train": [("a.jpg", [YOLO_CAT, YOLO_DOG])], "val": [("b.jpg", [YOLO_CAT, YOLO_DOG])]
    }  # fmt: skip
    told = {"path of another machine": "path: '/content/set' is not here", "../ and a split that is missing": "test: expected a folder"}
    assert [told.get(name, "-") in line for line in report.warnings] == [True] * (name in told)
    if "missing" in name:
        report, found = read("yolo", tmp_path / "y", tmp_path / "two", splits=("train", "valid"))
        assert (sorted(found), report.warnings) == (["train", "val"], ())
        with pytest.raises(DataError, match=r"test: expected a folder or a list file, got '\.\./test/images'"):
            import_data("yolo", tmp_path / "y", tmp_path / "three", ImportOptions(splits=("test",)))


def test_a_yolo_split_without_any_labels_stops_and_names_the_folder_that_has_them(tmp_path, monkeypatch, capsys):
    source = tree(tmp_path / "y", YOLO["labels"])
    (source / "train/labels").rename(source / "train/lables")
    code, _, err = call(monkeypatch, capsys, "data", "import", "yolo", source, "--out", tmp_path / "o")
    assert (code, err.count("\n")) == (2, 1)
    assert "split 'train': 1 images and not one file of labels: " in err
    assert "but lie in train/lables: rename that folder to labels" in err
    check = check_data(source)[0]
    assert (check.outcome, "not one file of labels" in check.seen) == ("fail", True)
    code, out, _ = call(monkeypatch, capsys, "data", "import", "yolo", source, "--out", tmp_path / "o", "--allow-loss")
    assert (code, "warning: split 'train': 1 images and not one file of labels" in out) == (0, True)
    shutil.rmtree(source / "train/lables")
    with pytest.raises(DataError, match=r"looked for a\.txt beside train/images/a\.jpg and in labels for images"):
        import_data("yolo", source, tmp_path / "o2")


def test_names_of_yolo_classes_are_text_and_a_number_has_one(tmp_path):
    text = "names: [no, 007, null]\ntrain: train/images\nval: null\ntest:\n"
    source = tree(
        tmp_path / "y", {**YOLO["labels"], "data.yaml": text, "train/labels/a.txt": "0 .5 .5 .25 .5\n1 .5 .5 .2 .5\n2 .5 .5 .1 .5\n"}
    )
    _, found = read("yolo", source, tmp_path / "out")
    assert (list(found), [desc for desc, _ in found["train"][0][1]]) == (["train"], ["no", "007", "null"])
    for keys in ("{0: cat, 0: dog}", "{0: cat, '0': dog}"):
        write(source / "data.yaml", f"names: {keys}\ntrain: train/images\n")
        with pytest.raises(DataError, match=r"got 0 as 'cat' and as 'dog'"):
            import_data("yolo", source, tmp_path / "o2")


def test_a_split_without_an_image_is_left_out_unless_asked_for(tmp_path):
    source = tree(tmp_path / "y", {**YOLO["labels"], "data.yaml": YAML.format("") + "test: test/images\n"})
    (source / "test/images").mkdir(parents=True)
    report, found = read("yolo", source, tmp_path / "out")
    assert (sorted(found), report.warnings) == (["train", "val"], ("split 'test' has no image: left out",))
    with pytest.raises(DataError, match="at least one usable image in split 'test'"):
        import_data("yolo", source, tmp_path / "o2", ImportOptions(splits=("test",)))


def test_yolo_rows_of_other_kinds(tmp_path):
    rows = "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n1 0.1 0.1 0.5 0.1 0.3 0.5\n0.0 0.5 0.5 0.25 0.5\n0 0.5 0.5 0.25 0.5 0.9\n"
    source = tree(tmp_path / "y", {**YOLO["labels"], "train/labels/a.txt": rows})
    report = import_data("yolo", source, tmp_path / "out")
    objects = read_records(tmp_path / "out/train.jsonl").records[0].objects
    assert [(o.desc, o.geometry, o.values) for o in objects] == [
        ("cat", "poly", (64, 48, 320, 48, 320, 240, 64, 240)),
        ("dog", "poly", (64, 48, 320, 48, 192, 240)),
        ("cat", "bbox_2d", YOLO_CAT[1]),
    ]
    assert "got 5: a score (then these are predictions) or an angle" in report.dropped[0]
    tree(source, {"data.yaml": "kpt_shape: [2, 3]\n" + YAML.format(""), "train/labels/a.txt": "0 0.5 0.5 0.25 0.5 0.1 0.1 2 0.2 0.2 2\n"})
    assert read("yolo", source, tmp_path / "points")[1]["train"][0][1] == [YOLO_CAT]


def test_links_out_of_the_source_are_followed_when_asked_for(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "store/a.jpg")
    source = tree(tmp_path / "y", {"data.yaml": "names: [cat, dog]\ntrain: images\n", "labels/a.txt": LABELS})
    (source / "images").mkdir()
    (source / "images/a.jpg").symlink_to(tmp_path / "store/a.jpg")
    code, _, err = call(monkeypatch, capsys, "data", "import", "yolo", source, "--out", tmp_path / "o")
    assert (code, "--follow-links takes it" in err) == (2, True)
    _, found = read("yolo", source, tmp_path / "out", follow_links=True)
    assert found == {"train": [("a.jpg", [YOLO_CAT, YOLO_DOG])]}
    assert json.loads((tmp_path / "out/import.json").read_text())["image_roots"] == [str((tmp_path / "store").resolve())]


def test_several_files_go_into_one_folder_in_one_call_and_in_several(tmp_path, monkeypatch, capsys):
    for part in ("p", "q"):
        write(pair(tmp_path / part), coco())
    one, two = tmp_path / "p/instances.json", tmp_path / "q/instances.json"
    _, found = read("coco", [one, two], tmp_path / "one", splits=("train",))
    assert [name for name, _ in found["train"]] == ["a.jpg", "b.jpg", "a.jpg", "b.jpg"]
    records = read_records(tmp_path / "one/train.jsonl").records
    assert len({r.image_id for r in records}) == len({r.image for r in records}) == 4
    for name, source in (("train", one), ("val", two)):
        words = ("data", "import", "coco", source, "--split", name, "--out", tmp_path / "two", "--add")
        assert call(monkeypatch, capsys, *words)[0] == 0
    assert [len(read_records(tmp_path / f"two/{name}.jsonl").records) for name in ("train", "val")] == [2, 2]
    summary = json.loads((tmp_path / "two/import.json").read_text())
    assert [entry["splits"] for entry in summary["imports"]] == [{"train": 2}, {"val": 2}]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, _, err = call(monkeypatch, capsys, *words)
    assert (code, "val.jsonl is there already" in err, sorted(path.name for path in tmp_path.rglob("*"))) == (2, True, before)


def test_boxes_that_leave_the_image_are_left_out_or_cut(tmp_path):
    source = write(pair(tmp_path), coco(bbox=(600, 400, 100, 100)))
    assert read("coco", source, tmp_path / "drop")[1] == {"instances": [("b.jpg", [CAT])]}
    report, found = read("coco", source, tmp_path / "clip", clip=True)
    assert found["instances"][0] == ("a.jpg", [("cat", (600, 400, 640, 480))])
    assert "cut at the border of the 640x480 image, was [600, 400, 700, 500]" in report.repaired[0]
    with pytest.raises(DataError, match="annotation id 1"):
        import_data("coco", write(source, coco(bbox=(700, 400, 100, 100))), tmp_path / "far", ImportOptions(clip=True, on_invalid="error"))


def test_printed_lines_are_capped_and_all_stand_in_import_json(tmp_path, monkeypatch, capsys):
    content = coco()
    good = content["annotations"][1]
    content["annotations"] += [{**good, "id": i} for i in range(3, 100)] + [{**good, "id": 100 + i, "category_id": 9} for i in range(15)]
    code, out, _ = call(monkeypatch, capsys, "data", "import", "coco", write(pair(tmp_path), content), "--out", tmp_path / "o")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 11
    assert lines[-1].startswith("left out: ... and 5 more, all in ")
    assert "instances: 15 of 114 objects and 0 of 2 images left out: 15 unknown category" in out
    assert len(json.loads((tmp_path / "o/import.json").read_text())["imports"][0]["dropped"]) == 15
