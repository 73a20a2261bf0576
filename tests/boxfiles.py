"""Files of random boxes, in any units and layout, and predictions for them; used by the tests of doctor."""

from __future__ import annotations

import json

import numpy as np

PHOTO = ((640, 480), (480, 640), (500, 375))
LARGE = ((1920, 1080), (3000, 2000))
LAYOUTS = {
    "xywh": lambda b, s: np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1),
    "cxcywh": lambda b, s: np.concatenate([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], axis=1),
    "yxyx": lambda b, s: b[:, [1, 0, 3, 2]],
}


def random_boxes(rng, count, width, height, written="float"):
    """Pixel boxes ``[count, 4]`` inside the image, as annotators write them: whole, two decimals, or floats."""
    size = rng.uniform(0.02, 0.5, (count, 2))
    low = rng.uniform(0, 1, (count, 2)) * (1 - size)
    boxes = np.concatenate([low, low + size], axis=1) * np.array([width, height] * 2)
    return np.round(boxes, {"whole": 0, "2 decimals": 2}.get(written, 12))


def rows(seed, images=40, per=5, sizes=PHOTO, change=lambda b, s: b, written="float", **more):
    """Rows as records, their boxes put through ``change(boxes, sides)``."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(images):
        width, height = sizes[rng.integers(len(sizes))]
        boxes = change(random_boxes(rng, per, width, height, written), np.array([width, height] * 2, dtype=float))
        objects = [{"desc": "a", "bbox_2d": [int(v) if float(v).is_integer() else float(v) for v in box]} for box in boxes]
        made.append({"images": [f"{i}.png"], "width": width, "height": height, "objects": objects, **more})
    return made


def write(folder, content, name="d.jsonl"):
    path = folder / name
    path.write_text(json.dumps(content) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in content))
    return path


def files(folder, change, images=25, sizes=((640, 480), (500, 800))):
    """A records file and a predictions file with the true boxes a little off, as ``change(boxes, sides)``."""
    rng = np.random.default_rng(9)
    records, rows = [], []
    for i in range(images):
        width, height = sizes[i % len(sizes)]
        side = np.array([width, height] * 2, dtype=float)
        size = rng.uniform(0.1, 0.35, (3, 2))
        low = rng.uniform(0, 1, (3, 2)) * (1 - size)
        boxes = np.concatenate([low, low + size], axis=1) * side
        found = change(boxes + rng.normal(0, 2, boxes.shape), side)
        base = {"width": width, "height": height, "image_id": str(i)}
        objects = [{"desc": "a", "bbox_2d": box} for box in boxes.tolist()]
        records.append({"images": [f"{i}.png"], **base, "objects": [*objects, {"desc": "tip", "point_2d": [3, 4]}]})
        rows.append({**base, "objects": [{"desc": "a", "bbox_2d": box} for box in found.tolist()], "score_source": None})
    paths = folder / "records.jsonl", folder / "predictions.jsonl"
    for path, items in zip(paths, (records, rows), strict=True):
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths
