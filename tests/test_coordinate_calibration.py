"""PIT and coverage from saved distributions: against the torch definition, a calibrated model, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coordexp import distribution
from coordexp.codec import CoordCodec
from coordexp.errors import DataError
from coordexp.evaluate.bootstrap import point
from coordexp.evaluate.calibration import calibration_scores, pit
from coordexp.evaluate.distributions import read_distributions
from coordexp.evaluate.localisation import matched
from coordexp.evaluate.samples import Sample, flatten

K = 1000
CODEC = CoordCodec()


def gaussian(center: float, sigma: float) -> np.ndarray:
    p = np.exp(-0.5 * ((np.arange(K) - center) / sigma) ** 2)
    return p / p.sum()


def save(folder: Path, rows: list[tuple[str, int, int, np.ndarray]], name: str = "00000000.npz", **changes: np.ndarray) -> None:
    """A file of rows ``(image_id, object, slot, p [K])`` in the layout of the predictor."""
    ids = sorted({row[0] for row in rows})
    kept = [np.flatnonzero(p >= 1e-6) for *_, p in rows]
    arrays = {
        "image_ids": np.array(ids),
        "num_bins": np.array(K),
        "image": np.array([ids.index(row[0]) for row in rows], dtype=np.int32),
        "object": np.array([row[1] for row in rows], dtype=np.int32),
        "slot": np.array([row[2] for row in rows], dtype=np.int8),
        "indptr": np.cumsum([0, *map(len, kept)]),
        "bins": np.concatenate(kept).astype(np.uint16),
        "probs": np.concatenate([p[k] for (*_, p), k in zip(rows, kept, strict=True)]).astype(np.float16),
        "rest": np.array([1 - p[k].sum() for (*_, p), k in zip(rows, kept, strict=True)], dtype=np.float32),
    }
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / name, **{**arrays, **changes})  # type: ignore[arg-type]


def test_sparse_pit_is_that_of_the_distribution_module() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        p = rng.dirichlet(np.full(K, 0.05))
        center = float(rng.uniform(0, 999))
        expected = float(distribution.pit(torch.tensor(p)[None], torch.tensor([center], dtype=torch.float64)))
        bins = np.flatnonzero(p)
        assert pit(bins, p[bins], center, K) == pytest.approx(expected, abs=1e-12)


def scenes(tmp_path: Path, spread: float) -> tuple[Path, list[Sample]]:
    """Boxes whose true edges are drawn from a Gaussian of 6 bins around the prediction, which says ``6 * spread``."""
    rng = np.random.default_rng(1)
    samples, rows = [], []
    for i in range(250):
        pred = np.array([[200.0, 200.0, 800.0, 800.0]]) + rng.uniform(-50, 50, (1, 4))
        true = pred + rng.normal(0, 6, (1, 4))
        samples.append(Sample(f"im{i}", 999, 999, ("a",), true, ("a",), {"file": pred}, None))
        rows += [(f"im{i}", 0, s, gaussian(pred[0, s], 6 * spread)) for s in range(4)]
    save(tmp_path / "d", rows[:400], "0.npz")
    save(tmp_path / "d", rows[400:], "1.npz")
    return tmp_path / "d", samples


def metrics_of(folder: Path, samples: list[Sample], codec: CoordCodec) -> dict[str, float | int | None]:
    flat = flatten(samples)
    metrics, ratios = calibration_scores(read_distributions(folder), flat, matched(flat), codec)
    assert {key: point(ratio) for key, ratio in ratios.items()} == pytest.approx({key: metrics[key] for key in ratios})
    return metrics


def test_a_calibrated_model_covers_what_it_says_and_a_too_sure_one_does_not(tmp_path: Path) -> None:
    folder, samples = scenes(tmp_path, 1.0)
    metrics = metrics_of(folder, samples, CODEC)
    assert metrics["all.n"] == 1000
    for level in (50, 80, 90, 95):
        assert metrics[f"all.coverage_{level}"] == pytest.approx(level / 100, abs=0.05)
    assert metrics["all.pit_ks"] < 0.06  # type: ignore[operator]
    assert sum(metrics[f"pit_histogram.{k}"] for k in range(10)) == pytest.approx(1)  # type: ignore[misc]
    assert sum(metrics[f"{slot}.n"] for slot in ("x1", "y1", "x2", "y2")) == 1000  # type: ignore[misc]
    assert metrics["rest_mean"] == pytest.approx(0, abs=1e-3)
    folder, samples = scenes(tmp_path, 0.3)
    sure = metrics_of(folder, samples, CODEC)
    assert sure["all.coverage_80"] < 0.5  # type: ignore[operator]
    assert sure["all.pit_ks"] > 0.15  # type: ignore[operator]


def test_nothing_matched_is_none_and_n_0(tmp_path: Path) -> None:
    folder, samples = scenes(tmp_path, 1.0)
    none = calibration_scores(read_distributions(folder), flatten(samples), (np.zeros(0, int), np.zeros(0, int)), CODEC)[0]
    assert (none["all.n"], none["all.coverage_80"], none["pit_histogram.0"]) == (0, None, None)


def test_damaged_or_missing_distributions_are_one_line(tmp_path: Path) -> None:
    folder, samples = scenes(tmp_path, 1.0)
    (folder / "1.npz").unlink()
    with pytest.raises(DataError, match=r"image 'im100': expected those of objects\[0\], x1, got none"):
        metrics_of(folder, samples, CODEC)
    (folder / "1.npz").write_bytes((folder / "0.npz").read_bytes()[:100])
    with pytest.raises(DataError, match=r"d/1\.npz: expected distributions") as caught:
        list(read_distributions(folder))
    assert "\n" not in str(caught.value)
    for changes in ({"indptr": np.array([0, 1])}, {"slot": np.array([-1])}, {"image": np.array([1])}, {"num_bins": np.array(3)}):
        save(folder, [("im0", 0, 0, gaussian(5, 2))], "1.npz", **changes)
        with pytest.raises(DataError, match=r"d/1\.npz: expected arrays that fit together"):
            list(read_distributions(folder))


def test_distributions_over_another_grid_are_refused(tmp_path: Path) -> None:
    folder, samples = scenes(tmp_path, 1.0)
    with pytest.raises(DataError, match="expected 1001 bins, those of norm1000, got 1000"):
        metrics_of(folder, samples, CoordCodec(1001, "norm1000"))
