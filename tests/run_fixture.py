"""A small, made-up run directory with every file a report reads. Deterministic; no model and no training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

READOUTS = ("file", "argmax", "expectation", "median", "topk_mean", "window", "auto")
COLORS = {"red": "#d03a3a", "green": "#3a9d4a", "blue": "#3a5fd0", "yellow": "#e0c030"}
CONFIG = """\
name: tiny-soft-ce
data:
  kind: synth
  synth: {train: 8000, val: 100, test: 200, side: 96}
model:
  path: null
  tiny: {num_layers: 4, hidden_size: 192}
objective:
  text_ce: 1.0
  soft_ce: 1.0
  gate: 1.0
  target: gaussian
  sigma: 8.0
  alpha: null
train:
  max_steps: 600
  per_device_train_batch_size: 16
  gradient_accumulation_steps: 2
  learning_rate: 0.0012
  lr_scheduler_type: cosine
decode:
  readout: auto
"""


def make_run(root: Path, *, images: int = 14, side: int = 96, objects: int = 3, status: str = "complete") -> Path:
    """Write a whole run directory below ``root`` and return it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(CONFIG)
    _write_json(root / "manifest.json", manifest(status))
    _write_lines(root / "logging.jsonl", log_rows())
    _write_lines(root / "histograms.jsonl", histograms())
    _write_json(root / "results.json", results())
    records = scenes(root / "data", images, side, objects)
    _write_lines(root / "data" / "test.jsonl", records)
    answers = [prediction(record, i) for i, record in enumerate(records)]
    _write_lines(root / "predictions.jsonl", answers)
    save_distributions(root / "predictions.jsonl.distributions", answers)
    return root


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def manifest(status: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "tiny-soft-ce",
        "status": status,
        "stage": None if status == "complete" else "train",
        "started": "2026-11-14T09:00:00Z",
        "finished": "2026-11-14T09:11:31Z" if status != "running" else None,
        "command": ["coordexp", "run", "experiments/tiny.yaml", "--set", "train.max_steps=600"],
        "config_sha256": "3f" * 32,
        "git": {"commit": "1c" * 20, "dirty": True},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"cpu_count": 2, "processor": "A processor", "memory_gib": 7.8, "cuda": [{"name": "A device", "memory_gib": 79.6}]},
        "convention": "norm999",
        "files": {"data/test.jsonl": "ab" * 32},
        "stages": {"data": 14.2, "train": 540.0, "predict": 101.7, "evaluate": 35.1},
        "notes": ["evaluation of step 300 had a non-finite loss in one batch"],
    }


def log_rows() -> list[dict[str, Any]]:
    """60 training rows, 6 evaluation rows."""
    noise = random.Random(1)
    rows: list[dict[str, Any]] = [{"schema": 1, "kind": "header", "config_sha256": "3f" * 32, "git": None, "versions": {}}]
    for step in range(10, 601, 10):
        speed = {"tokens_per_s": 4000 + step, "supervised_tokens_per_s": 2000, "samples_per_s": 31, "loss_share": 0.06}
        named = {f"speed/{key}": value for key, value in speed.items()}
        rows.append({"step": step, "epoch": step / 250, "learning_rate": 1e-3, **_terms(step, noise, 1.0, ""), **named})
        if step % 100 == 0:
            rows.append({"step": step, "epoch": step / 250, **_terms(step, noise, 1.08, "eval_")})
    return rows


