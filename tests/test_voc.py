"""Pascal VOC import: the pixel convention, splits, what is left out and how it is reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from coordexp.data.importers.base import ImportOptions
from coordexp.data.importers.formats import import_data
from coordexp.data.records import read_records, verify_images
from coordexp.errors import ConfigError, DataError

BCCD = Path(__file__).parents[1].parent / "shared" / "data" / "bccd"


def import_voc(source: Path, out: Path, *, overwrite=False, progress=None, **options):
    return import_data("voc", source, out, ImportOptions(**options), overwrite=overwrite, progress=progress)


def add(folder: Path, image_id: str, *boxes, size=(40, 32), suffix=".jpg", extra="") -> None:
    for name in ("Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32)).save(folder / "JPEGImages" / f"{image_id}{suffix}")
    objects = "".join(
        f"<object><name>{name}</name>{more}<bndbox><ymax>{y2}</ymax><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax></bndbox></object>"
        for name, x1, y1, x2, y2, *rest in boxes
        for more in ["".join(rest)]
    )
    text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}{extra}</annotation>"
    (folder / "Annotations" / f"{image_id}.xml").write_text(text)


def add_list(folder: Path, name: str, *ids: str) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids))


def test_pixels_counted_from_1_become_edges(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>12</xmax><ymax>12</ymax></bndbox></part>"
    boxes = [("cell", 1, 1, 40, 32, "<difficult>0</difficult>"), ("dog", 3, 4.5, 10, 12, "<difficult>1</difficult>", part)]
    add(tmp_path / "voc", "i1", *boxes)
    report = import_voc(tmp_path / "voc", tmp_path / "out")
    (record,) = read_records(tmp_path / "out" / "all.jsonl").records
    assert [(o.desc, o.values, o.difficult) for o in record.objects] == [("cell", (0, 0, 40, 32), False), ("dog", (2, 3.5, 10, 12), True)]
    assert (record.image_id, record.width, record.height) == ("i1", 40, 32)
    assert record.metadata == {"annotation": "i1.xml"}
    assert (report.splits, report.objects, report.classes, report.dropped) == ({"all": 1}, 2, {"cell": 1, "dog": 1}, ())
    assert record.image.read_bytes() == (tmp_path / "voc" / "JPEGImages" / "i1.jpg").read_bytes()


def test_every_split_list_is_one_file_and_trainval_only_stands_in_for_its_halves(tmp_path):
    voc = tmp_path / "voc"
    for i in "abcd":
        add(voc, i, ("x", 2, 2, 9, 9), suffix=".png" if i == "d" else ".jpg")
    add_list(voc, "trainval", "a", "b")
    add_list(voc, "test", "c", "", "d")
    assert import_voc(voc, tmp_path / "o1").splits == {"trainval": 2, "test": 2}
    add_list(voc, "train", "b")
    add_list(voc, "val", "a")
    seen = []
    assert import_voc(voc, tmp_path / "o2", progress=lambda *p: seen.append(p)).splits == {"train": 1, "val": 1, "test": 2}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(os.listdir(tmp_path / "o2")) == [".coordexp.json", "images", "import.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    assert [r.image.name for r in read_records(tmp_path / "o2" / "test.jsonl").records] == ["c.jpg", "d.png"]


@pytest.mark.parametrize(
    ("box", "why"),
    [
        (("x", 5, 5, 5, 9), "i.xml: object 2 (x): expected a box that extends in x and in y, got [5, 5, 5, 9]"),
        (("x", 5, 9, 7, 8), "i.xml: object 2 (x): expected a box that extends in x and in y"),
        (("x", -1, 5, 9, 9), "i.xml: object 2 (x): expected a box inside the 40x32 image, got [-2.0, 4.0, 9.0, 9.0] (--clip"),
        (("x", 5, 5, 42, 9), "i.xml: object 2 (x): expected a box inside the 40x32 image"),
        (("x", "nan", 5, 9, 9), "i.xml: object 2 (x): expected four finite numbers"),
        (("x", "", 5, 9, 9), "i.xml: object 2 (x): expected four finite numbers, got xmin=none"),
        (("", 5, 5, 9, 9), "i.xml: object 2 (no name): expected a name, got none"),
    ],
)
def test_an_unusable_object_is_left_out_and_named_or_stops_the_import(tmp_path, box, why):
    add(tmp_path / "voc", "i", ("x", 2, 2, 9, 9), box, ("y", 3, 3, 9, 9))
    report = import_voc(tmp_path / "voc", tmp_path / "skip")
    assert len(report.dropped) == 1
    assert report.dropped[0].startswith(why)
    assert (report.objects, report.classes) == (2, {"x": 1, "y": 1})
    assert [o.desc for o in read_records(tmp_path / "skip" / "all.jsonl").records[0].objects] == ["x", "y"]
    with pytest.raises(DataError) as caught:
        import_voc(tmp_path / "voc", tmp_path / "error", on_invalid="error")
    assert str(caught.value).startswith(why)
    assert sorted(os.listdir(tmp_path)) == ["skip", "voc"]


def break_xml(voc):
    (voc / "Annotations" / "i.xml").write_text("<annotation><object>")


def add_entity(voc):
    (voc / "Annotations" / "i.xml").write_text(
        '<!DOCTYPE a [<!ENTITY x "boom">]><annotation><object><name>&x;</name></object></annotation>'
    )


def add_entity_in_utf16(voc):
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY x "boom">]><annotation/>'
    (voc / "Annotations" / "i.xml").write_bytes(text.encode("utf-16"))


def other_root(voc):
    (voc / "Annotations" / "i.xml").write_text("<html/>")


def other_size(voc):
    add(voc, "i", size=(41, 32))


def no_image(voc):
    (voc / "JPEGImages" / "i.jpg").unlink()


def two_images(voc):
    (voc / "JPEGImages" / "i.png").touch()


def no_annotation(voc):
    (voc / "Annotations" / "i.xml").unlink()


def no_jpeg(voc):
    (voc / "JPEGImages" / "i.jpg").write_text("not an image")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (break_xml, "i.xml: expected XML, got a file that fails with"),
        (add_entity, "i.xml: expected plain XML, got a document type declaration"),
        (add_entity_in_utf16, "i.xml: expected plain XML, got a document type declaration"),
        (other_root, "i.xml: expected an <annotation>, got <html>"),
        (other_size, "i.xml: width: expected the image's 40 pixels, got 41"),
        (no_image, "i.xml: expected an image inside"),
        (two_images, "i.xml: expected one image JPEGImages/i, got JPEGImages/i.jpg and JPEGImages/i.png"),
        (no_annotation, "expected an id with an XML file, got 'i': i.xml is not there"),
        (no_jpeg, "i.xml: expected an image file, got something else at"),
    ],
)
def test_an_unusable_image_is_left_out_and_named_or_stops_the_import(tmp_path, damage, why):
    voc = tmp_path / "voc"
    add(voc, "good", ("x", 2, 2, 9, 9))
    add(voc, "i", ("x", 2, 2, 9, 9))
    add_list(voc, "train", "i", "good")
    damage(voc)
    report = import_voc(voc, tmp_path / "out")
    assert report.splits == {"train": 1}
    assert len(report.dropped) == 1
    assert report.dropped[0].removeprefix("train.txt:1: ").startswith(why)
    with pytest.raises(DataError, match="--on-invalid skip"):
        import_voc(voc, tmp_path / "error", on_invalid="error")


def test_an_annotation_may_leave_the_size_to_the_image(tmp_path):
    add(tmp_path / "voc", "i", ("x", 2, 2, 40, 32), size=(0, 0))
    assert import_voc(tmp_path / "voc", tmp_path / "out", on_invalid="error").objects == 1


def test_an_image_in_two_splits_twice_in_one_or_in_another_folder_is_reported(tmp_path):
    voc = tmp_path / "voc"
    for i in "ab":
        add(voc, i)
    add_list(voc, "train", "a", "b", "a")
    add_list(voc, "test", "b", "../b")
    report = import_voc(voc, tmp_path / "out")
    assert report.splits == {"train": 2, "test": 1}
    assert [line for line in report.warnings if "no image has" not in line] == [
        "test.txt:1: b.xml: expected an image in one split, b.jpg is also in train (train.txt:2: b.xml)"
    ]
    assert report.dropped == (
        "train.txt:3: a.xml: expected an image once, got 'a' again (first at train.txt:1: a.xml)",
        "test.txt:2: expected an id with an XML file, got 'b': b.xml is not there",
    )


def test_images_are_links_or_copies_and_a_refused_link_says_what_to_do(tmp_path, monkeypatch):
    add(tmp_path / "voc", "i")
    source = tmp_path / "voc" / "JPEGImages" / "i.jpg"
    import_voc(tmp_path / "voc", tmp_path / "linked")
    link = tmp_path / "linked" / "images" / "i.jpg"
    assert link.is_symlink()
    assert link.samefile(source)
    import_voc(tmp_path / "voc", tmp_path / "copied", copy=True)
    copy = tmp_path / "copied" / "images" / "i.jpg"
    assert not copy.is_symlink()
    assert copy.read_bytes() == source.read_bytes()

    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(DataError, match=r"cannot be linked to i.jpg \(Operation not permitted\): import with --copy"):
        import_voc(tmp_path / "voc", tmp_path / "refused")
    assert sorted(os.listdir(tmp_path)) == ["copied", "linked", "voc"]


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    add(tmp_path / "voc", "i")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a folder with XML annotations"):
        import_voc(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ConfigError, match="on_invalid"):
        import_voc(tmp_path / "voc", tmp_path / "out", on_invalid="warn")
    import_voc(tmp_path / "voc", tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        import_voc(tmp_path / "voc", tmp_path / "out")
    import_voc(tmp_path / "voc", tmp_path / "out", overwrite=True)
    break_xml(tmp_path / "voc")
    with pytest.raises(DataError, match=r"at least one usable image in split 'all', got none: i.xml"):
        import_voc(tmp_path / "voc", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["out", "voc"]


def test_blood_cells_import_whole_but_for_two_degenerate_boxes(tmp_path):
    if not BCCD.is_dir():
        pytest.skip(f"the blood cell images are not at {BCCD}")
    report = import_voc(BCCD, tmp_path / "out")
    assert report.splits == {"train": 205, "val": 87, "test": 72}
    assert (report.objects, report.classes) == (4886, {"Platelets": 361, "RBC": 4153, "WBC": 372})
    assert sorted(problem.split(": expected")[0] for problem in report.dropped) == [
        "BloodImage_00338.xml: object 13 (RBC)",
        "BloodImage_00343.xml: object 4 (RBC)",
    ]
    records = [r for split in report.splits for r in read_records(tmp_path / "out" / f"{split}.jsonl").records]
    assert len(records) == 364
    values = [v for r in records for o in r.objects for v in o.values]
    assert (min(values), max(values)) == (0, 640)
    verify_images(records[:3])
