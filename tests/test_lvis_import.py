"""LVIS AP of an imported LVIS file is that of LVIS's definition, computed slowly and by itself from the source file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from coordexp.data.importers.formats import import_data
from coordexp.evaluate.options import EvaluateOptions
from coordexp.evaluate.result import evaluate_files

IMAGES, CATEGORIES, SIDE = 12, 7, 200


def source(folder, rng):
    """An LVIS file: every image says which categories are absent, and which are not labelled in full."""
    images, annotations = [], []
    (folder / "val2017").mkdir(parents=True)
    for i in range(1, IMAGES + 1):
        Image.new("L", (SIDE, SIDE)).save(folder / f"val2017/{i:012d}.jpg")
        present = sorted(rng.choice(CATEGORIES, 3, replace=False) + 1)
        absent = [int(c) for c in range(1, CATEGORIES + 1) if c not in present and rng.random() < 0.5]
        open_ = [int(c) for c in present if rng.random() < 0.4]
        images.append({
            "id": i, "coco_url": f"http://images.example/val2017/{i:012d}.jpg", "width": SIDE, "height": SIDE,
            "neg_category_ids": absent, "not_exhaustive_category_ids": open_,
        })  # fmt: skip
        for category in present:
            for _ in range(rng.integers(1, 4)):
                x, y, w, h = (float(v) for v in (*rng.uniform(0, 120, 2).round(1), *rng.uniform(15, 70, 2).round(1)))
                box = [x, y, w, h]
                annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": int(category), "bbox": box, "area": w * h})
    categories = [{"id": c, "name": f"thing {c}", "frequency": "rcf"[c % 3]} for c in range(1, CATEGORIES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "lvis_v1_val.json").write_text(json.dumps(content))
    return content


def detections(content, rng):
    """Boxes near the true ones, some of other names, some anywhere."""
    found = []
    for item in content["annotations"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array(item["bbox"]) + rng.normal(0, 4, 4)
            category = item["category_id"] if rng.random() < 0.8 else int(rng.integers(1, CATEGORIES + 1))
            found.append((item["image_id"], category, np.maximum(box, 1.0), float(rng.random())))
    return found


def iou(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def average_precision(content, found, category, threshold):
    """AP at 101 recalls of one category: judged where it is labelled or listed as absent; not exhaustive: false positives are ignored."""
    rows, total = [], 0
    for image in content["images"]:
        truth = [a["bbox"] for a in content["annotations"] if (a["image_id"], a["category_id"]) == (image["id"], category)]
        if not truth and category not in image["neg_category_ids"]:
            continue
        total += len(truth)
        free = list(range(len(truth)))
        for score, box in sorted(((d[3], d[2]) for d in found if d[:2] == (image["id"], category)), key=lambda d: -d[0]):
            best = max(free, key=lambda t: iou(box, truth[t]), default=None)
            if best is not None and iou(box, truth[best]) >= threshold:
                free.remove(best)
                rows.append((score, 1))
            elif category not in image["not_exhaustive_category_ids"]:
                rows.append((score, 0))
    if not total:
        return None
    hits = np.array([hit for _, hit in sorted(rows, key=lambda row: -row[0])] or [0])
    recall, precision = np.cumsum(hits) / total, np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.mean([max(precision[recall >= r - 1e-12], default=0.0) for r in np.linspace(0, 1, 101)])


def test_lvis_ap_after_an_import_is_that_of_the_definition(tmp_path):
    rng = np.random.default_rng(5)
    content = source(tmp_path, rng)
    found = detections(content, rng)
    import_data("coco", tmp_path / "lvis_v1_val.json", tmp_path / "out")
    rows = []
    for image in content["images"]:
        boxes = [(c, [b[0], b[1], b[0] + b[2], b[1] + b[3]], s) for i, c, b, s in found if i == image["id"]]
        objects = [{"desc": f"thing {c}", "bbox_2d": box, "score": score} for c, box, score in boxes]
        rows.append({"image_id": str(image["id"]), "width": SIDE, "height": SIDE, "score_source": "token", "objects": objects})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = evaluate_files(tmp_path / "p.jsonl", tmp_path / "out/val.jsonl", EvaluateOptions(bootstrap=0), out=None)
    values = {
        c["id"]: [average_precision(content, found, c["id"], t) for t in np.arange(0.5, 0.96, 0.05)] for c in content["categories"]
    }
    kept = {c: np.mean(v) for c, v in values.items() if v[0] is not None}
    assert results["lvis.file.ap"] == pytest.approx(np.mean(list(kept.values())), abs=1e-9)
    for key, rare in (("apr", "r"), ("apc", "c"), ("apf", "f")):
        mine = [kept[c["id"]] for c in content["categories"] if c["frequency"] == rare and c["id"] in kept]
        assert results[f"lvis.file.{key}"] == pytest.approx(np.mean(mine), abs=1e-9)
