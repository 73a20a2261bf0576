"""Time and memory of `coordexp evaluate` on random scenes, each round in a process of its own.

    python benchmarks/bench_evaluate.py [--images 5000] [--boxes 20] [--names 80] [--phrases 0] [--readouts 0] [--profile]

Reading both files, every metric and interval, and writing are all counted. `--phrases 7` makes records of seven phrases a photo, each with
one box (`--images` is their number), and 10,000 resamples. The bars: 100,000 images of 10 boxes and 80 names within 60 s and 2 GB, 8,000
images with 8,000 names within 5 s, 10,834 phrases within 10 s.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import random
import sys
import tempfile
import time
from pathlib import Path

from rounds import parser, rounds, save, tell

READOUTS = ("argmax", "expectation", "median", "topk_mean", "window", "auto")


def make(folder: Path, images: int, boxes: int, names: int, phrases: int, readouts: int) -> None:
    """Records, and scored predictions near them: 10 % missed, 10 % named wrong, 10 % invented."""
    if phrases:
        boxes = 1
    rng = random.Random(0)
    with (folder / "records.jsonl").open("w") as records, (folder / "predictions.jsonl").open("w") as predictions:
        for i in range(images):
            truth, found = [], []
            for _ in range(boxes):
                x, y = rng.uniform(0, 500), rng.uniform(0, 340)
                box = [x, y, x + rng.uniform(8, 140), y + rng.uniform(8, 140)]
                name = f"phrase {i}" if phrases else f"class {rng.randrange(names)}"
                truth.append({"desc": name, "bbox_2d": box})
                shift = 500.0 if rng.random() < 0.1 else 4.0
                near = [max(0.0, v + rng.gauss(0, shift)) for v in box]
                item = {"desc": name if rng.random() < 0.9 else "something", "bbox_2d": near, "score": rng.random()}
                if readouts:
                    item["readouts"] = {r: [v + rng.gauss(0, 1) for v in near] for r in READOUTS[:readouts]}
                if rng.random() < 0.9:
                    found.append(item)
            head = {"image_id": str(i), "width": 640, "height": 480}
            asked = {"metadata": {"phrase": f"phrase {i}"}} if phrases else {}
            records.write(json.dumps({"images": [f"{i // max(1, phrases)}.jpg"], **head, "objects": truth, **asked}) + "\n")
            more = {"score_source": "random", "problems": {}, "error": None, "num_tokens": 400, "truncated": False}
            predictions.write(json.dumps({**head, "objects": found, **more}) + "\n")


def measure(folder: Path, resamples: int, profile: bool) -> None:
    """Evaluate, and print seconds and peak memory: run in a fresh process."""
    start = time.perf_counter()
    from coordexp.evaluate.options import EvaluateOptions
    from coordexp.evaluate.result import evaluate_files

    watch = cProfile.Profile()
    if profile:
        watch.enable()
    evaluate_files(folder / "predictions.jsonl", folder / "records.jsonl", EvaluateOptions(bootstrap=resamples), out=folder / "out")
    watch.disable()
    seconds = time.perf_counter() - start
    if profile:
        pstats.Stats(watch, stream=sys.stderr).sort_stats("tottime").print_stats(25)
    tell(seconds)


def main() -> None:
    """Measure and append a row to the results."""
    words = parser(__doc__, count=5)
    words.add_argument("--images", type=int, default=5000)
    words.add_argument("--boxes", type=int, default=20)
    words.add_argument("--names", type=int, default=80, help="different names")
    words.add_argument("--phrases", type=int, default=0, help="phrases a photo: grounding")
    words.add_argument("--resamples", type=int, default=1000)
    words.add_argument("--readouts", type=int, default=0, choices=range(len(READOUTS) + 1), help="readouts beside the boxes of the file")
    words.add_argument("--profile", action="store_true", help="one round under the profiler; nothing is written")
    words.add_argument("--no-save", action="store_true", help="print only")
    options = words.parse_args()
    if options.measure:
        measure(options.measure, options.resamples, options.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.images, options.boxes, options.names, options.phrases, options.readouts)
        more = ["--resamples", options.resamples, *(["--profile"] if options.profile else [])]
        found = rounds(__file__, [folder, *more], 1 if options.profile else options.rounds)
    if options.profile or options.no_save:
        print(json.dumps(found))
        return
    what = {key: vars(options)[key] for key in ("images", "boxes", "names", "phrases", "resamples", "readouts")}
    save("evaluate", what, found, "numpy", "hotcoco")


if __name__ == "__main__":
    main()
