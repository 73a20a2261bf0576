"""Time and memory of importing a COCO file with many annotations, in a process of its own.

    python benchmarks/bench_import.py --annotations 100000

The file has outlines of 60 numbers, as real ones do, and one image for every seven annotations. The bar: 10 s and 1 GB.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

RESULTS = Path(__file__).parent / "results" / "import.csv"


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
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cpu = usage.ru_utime + usage.ru_stime
    row = {"objects": report.objects, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(usage.ru_maxrss / 1024)}
    print(json.dumps(row))


def main() -> None:
    """Make the file, measure, and append a row to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=int, default=100_000)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory() as name:
        source = make(Path(name) / "coco", args.annotations)
        size = source.stat().st_size / 2**20
        done = subprocess.run(
            [sys.executable, __file__, "--measure", source, Path(name) / "out"], capture_output=True, text=True, check=True
        )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    row = {
        "date": datetime.date.today().isoformat(), "commit": commit, "python": platform.python_version(), "cores": os.cpu_count(),
        "annotations": args.annotations, "file_mb": round(size, 1), **json.loads(done.stdout),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row)


if __name__ == "__main__":
    main()
