"""COCO, YOLO, ms-swift and Qwen imports: exact pixels, repairs and drops by place, refusals, and where images may lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from command import call
from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import check_records, read_records
from coordexp.errors import DataError

SIZE = (200, 100)


def picture(path: Path, size=SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    return path


def imported(kind, source, out, split, **options):
    report = import_data(kind, source, out, ImportOptions(**options))
    path = out / f"{split}.jsonl"
    assert check_records(path).faults == ()
    return report, read_records(path).records


def objects(record):
    return [(o.desc, o.geometry, o.values, o.crowd) for o in record.objects]


def coco(folder: Path, **changes) -> Path:
    picture(folder / "val2017" / "a.jpg")
    picture(folder / "val2017" / "sub" / "b.jpg")
    content = {
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 3,
                "bbox": [10, 20.5, 30, 40],
                "iscrowd": 0,
                "segmentation": [[10, 20, 40, 20, 40, 60]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 5,
                "bbox": [0, 0, 200, 100],
                "iscrowd": 1,
                "segmentation": {"counts": [1], "size": [1, 1]},
            },
            {
                "id": 3,
                "image_id": 7,
                "category_id": 3,
                "bbox": [190, 90, 10.5, 10],
                "segmentation": [[1, 1, 2, 2, 3, 1], [5, 5, 6, 6, 7, 5]],
            },
            {"id": 4, "image_id": 7, "category_id": 3, "bbox": [5, 5, 0, 9]},
            {"id": 5, "image_id": 7, "category_id": 3, "bbox": [190, 5, 20, 9]},
            {"id": 6, "image_id": 7, "category_id": 9, "bbox": [1, 1, 2, 2]},
            {"id": 7, "image_id": 99, "category_id": 3, "bbox": [1, 1, 2, 2]},
        ],
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 200, "height": 100},
            {"id": 8, "file_name": "sub/b.jpg", "width": 200, "height": 100},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "crowd of dogs"}],
        **changes,
    }
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return folder


def test_coco_boxes_crowds_repairs_and_drops(tmp_path):
    report, (a, b) = imported("coco", coco(tmp_path / "c"), tmp_path / "out", "val", allow_loss=True)
    assert objects(a) == [
        ("cat", "bbox_2d", (10, 20.5, 40, 60.5), False),
        ("crowd of dogs", "bbox_2d", (0, 0, 200, 100), True),
        ("cat", "bbox_2d", (190, 90, 200, 100), False),
    ]
    assert (a.image_id, b.image_id, b.objects) == ("7", "8", ())
    assert b.image == (tmp_path / "c/val2017/sub/b.jpg").resolve()
    assert (report.splits, report.objects, report.crowd, report.classes) == ({"val": 2}, 3, 1, {"cat": 2, "crowd of dogs": 1})
    assert report.repaired == (
        "instances_val2017.json: annotation id 3 (a.jpg): bbox_2d: moved onto the border of the 200x100 image, was [190, 90, 200.5, 100]",
    )
    assert [line.split(": expected")[0] for line in report.dropped] == [
        "instances_val2017.json: annotation id 7: image_id",
        "instances_val2017.json: annotation id 4 (a.jpg)",
        "instances_val2017.json: annotation id 5 (a.jpg)",
        "instances_val2017.json: annotation id 6 (a.jpg): category_id",
    ]
    summary = json.loads((tmp_path / "out/import.json").read_text())
    assert summary["imports"][0]["dropped"] == list(report.dropped)
    assert report.left_out["val"]["reasons"] == {
        "unknown image id": 1, "reversed or empty": 1, "outside the image": 1, "unknown category": 1
    }  # fmt: skip
    assert summary["image_roots"] == [str((tmp_path / "c/val2017").resolve())]


def test_coco_outlines_of_one_part_become_polygons_and_others_stay_boxes_with_a_warning(tmp_path):
    report, (a, _) = imported("coco", coco(tmp_path / "c"), tmp_path / "out", "val", polygons=True, allow_loss=True)
    assert objects(a)[0] == ("cat", "poly", (10, 20, 40, 20, 40, 60), False)
    assert [o[1] for o in objects(a)[1:]] == ["bbox_2d", "bbox_2d"]
    assert [line.split(": seg")[0].split("annotation ")[1] for line in report.warnings if "segmentation" in line] == [
        f"id {i} (a.jpg)" for i in (3, 4, 5)
    ]


def test_a_coco_file_alone_finds_its_images_or_takes_them_from_the_user(tmp_path):
    source = coco(tmp_path / "c")
    (source / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="name the folder that holds it with --images"):
        import_data("coco", source / "annotations/instances_val2017.json", tmp_path / "out")
    options = {"images": tmp_path / "elsewhere", "splits": ("mine",), "allow_loss": True}
    report, _ = imported("coco", source / "annotations/instances_val2017.json", tmp_path / "out", "mine", **options)
    assert report.splits == {"mine": 2}


def yolo(
    folder: Path, labels="1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.9 0.1 0.5 0.8\n", text="names: {0: leaf, 1: cat}\ntrain: images/train\n"
) -> Path:
    picture(folder / "images/train/a.png")
    picture(folder / "images/train/deep/b.png")
    (folder / "labels/train").mkdir(parents=True, exist_ok=True)
    (folder / "labels/train/a.txt").write_text(labels)
    (folder / "data.yaml").write_text(text)
    return folder


def test_yolo_centres_and_outlines_become_pixels_and_images_without_labels_are_backgrounds(tmp_path):
    report, (a, b) = imported("yolo", yolo(tmp_path / "y"), tmp_path / "out", "train")
    assert objects(a) == [("cat", "bbox_2d", (80, 30, 120, 70), False), ("leaf", "poly", (20, 10, 180, 10, 100, 80), False)]
    assert (a.image_id, b.image_id, b.objects) == ("train/a", "train/deep/b", ())
    assert (report.repaired, report.dropped) == ((), ())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("2 0.5 0.5 0.1 0.1", "expected a class among 0..1, got 2"),
        ("1 0.5 0.5 0.1", "expected class and 4 numbers, or class and at least 3 points, got 4 numbers"),
        ("1 0.9 0.5 0.5 0.1", "expected a box inside the 200x100 image"),
        ("1 0.5 0.5 0 0.1", "expected a box that extends in x and in y"),
        ("1 nan 0.5 0.1 0.1", "expected finite numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected finite numbers, got 'cat"),
    ],
)
def test_a_bad_yolo_line_is_dropped_by_file_and_line_or_stops(tmp_path, line, why):
    source = yolo(tmp_path / "y", f"1 0.5 0.5 0.2 0.4\n{line}\n")
    report, (a, _) = imported("yolo", source, tmp_path / "out", "train")
    assert len(a.objects) == len(report.dropped) == 1
    assert report.dropped[0].startswith(f"labels/train/a.txt:2: {why}")
    with pytest.raises(DataError, match=r"a\.txt:2: "):
        import_data("yolo", source, tmp_path / "stop", ImportOptions(on_invalid="error"))
    assert not (tmp_path / "stop").exists()


def chat(folder: Path, name: str, *rows) -> Path:
    picture(folder / "img/a.jpg")
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def swift_row(bbox, ref=("cat", "dog"), **more):
    return {
        "messages": [{"role": "user", "content": "<image>find"}],
        "images": ["img/a.jpg"],
        "objects": {"ref": list(ref), "bbox": bbox, **more},
    }


@pytest.mark.parametrize(
    ("bbox", "more", "options"),
    [
        ([[20, 10, 60, 50], [100, 50]], {}, {"coords": "absolute"}),
        ([[20, 10, 60, 50], [100, 50]], {"bbox_type": "real"}, {}),
        ([[100, 100, 300, 500], [500, 500]], {}, {"coords": "norm1000"}),
        ([[0.1, 0.1, 0.3, 0.5], [0.5, 0.5]], {"bbox_type": "norm1"}, {}),
    ],
)
def test_swift_conventions_give_the_same_pixels(tmp_path, bbox, more, options):
    _, (record,) = imported("swift", chat(tmp_path / "s", "train.jsonl", swift_row(bbox, **more)), tmp_path / "out", "train", **options)
    assert [o[:2] for o in objects(record)] == [("cat", "bbox_2d"), ("dog", "point_2d")]
    assert record.objects[0].values == pytest.approx((20, 10, 60, 50))
    assert record.objects[1].values == pytest.approx((100, 50))


def test_swift_rows_that_cannot_be_read_one_way_are_dropped_and_one_ref_serves_all(tmp_path):
    rows = [
        swift_row([[1, 2, 3, 4], [5, 6, 7, 8]], ref=["cat"]),
        swift_row([[1, 2, 3, 4]]),
        swift_row([[0.1, 0.2, 0.3, 0.4]] * 2, bbox_type="norm1"),
        swift_row([[1, 2, 3], [5, 6, 7, 8]]),
        {**swift_row([]), "images": ["img/a.jpg", "img/a.jpg"]},
    ]
    report, records = imported("swift", chat(tmp_path / "s", "x.jsonl", *rows), tmp_path / "out", "x", coords="absolute", allow_loss=True)
    assert [[o[0] for o in objects(r)] for r in records] == [["cat", "cat"], ["dog"]]
    assert [r.image_id for r in records] == ["img/a-1", "img/a-4"]
    assert [line.split(": expected")[0] for line in report.dropped] == [
        "x.jsonl:2: objects.ref", "x.jsonl:3: objects.bbox[0]", "x.jsonl:3: objects.bbox[1]", "x.jsonl:3", "x.jsonl:4: objects.bbox[0]",
        "x.jsonl:5: image",
    ]  # fmt: skip
    assert "a row that says norm1" in report.dropped[1]


ANSWER = (
    '[{"bbox_2d": [100, 100, 300, 500], "label": "cat"}, '
    '{"point_2d": [1000, 0], "label": "tip"}, {"bbox_2d": [1, 1, 2, 1001], "label": "x"}]'
)


@pytest.mark.parametrize(
    "row",
    [
        {
            "image": "img/a.jpg",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"```json\n{ANSWER}\n```"}],
        },
        {"images": ["img/a.jpg"], "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER}]},
        {"image": "img/a.jpg", "width": 200, "height": 100, "objects": json.loads(ANSWER)},
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_qwen_answers_of_every_shape_give_exact_pixels(tmp_path, row, suffix):
    path = chat(tmp_path / "q", f"train.{suffix}", row)
    if suffix == "json":
        path.write_text(json.dumps([row]))
    report, (record,) = imported("qwen", path, tmp_path / "out", "train", coords="norm1000")
    # 1001 of 1000 is a tenth of a pixel outside.
    assert objects(record) == [
        ("cat", "bbox_2d", (20, 10, 60, 50), False),
        ("tip", "point_2d", (200, 0), False),
        ("x", "bbox_2d", (0.2, 0.1, 0.4, 100), False),
    ]
    assert [line.split(": moved")[0] for line in report.repaired] == [f"train.{suffix}:1: objects[2]: bbox_2d"]
    with pytest.raises(DataError, match=r"got none: .*--coords norm1000"):
        import_data("qwen", path, tmp_path / "absolute", ImportOptions(coords="absolute"))


def _bad_sources(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    coco_file = coco(folder / "c") / "annotations/instances_val2017.json"
    coco_file.write_text(coco_file.read_text()[:-30])
    yolo(folder / "y", text="names: [a]\ntrain: images/none\n")
    (folder / "voc/Annotations").mkdir(parents=True)
    chat(folder / "s", "train.jsonl", swift_row([], bbox_type="norm7"))
    chat(folder / "q", "train.json", {})
    return {
        "coco": (folder / "c", []), "yolo": (folder / "y", []), "voc": (folder / "voc", []), "swift": (folder / "s", []),
        "qwen": (folder / "q", ["--coords", "absolute"]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc", "swift", "qwen"])
def test_a_bad_source_is_one_line_and_exit_code_2_and_nothing_is_left(tmp_path, kind, monkeypatch, capsys):
    source, flags = _bad_sources(tmp_path / "in")[kind]
    for target in (source, tmp_path / "nothing"):
        code, out, err = call(monkeypatch, capsys, "data", "import", kind, target, "--out", tmp_path / "o", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {target}")
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_import_says_what_it_did_and_repeats_it_as_json(tmp_path, monkeypatch, capsys):
    source = coco(tmp_path / "c")
    code, out, err = call(monkeypatch, capsys, "data", "import", "coco", source, "--out", tmp_path / "o", "--split", "val", "--allow-loss")
    assert (code, err) == (0, "")
    assert sum(line.startswith("left out: ") for line in out.splitlines()) == 4
    assert "2 val images, 3 objects (cat 2, crowd of dogs 1), 1 of them crowd regions written to" in out
    assert "1 warnings, 1 repaired, 4 left out" in out
    assert "val: 4 of 7 objects and 0 of 2 images left out: 1 unknown image id, 1 " in out
    code, out, _ = call(monkeypatch, capsys, "data", "import", "coco", source, "--out", tmp_path / "o2", "--json", "--allow-loss")
    assert json.loads(out)["objects"] == 3
    code, _, err = call(monkeypatch, capsys, "data", "import", "coco", source, "--out", tmp_path / "o3", "--split", "train")
    assert (code, err) == (2, f"error: --split: expected one of val, got 'train': {source} has no other\n")


@pytest.mark.parametrize("name", ["../secret.png", "/{}/secret.png", "link.png", "door/secret.png", "img/../../secret.png"])
def test_an_import_never_takes_an_image_from_outside_its_folder(tmp_path, name):
    secret = picture(tmp_path / "secret.png")
    row = {"image": name.replace("/{}", str(tmp_path)), "objects": []}
    path = chat(tmp_path / "q", "train.jsonl", row, {"image": "img/a.jpg", "objects": []})
    (tmp_path / "q/link.png").symlink_to(secret)
    (tmp_path / "q/door").symlink_to(tmp_path, target_is_directory=True)
    report = import_data("qwen", path, tmp_path / "out", ImportOptions(coords="absolute"))
    assert report.splits == {"train": 1}
    assert "train.jsonl:1: expected an image inside" in report.dropped[0]
    assert [p.name for p in (tmp_path / "out/images").rglob("*.*")] == ["a.jpg"]


def test_linked_images_are_read_only_from_the_folders_that_the_import_names(tmp_path):
    _, (record, _) = imported("yolo", yolo(tmp_path / "y"), tmp_path / "out", "train")
    out, secret = tmp_path / "out", picture(tmp_path / "secret.png")
    link = out / "images/train/a.png"
    assert link.is_symlink()
    assert record.image == (tmp_path / "y/images/train/a.png").resolve()

    def fault() -> str:
        (found,) = check_records(out / "train.jsonl").faults
        return found

    link.unlink()
    link.symlink_to(secret)
    assert "train.jsonl:1: images[0]: expected a path inside the folder of the record file" in fault()
    # A folder that is a link is no way out either, though it leads to a named place.
    link.unlink()
    link.symlink_to((tmp_path / "y/images/train/a.png").resolve())
    (out / "door").symlink_to(tmp_path / "y/images", target_is_directory=True)
    text = (out / "train.jsonl").read_text()
    (out / "train.jsonl").write_text(text.replace("images/train/a.png", "door/train/a.png"))
    assert "expected a path inside the folder" in fault()
    (out / "train.jsonl").write_text(text)
    (out / "import.json").unlink()
    assert len(check_records(out / "train.jsonl").faults) == 2
    (out / "import.json").write_text("{}")
    assert "image_roots: expected the list that an import writes" in check_records(out / "train.jsonl").faults[0]


def test_copied_images_need_no_links(tmp_path):
    imported("yolo", yolo(tmp_path / "y"), tmp_path / "out", "train", copy=True)
    assert json.loads((tmp_path / "out/import.json").read_text())["image_roots"] == []
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_annotations_that_count_pixels_before_the_rotation_are_dropped_and_said_so(tmp_path):
    source = coco(tmp_path / "c")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(source / "val2017/a.jpg", exif=exif)
    report, records = imported("coco", source, tmp_path / "out", "val", allow_loss=True)
    assert [r.image_id for r in records] == ["8"]
    assert "expected the image's 100 pixels, got 200: count size and boxes in the upright picture" in report.dropped[1]
