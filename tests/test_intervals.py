"""Intervals hold the truth about as often as they say, for clustered records, rates near 1, rare classes and AP: a short simulation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from coordexp.evaluate.bootstrap import Ratio, intervals

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "coverage.py"


@pytest.mark.parametrize(
    ("scene", "photos", "simulations", "least"),
    # 0.95 less two standard errors of that few data sets; benchmarks/results/coverage.csv has a thousand of each.
    [("clustered", 20, 200, 0.92), ("near 1", 40, 200, 0.92), ("boxes, rare classes", 50, 40, 0.88), ("two arms, clustered", 20, 200, 0.9)],
)
def test_95_percent_intervals_hold_the_truth(
    scene: str, photos: int, simulations: int, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("coverage_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "RESAMPLES", 200)
    monkeypatch.setattr("coordexp.evaluate.ranking.AP_DRAWS", 60)
    found = made.simulate(scene, photos, simulations)
    for key, (held, given) in found.items():
        assert given == 1, key
        assert held >= least, (key, held)


def test_intervals_over_records_would_not_hold_for_phrases_of_one_photo() -> None:
    """What clusters do: drawn one by one, 7 phrases a photo give intervals that miss the truth five times as often as they say."""
    held = 0
    for k in range(100):
        rng = np.random.default_rng([k, 1])
        right = rng.random(280) < np.repeat(rng.beta(1.0, 0.6, 40), 7)
        bounds = intervals({"acc": Ratio(right[:, None].astype(float), np.ones((280, 1)))}, resamples=100, seed=k)["acc"].bounds
        assert bounds is not None
        held += bounds[0] <= 0.625 <= bounds[1]
    assert held <= 80