def _terms(step: int, noise: random.Random, scale: float, prefix: str) -> dict[str, float]:
    fall = scale * (math.exp(-step / 130) + 0.12) * (1 + (0.09 if not prefix else 0.01) * noise.uniform(-1, 1))
    kl, text, gate = 3.6 * fall, 2.4 * fall, 1.1 * fall**2
    values = {
        "loss": kl + text + gate + 3.1,
        "base_ce/loss": text,
        "coord_softce_w1/loss": kl + gate + 3.1,
        "coord_softce_w1/soft_ce": kl + 3.1,
        "coord_softce_w1/gate": gate,
        "contrib/text_ce": text,
        "contrib/soft_ce": kl + 3.1,
        "contrib/gate": gate,
        "contrib/w1": 0.0,
        "coord_dist/kl": kl,
        "coord_dist/entropy": 3.1 + 2 * fall,
        "coord_dist/coverage_50": 0.55,
        "coord_dist/coverage_80": 0.83,
        "coord_dist/coverage_95": 0.96,
        "coord_monitor/coord_vocab_mass_at_gt_text": 0.02 * fall,
        "coord_dist/crps": 190 * fall,
        "coord_dist/argmax_bin_mae": 230 * fall,
        "coord_dist/median_bin_mae": 205 * fall,
        "coord_expected_bin_mae": 215 * fall,
        "coord_softce_w1/coord_vocab_mass": 1 - 0.4 * min(fall, 1.5) ** 2,
    }
    return {prefix + key: value for key, value in values.items()}


def results() -> dict[str, Any]:
    content: dict[str, Any] = {"schema": 1}

    def put(key: str, value: float | None, half: float = 0.0) -> None:
        content[key] = value
        if half and value is not None:
            content[f"intervals.{key}"] = [max(value - half, 0.0), value + half]

    for i, readout in enumerate(READOUTS):
        rank = {"expectation": 0.05, "argmax": 0.02, "topk_mean": 0.015, "window": 0.005}.get(readout, 0.0)
        for naming, level in (("aware", 0.463), ("agnostic", 0.742)):
            for metric, shift in (("f1", 0.0), ("precision", 0.02), ("recall", -0.018)):
                for threshold, share in (("50", 1.0), ("75", 0.55), ("90", 0.16), ("95", 0.04), ("mean", 0.47)):
                    put(f"detection.{readout}.{naming}.{metric}.{threshold}", level * share - rank + shift * share, 0.041)
        for threshold, share in (("50", 1.0), ("75", 0.5), ("90", 0.15), ("95", 0.03), ("mean", 0.45)):
            put(f"detection.{readout}.aware.macro_f1.{threshold}", 0.431 * share - rank)
        for j, slot in enumerate(("x1", "y1", "x2", "y2", "all")):
            mean = 24.0 + j + 200 * rank + i / 10
            for unit, size in (("bins", 1.0), ("px", 96 / 999)):
                put(f"localisation.{readout}.{slot}.mean_{unit}", mean * size, 1.7 * size)
                put(f"localisation.{readout}.{slot}.median_{unit}", 0.7 * mean * size)
                put(f"localisation.{readout}.{slot}.p90_{unit}", 2.1 * mean * size)
        for size, count in (("small", 120), ("medium", 181), ("large", 0)):
            put(f"localisation.{readout}.size.{size}.mean_px", 2.5 + rank + (size == "small") if count else None)
            put(f"localisation.{readout}.size.{size}.n", count)
    put("localisation.matched", 301)
    for level in (50, 80, 90, 95):
        put(f"calibration.all.coverage_{level}", min(1.0, level / 100 + 0.04))
    for k in range(10):
        put(f"calibration.pit_histogram.{k}", 0.1)
    put("calibration.all.n", 1204)
    for key, value in (
        ("ap", 0.231),
        ("ap50", 0.402),
        ("ap75", 0.219),
        ("aps", None),
        ("apm", 0.231),
        ("apl", None),
        ("ar1", 0.2),
        ("ar10", 0.3),
        ("ar100", 0.3),
    ):
        put(f"coco.constant.{key}", value, 0.03)
    for key, value in (("parse_rate", 0.985), ("empty_rate", 0.0), ("truncation_rate", 0.01), ("duplicate_rate", 0.034)):
        put(f"health.{key}", value, 0.012 if key == "parse_rate" else 0.0)
    for key, value in (("boxes_per_image", 1.93), ("true_boxes_per_image", 2.01), ("tokens_per_image", 51.2), ("problems.truncated", 2)):
        put(f"health.{key}", value)
    content["counts"] = {"original": 200, "effective": 200}
    content["provenance"] = {"predictions_sha256": "cd" * 32, "records_sha256": "ab" * 32, "options": {"bootstrap": 1000, "seed": 0}}
    return content


