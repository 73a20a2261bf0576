"""Results of other programs: COCO, LVIS and YOLO results and chat answers give the numbers of the same boxes as predictions."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image

from command import call
from coordexp.data.importers.answers import objects_of_text
from coordexp.data.importers.base import RawObject
from coordexp.data.importers.formats import import_data
from coordexp.data.records import read_records
from coordexp.evaluate.foreign import read_foreign

W, H, IMAGES = 640, 480, 8


def truth(folder):
    """A COCO file with its images, imported; returns the boxes by image as (category id, xyxy)."""
    rng = np.random.default_rng(3)
    boxes = {}
    for i in range(IMAGES):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("L", (W, H)).save(folder / f"images/{i + 1:012d}.jpg")
        size = rng.uniform(40, 200, (4, 2))
        low = rng.uniform(0, 1, (4, 2)) * (np.array([W, H]) - size)
        boxes[i + 1] = [(int(c), box) for c, box in zip(rng.integers(1, 3, 4), np.hstack([low, low + size]).round(2).tolist(), strict=True)]
    annotations = [
        {"id": 10 * i + j, "image_id": i, "category_id": c, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for i, items in boxes.items()
        for j, (c, b) in enumerate(items)
    ]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": W, "height": H} for i in boxes]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    (folder / "instances_val.json").write_text(json.dumps(content))
    import_data("coco", folder / "instances_val.json", folder / "data")
    return boxes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    boxes = truth(folder)
    rng = np.random.default_rng(4)
    # Three of four are found, a little off, and one of them under the other name.
    found = {}
    for i, items in boxes.items():
        near = [(c, (np.array(b) + rng.normal(0, 2, 4)).round(2).tolist(), round(float(rng.random()), 3)) for c, b in items[:3]]
        found[i] = [(3 - c if j == 1 else c, b, s) for j, (c, b, s) in enumerate(near)]
    names = {1: "cat", 2: "dog"}
    rows = [
        {
            "image_id": record.image_id, "width": W, "height": H, "score_source": "results",
            "objects": [{"desc": names[c], "bbox_2d": b, "score": s} for c, b, s in found[int(record.image_id)]],
        }
        for record in read_records(folder / "data/val.jsonl").records
    ]  # fmt: skip
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, found, names


def results_of(folder, name, content):
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content))
    return path


def evaluate(monkeypatch, capsys, folder, path, out, *more):
    code, text, err = call(
        monkeypatch, capsys, "evaluate", path, "--data", folder / "data/val.jsonl", "--out", out, "--bootstrap", 0, *more
    )
    numbers = json.loads((out / "results.json").read_text()) if code == 0 else {}
    return code, text, err, {k: v for k, v in numbers.items() if k.startswith(("coco.", "detection."))}


def coco_results(found, change=lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]], key=lambda i: i):
    return [{"image_id": key(i), "category_id": c, "bbox": change(b), "score": s} for i, items in found.items() for c, b, s in items]


@pytest.mark.parametrize("key", [lambda i: i, str, lambda i: f"{i:012d}"])
def test_coco_results_give_the_numbers_of_the_same_predictions(made, tmp_path, monkeypatch, capsys, key):
    folder, found, _ = made
    own = evaluate(monkeypatch, capsys, folder, folder / "own.jsonl", tmp_path / "own")[3]
    assert own["coco.file.ap"] > 0.1
    code, out, _, numbers = evaluate(
        monkeypatch, capsys, folder, results_of(tmp_path, "coco_results.json", coco_results(found, key=key)), tmp_path / "e"
    )
    assert code == 0
    assert numbers.keys() == own.keys()
    assert all(numbers[k] == pytest.approx(own[k], abs=1e-9) for k in own)
    assert "coco_results.json: COCO results, 24 boxes read as [x, y, width, height] in pixels; names from " in out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: [b[0] / W, b[1] / H, (b[2] - b[0]) / W, (b[3] - b[1]) / H], "got 0..1 of each side: convert them first"),
        (lambda b: b, "got [x1, y1, x2, y2]: convert them first"),
        (lambda b: [b[0], b[1], None, 3], "bbox: expected four finite numbers"),
    ],
)
def test_results_that_are_something_else_are_named(made, tmp_path, monkeypatch, capsys, change, says):
    folder, found, _ = made
    path = results_of(tmp_path, "r.json", coco_results(found, change))
    code, _, err, _ = evaluate(monkeypatch, capsys, folder, path, tmp_path / "e")
    assert (code, err.count("\n"), says in err) == (2, 1, True), err
    assert not (tmp_path / "e").exists()


def test_names_come_from_the_file_that_is_given_and_are_missed_by_their_number(made, tmp_path, monkeypatch, capsys):
    folder, found, _ = made
    path = results_of(tmp_path, "r.json", [{**row, "category_id": row["category_id"] + 7} for row in coco_results(found)])
    code, _, err, _ = evaluate(monkeypatch, capsys, folder, path, tmp_path / "e")
    assert (code, "r.json[0]: category_id " in err, "pass --categories FILE" in err) == (2, True, True)
    names = results_of(tmp_path, "names.json", {"categories": [{"id": 8, "name": "cat"}, {"id": 9, "name": "dog"}]})
    assert evaluate(monkeypatch, capsys, folder, path, tmp_path / "e", "--categories", names)[0] == 0
    path = results_of(tmp_path, "r.json", [{**row, "image_id": 999} for row in coco_results(found)])
    assert "expected results of the images of" in evaluate(monkeypatch, capsys, folder, path, tmp_path / "e2")[2]


@pytest.mark.parametrize("kind", ["ms-swift", "LLaMA-Factory"])
def test_answers_of_chat_models_are_matched_and_scored(made, tmp_path, monkeypatch, capsys, kind):
    folder, found, names = made
    own = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    for row in own:
        row["score_source"] = None
        for item in row["objects"]:
            del item["score"]
    expected = evaluate(monkeypatch, capsys, folder, results_of(tmp_path, "own.jsonl", own), tmp_path / "own")[3]

    def answer(i):
        scaled = [
            {"bbox_2d": [v / side * 1000 for v, side in zip(b, (W, H, W, H), strict=True)], "label": names[c]} for c, b, _ in found[i]
        ]
        return f"```json\n{json.dumps(scaled)}\n```"

    if kind == "ms-swift":
        rows = [{"images": [{"path": f"/else/{i:012d}.jpg"}], "response": answer(i), "messages": []} for i in found]
    else:
        rows = [{"prompt": "find", "predict": answer(i), "label": ""} for i in found]
    path = results_of(tmp_path, "answers.jsonl", rows)
    assert "--coords: expected one of" in evaluate(monkeypatch, capsys, folder, path, tmp_path / "no")[2]
    code, out, _, numbers = evaluate(monkeypatch, capsys, folder, path, tmp_path / "e", "--coords", "norm1000")
    assert code == 0
    assert {k: v for k, v in numbers.items() if v is not None} == pytest.approx(
        {k: v for k, v in expected.items() if v is not None}, abs=1e-9
    )
    assert f"8 answers, matched {'by the names of their images' if kind == 'ms-swift' else 'in the order of the records'}" in out


def test_answers_of_ms_swift_in_coordinate_tokens_are_read_as_their_bins(made, tmp_path, monkeypatch, capsys):
    folder = made[0]
    own = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    rows = []
    for row in own:
        row["score_source"] = None
        bins = [[round(v / (W, H)[j % 2] * 999) for j, v in enumerate(item["bbox_2d"])] for item in row["objects"]]
        answer = [f'{{"desc": "{item["desc"]}", "bbox_2d": [{", ".join(f"<|coord_{k}|>" for k in box)}]}}'
                  for item, box in zip(row["objects"], bins, strict=True)]  # fmt: skip
        row["objects"] = [{"desc": o["desc"], "bbox_2d": [k / 999 * (W, H)[j % 2] for j, k in enumerate(box)]}
                          for o, box in zip(row["objects"], bins, strict=True)]  # fmt: skip
        response = f'{{"objects": [{", ".join(answer)}]}}'
        # As `swift infer` writes them: the row of the data set, its answer replaced, and the objects that it was given.
        turns = [{"role": "user", "content": "<image>Find"}, {"role": "assistant", "content": response}]
        images = [{"bytes": None, "path": f"/else/{int(row['image_id']):012d}.jpg"}]
        given = {"messages": turns, "images": images, "objects": {"ref": [], "bbox": []}}
        rows.append({"response": response, "labels": "x", "logprobs": None, **given})
    # One list is empty, one is cut off in its second object, one is prose.
    cut = rows[1]["response"][: rows[1]["response"].index("}, {") + 20]
    for i, (text, kept) in enumerate([('{"objects": []}', 0), (cut, 1), ("No.", 0)]):
        rows[i]["response"], own[i]["objects"] = text, own[i]["objects"][:kept]
    expected = evaluate(monkeypatch, capsys, folder, results_of(tmp_path, "own.jsonl", own), tmp_path / "own")[3]
    path = results_of(tmp_path, "infer.jsonl", rows[::-1])
    code, out, _, numbers = evaluate(monkeypatch, capsys, folder, path, tmp_path / "e")
    assert code == 0
    assert numbers == expected
    said = "8 answers, matched by the names of their images, 7 in coordinate tokens as norm999 and 1 without tokens; 1 without a box"
    assert said in out


def test_answers_about_an_image_of_several_records_go_by_their_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    Image.new("L", (W, H)).save(tmp_path / "data/a.jpg")
    box = [10, 20, 100, 200]
    records = [
        {"images": ["a.jpg"], "width": W, "height": H, "image_id": str(i), "metadata": {"phrase": name},
         "objects": [{"desc": name, "bbox_2d": [v + 50 * i for v in box]}]}
        for i, name in enumerate(("cat", "dog"))
    ]  # fmt: skip
    results_of(tmp_path, "data/val.jsonl", records)
    rows = [{"images": ["/x/a.jpg"], "response": json.dumps([{"bbox_2d": r["objects"][0]["bbox_2d"], "label": "it"}])} for r in records]
    path = results_of(tmp_path, "answers.jsonl", rows)
    code, out, _, _ = evaluate(monkeypatch, capsys, tmp_path, path, tmp_path / "e", "--coords", "absolute")
    numbers = json.loads((tmp_path / "e/results.json").read_text())
    assert (code, numbers["grounding.file.acc.50"], "matched in the order of the records" in out) == (0, 1.0, True), numbers
    path = results_of(tmp_path, "answers.jsonl", rows[:1])
    code, _, err, _ = evaluate(monkeypatch, capsys, tmp_path, path, tmp_path / "e2", "--coords", "absolute")
    assert (code, "got 2 records with that image and 1 rows in all" in err) == (2, True), err


def test_a_file_of_annotations_is_no_result(made, monkeypatch, capsys, tmp_path):
    folder = made[0]
    assert "got a COCO file of annotations" in evaluate(monkeypatch, capsys, folder, folder / "instances_val.json", tmp_path / "e")[2]


def yolo_shares(b):
    return [(b[0] + b[2]) / 2 / W, (b[1] + b[3]) / 2 / H, (b[2] - b[0]) / W, (b[3] - b[1]) / H]


def yolo_folder(folder, found, line=lambda c, b, s: [c - 1, *yolo_shares(b), s], name="{:012d}.txt"):
    folder.mkdir(parents=True)
    for i, items in found.items():
        (folder / name.format(i)).write_text("".join(" ".join(map(str, line(*item))) + "\n" for item in items))
    return folder


@pytest.mark.parametrize(
    ("form", "names"), [("boxes", "data.yaml"), ("boxes", "classes.txt"), ("outlines", "classes.txt"), ("key points", "data.yaml")]
)
def test_yolo_files_give_the_numbers_of_the_same_predictions(made, tmp_path, monkeypatch, capsys, form, names):
    folder, found, _ = made
    lines = {
        "boxes": lambda c, b, s: [c - 1, *yolo_shares(b), s],
        # The corners of the box: an outline whose bounding box it is.
        "outlines": lambda c, b, s: [c - 1, *(v / (W, H)[i % 2] for i, v in enumerate([b[j] for j in (0, 1, 2, 1, 2, 3, 0, 3)])), s],
        "key points": lambda c, b, s: [c - 1, *yolo_shares(b), 0.1, 0.2, 0.9, 0.3, 0.4, 0.8, s],
    }
    content = "names: {0: cat, 1: dog}\n" + ("kpt_shape: [2, 3]\n" if form == "key points" else "")
    (tmp_path / names).write_text(content if names == "data.yaml" else "cat\ndog\n")
    # Nothing was found on the last image, so it has no file; one file is of an image that is not in the records.
    some = {i: items for i, items in found.items() if i < IMAGES}
    own = [json.loads(line) for line in (folder / "own.jsonl").read_text().splitlines()]
    own[-1]["objects"] = []
    expected = evaluate(monkeypatch, capsys, folder, results_of(tmp_path, "own.jsonl", own), tmp_path / "own")[3]
    path = yolo_folder(tmp_path / "predict/labels", {**some, 77: []}, lines[form])
    code, out, _, numbers = evaluate(monkeypatch, capsys, folder, path.parent, tmp_path / "e", "--categories", tmp_path / names)
    assert code == 0
    assert numbers == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert "predict: YOLO predictions, 21 boxes in 7 files, matched by the names of the images" in out
    assert "1 images have no file (images/000000000008.jpg): nothing was found on them" in out
    assert "1 files are of no image of the records (labels/000000000077.txt): left out" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (lambda c, b, s: [c - 1, *(v * (W, H)[i % 2] for i, v in enumerate(yolo_shares(b))), s], "(they look like pixels): divide them"),
        (lambda c, b, s: [c - 1, *(b[i] / (W, H)[i % 2] for i in range(4)), s], "after the class, got [x1, y1, x2, y2]: convert them"),
        (lambda c, b, s: [c - 1, s, *yolo_shares(b)], "got the score before the box: put it last"),
        (lambda c, b, s: [c - 1, *yolo_shares(b), *([s] if b[0] > 200 else [])], "score all lines or none"),
        (lambda c, b, s: [c - 1, *yolo_shares(b), 97], "000000000001.txt:1: expected a score of 0 to 1 as the last number, got 97"),
        (lambda c, b, s: ["cat", s, *b], "expected numbers, class cx cy w h and perhaps a score, got 'cat "),
        (lambda c, b, s: [c - 1, *yolo_shares(b)[:3]], "expected class and 4 numbers or at least 3 points"),
        (lambda c, b, s: [c + 5, *yolo_shares(b), s], "classes.txt, got none: pass --categories FILE"),
    ],
)
def test_yolo_files_that_are_something_else_are_named(made, tmp_path, monkeypatch, capsys, line, says):
    folder, found, _ = made
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = yolo_folder(tmp_path / "labels", found, line)
    code, _, err, _ = evaluate(monkeypatch, capsys, folder, path, tmp_path / "e", "--categories", tmp_path / "classes.txt")
    assert (code, err.count("\n"), says in err) == (2, 1, True), err
    assert not (tmp_path / "e").exists()


def test_yolo_files_without_names_or_images_are_named(made, tmp_path, monkeypatch, capsys):
    folder, found, _ = made
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "empty").mkdir()
    path = yolo_folder(tmp_path / "a", found)
    twice = yolo_folder(tmp_path / "twice/a", found).parent
    yolo_folder(twice / "b", found)
    names = ("--categories", tmp_path / "classes.txt")
    for source, more, says in (
        (path, (), "expected names for the class numbers, got none: pass --categories"),
        (path, ("--categories", folder / "instances_val.json"), "expected names of classes, a data set yaml, obj.data or classes.txt"),
        (tmp_path / "empty", names, "got one without .txt"),
        (yolo_folder(tmp_path / "other", found, name="f_{}.txt"), names, "expected files named as the images, such as 000000000001.txt"),
        (twice, names, "expected one file an image"),
    ):
        code, _, err, _ = evaluate(monkeypatch, capsys, folder, source, tmp_path / "e", *more)
        assert (code, err.count("\n"), says in err) == (2, 1, True), err


def test_names_of_yolo_files_come_from_the_data_set_that_the_records_were_imported_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "set/images/val").mkdir(parents=True)
    (tmp_path / "set/labels/val").mkdir(parents=True)
    Image.new("L", (W, H)).save(tmp_path / "set/images/val/a.jpg")
    (tmp_path / "set/labels/val/a.txt").write_text("1 0.5 0.5 0.25 0.25\n0 0.2 0.2 0.25 0.25\n")
    (tmp_path / "set/data.yaml").write_text("val: images/val\nnames: [cat, dog]\n")
    import_data("yolo", tmp_path / "set/data.yaml", tmp_path / "data")
    labels = tmp_path / "set/labels"
    code, out, _, numbers = evaluate(monkeypatch, capsys, tmp_path, labels, tmp_path / "e")
    assert (code, numbers["detection.file.aware.f1.mean"], "without scores; names from " in out) == (0, 1.0, True)


@pytest.mark.parametrize("piece", ['{"a":', "[", "{'a':", "<box>", "[1,", '{"a":"', "<ref>"])
def test_an_answer_that_never_closes_is_read_in_linear_time(piece):
    """A model that repeats itself until its budget ends: 300,000 characters."""
    begin = time.process_time()
    assert not any(isinstance(found, RawObject) for found in objects_of_text(piece * (300_000 // len(piece)), "row") or [])
    assert time.process_time() - begin < 5


def test_half_a_surrogate_pair_spoils_its_own_object_and_nothing_else(tmp_path):
    answer = [{"label": "a \ud83d b", "bbox_2d": [1, 2, 30, 40]}, {"label": "cat", "bbox_2d": [5, 6, 30, 40]}]
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"images": ["a.png"], "width": 50, "height": 50, "objects": []}) + "\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"image": "a.png", "response": json.dumps(answer)}) + "\n")
    found = read_foreign(answers, records, categories=None, coords="absolute")
    assert found is not None
    assert [item["desc"] for item in found.rows[0]["objects"]] == ["cat"]
    assert "1 boxes unusable" in found.notes[0]
