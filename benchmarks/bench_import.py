"""Time and memory of importing a COCO file with many annotations, in a process of its own.

    python benchmarks/bench_import.py [--annotations 100000] [--rounds 3]

The file has outlines of 60 numbers, as real ones do, and one image for every seven annotations. The bar: about
5 s, and 1 kB an annotation beside the mapped file.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from PIL import Image
from rounds import parser, rounds, save, tell


def make(folder: Path, annotations: int) -> Path:
    """A COCO folder with real (small) JPEG files; returns the JSON file."""
    rng = random.Random(0)
    images = max(1, annotations // 7)
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (640, 480), "gray").save(folder / "first.jpg", quality=30)
    data = (folder / "first.jpg").read_bytes()
    for i in range(images):
        (folder / "images" / f"{i:012d}.jpg").write_bytes(data)
    found = []
    for i in range(annotations):
        x, y, w, h = rng.uniform(0, 500), rng.uniform(0, 400), rng.uniform(2, 140), rng.uniform(2, 80)
        outline = [round(rng.uniform(0, 480), 2) for _ in range(60)]
        box = [round(v, 2) for v in (x, y, w, h)]
        entry = {"id": i, "image_id": i % images, "category_id": 1 + i % 80, "bbox": box, "area": w * h, "iscrowd": 0}
        found.append({"segmentation": [outline], **entry})
    content = {
        "annotations": found,
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in range(images)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }
    path = folder / "instances_train.json"
    path.write_text(json.dumps(content))
    return path


def measure(source: Path, out: Path) -> None:
    """Import, and print seconds and peak memory: run in a fresh process."""
    start = time.perf_counter()
    from coordexp.data.importers.formats import import_data

    report = import_data("coco", source, out)
    seconds = time.perf_counter() - start
    tell(seconds, objects=report.objects)


def main() -> None:
    """Make the file, measure, and append a row to the results."""
    words = parser(__doc__, count=3)
    words.add_argument("--annotations", type=int, default=100_000)
    args = words.parse_args()
    if args.measure:
        with tempfile.TemporaryDirectory() as name:
            measure(args.measure, Path(name) / "out")
        return
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own: a child's peak counts from what its parent had when it began.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            source = pool.submit(make, Path(name) / "coco", args.annotations).result()
        size = source.stat().st_size / 2**20
        found = rounds(__file__, [source], args.rounds)
    what = {"annotations": args.annotations, "file_mb": f"{size:.1f}", "objects": found[0]["objects"]}
    save("import", what, found)


if __name__ == "__main__":
    main()