def histograms() -> list[dict[str, Any]]:
    """Of one training row and one evaluation: PIT with a hump in the middle, errors mostly below 20 bins."""
    pit = {"low": 0.0, "high": 1.0, "counts": [20 + min(i, 99 - i) for i in range(100)]}
    error = {"low": 0.0, "high": 1000.0, "counts": [max(0, 40 - i) for i in range(2000)]}
    return [
        {"step": 590, "coord_dist/pit": pit, "coord_dist/abs_err": error},
        {"step": 600, "eval_coord_dist/pit": pit, "eval_coord_dist/abs_err": error},
    ]


def save_distributions(folder: Path, answers: list[dict[str, Any]]) -> None:
    """Gaussians of 20 bins around every predicted edge, in the layout that the predictor writes."""
    folder.mkdir()
    rows = [
        (n, o, s, item["bbox_2d"][s] / a["width"] * 999)
        for n, a in enumerate(answers)
        for o, item in enumerate(a["objects"])
        for s in range(4)
    ]
    near = [np.arange(max(0, int(c) - 60), min(999, int(c) + 60) + 1) for *_, c in rows]
    probs = [np.exp(-0.5 * ((k - row[3]) / 20) ** 2) for k, row in zip(near, rows, strict=True)]
    np.savez_compressed(
        folder / "00000000.npz",
        image_ids=np.array([a["image_id"] for a in answers]), num_bins=np.array(1000),
        image=np.array([r[0] for r in rows], np.int32), object=np.array([r[1] for r in rows], np.int32),
        slot=np.array([r[2] for r in rows], np.int8), indptr=np.cumsum([0, *map(len, near)]),
        bins=np.concatenate([np.zeros(0, np.uint16), *near]).astype(np.uint16),
        probs=np.concatenate([np.zeros(0), *(p / p.sum() for p in probs)]).astype(np.float16), rest=np.zeros(len(rows), np.float32),
    )  # fmt: skip


def scenes(folder: Path, count: int, side: int, objects: int) -> list[dict[str, Any]]:
    """Draw ``count`` scenes into ``folder/img`` and return their records."""
    (folder / "img").mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    rows = []
    for n in range(count):
        image = Image.new("RGB", (side, side), (rng.randrange(60, 220),) * 3)
        if side > 256:
            image = Image.effect_noise((side, side), 60).convert("RGB")
        draw, items = ImageDraw.Draw(image), []
        for _ in range(1 + n % objects):
            size = rng.uniform(0.16, 0.42) * side
            x, y = rng.uniform(0, side - size), rng.uniform(0, side - size)
            color, shape = rng.choice(list(COLORS)), rng.choice(("circle", "square"))
            (draw.ellipse if shape == "circle" else draw.rectangle)((x, y, x + size, y + size), fill=COLORS[color])
            items.append(
                {
                    "desc": f"{'large' if size > 0.3 * side else 'small'} {color} {shape}",
                    "bbox_2d": [round(v, 2) for v in (x, y, x + size, y + size)],
                }
            )
        name = f"img/{n:04d}.png"
        image.save(folder / name)
        rows.append({"images": [name], "width": side, "height": side, "objects": items, "image_id": f"test-{n:06d}"})
    return rows


def prediction(record: dict[str, Any], index: int) -> dict[str, Any]:
    """The record's boxes moved a little; some named wrong, missing or cut off."""
    rng = random.Random(100 + index)
    side, objects = record["width"], []
    for item in record["objects"]:
        if rng.random() < 0.12:
            continue
        box = [min(max(v + rng.gauss(0, 0.03 * side), 0.0), float(side)) for v in item["bbox_2d"]]
        objects.append({"desc": item["desc"] if rng.random() < 0.7 else "small blue circle", "bbox_2d": box})
    problems = {"truncated": 1} if index == 3 else {}
    return {
        "image_id": record["image_id"],
        "width": side,
        "height": side,
        "objects": objects,
        "score_source": None,
        "problems": problems,
        "truncated": bool(problems),
        "num_tokens": 40,
    }
