"""A short run against numbers written down before: what no pair of equivalent runs shows, both being wrong alike.

``python tests/invariant/test_golden.py`` writes them anew; do so only for a change that is meant to move them, and say which.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "short_run.json"


def short_run(folder):
    """Three steps of 2 x 2 on the tiny model with every term on: the logged rows, and an evaluation."""
    from transformers import TrainerCallback

    from coordexp.data.dataset import RecordDataset
    from coordexp.losses.objective import CoordObjective
    from coordexp.train.launch import training_arguments
    from coordexp.train.options import TrainOptions
    from coordexp.train.trainer import CoordTrainer
    from tiny import collator, fresh_model, records, template, vocab

    rows = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            rows.append({k: v for k, v in logs.items() if not k.startswith(("speed/", "train_")) and k != "total_flos"})

    options = TrainOptions(
        max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, warmup_steps=0, logging_steps=1, eval_steps=3,
        save_steps=100, learning_rate=1e-3, report_to=(),
    )  # fmt: skip
    CoordTrainer(
        model=fresh_model(), vocab=vocab(), args=training_arguments(options, folder, seed=0), data_collator=collator(), callbacks=[Keep()],
        objective=CoordObjective(ce=0.3, w1=0.05, crps=0.1, text_gate=0.2, entropy=0.05, variance=1e-4, temperature=0.9, alpha=0.05),
        train_dataset=RecordDataset(records(), template()), eval_dataset=RecordDataset(records("val"), template()),
    ).train()  # fmt: skip
    return [row for row in rows if row and "epoch" in row]


def test_a_short_run_logs_the_numbers_it_logged_before(tmp_path):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    rows = short_run(tmp_path)
    assert [sorted(row) for row in rows] == [sorted(row) for row in golden["rows"]]
    residuals = []
    for step, (row, old) in enumerate(zip(rows, golden["rows"], strict=True)):
        for key, value in old.items():
            if value is None:
                assert row[key] != row[key], key
                continue
            # Rank metrics move by whole positions: one of some hundreds.
            loose = 2e-2 if "acc" in key or "flip" in key or "argmax" in key or "topk" in key or "pit_ks" in key else 2e-4
            assert row[key] == pytest.approx(value, rel=loose, abs=loose), (step, key, golden["environment"])
            if loose == 2e-4 and value:
                residuals.append((row[key] - value) / abs(value))
    # A drift in one direction, too small for each number alone.
    assert len(residuals) > 150
    assert abs(sum(residuals) / len(residuals)) < 2e-5, golden["environment"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as scratch:
        kept = [{k: None if v != v else v for k, v in row.items()} for row in short_run(Path(scratch))]
    environment = {name: version(name) for name in ("torch", "transformers", "numpy")} | {"machine": platform.machine()}
    GOLDEN.write_text(json.dumps({"environment": environment, "rows": kept}, indent=1) + "\n", encoding="utf-8")
