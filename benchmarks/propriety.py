"""What each objective's optimum is: one categorical over the bins fitted to labels whose true standard deviation is 5 bins.

    python benchmarks/propriety.py

A proper objective ends with a standard deviation of 5. Exact expectation over the labels, float64, L-BFGS; no data, no seed.
Writes ``results/propriety.csv``: ``std`` and ``mean`` of the optimum in bins.
"""

from __future__ import annotations

from pathlib import Path

import torch

from coordexp.bench.measure import append_csv, circumstances
from coordexp.losses.objective import TERMS, CoordObjective
from coordexp.losses.targets import soft_target
from coordexp.losses.terms import SLICE_TERMS, CoordSlice

BINS, MEAN, STD = 101, 50.0, 5.0
RECIPES = {
    "ce": {"ce": 1.0},
    "soft_ce, sigma 2": {"soft_ce": 1.0},
    "w1 to the soft target": {"w1": 1.0},
    "crps": {"crps": 1.0},
    "soft_ce + w1/999 per bin": {"soft_ce": 1.0, "w1": 1 / 999},
    "soft_ce + 3 w1/999 per bin": {"soft_ce": 1.0, "w1": 3 / 999},
    "soft_ce + 0.02 w1": {"soft_ce": 1.0, "w1": 0.02},
    "soft_ce + 0.1 w1": {"soft_ce": 1.0, "w1": 0.1},
    "soft_ce + 0.5 w1": {"soft_ce": 1.0, "w1": 0.5},
    "soft_ce + 0.1 crps": {"soft_ce": 1.0, "crps": 0.1},
    "soft_ce, temperature 0.5, read at 1": {"soft_ce": 1.0, "temperature": 0.5},
    "soft_ce, temperature 2, read at 1": {"soft_ce": 1.0, "temperature": 2.0},
}


def optimum(objective: CoordObjective) -> tuple[float, float]:
    """Mean and standard deviation (bins, read at temperature 1) of the distribution that minimises the expected loss."""
    labels = torch.arange(BINS)
    centers = labels.double()
    chance = torch.softmax(-0.5 * ((centers - MEAN) / STD) ** 2, -1)
    q = soft_target(objective, centers, BINS)
    logits = torch.zeros(BINS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=4000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        s = CoordSlice.of(logits.expand(BINS, BINS), labels, centers, q, objective.temperature)
        loss = sum(objective.weight(name) * (chance * SLICE_TERMS[name].value(s)).sum() for name in objective.active)
        loss.backward()
        return loss

    optimizer.step(closure)
    p = torch.softmax(logits.detach(), -1)
    mean = (p * centers).sum()
    return mean.item(), (p * (centers - mean) ** 2).sum().sqrt().item()


def main() -> None:
    """Fit all recipes, print and write them."""
    rows = []
    for name, settings in RECIPES.items():
        mean, std = optimum(CoordObjective(**({term: 0.0 for term in TERMS} | settings)))
        print(f"{name:<40} std {std:5.2f}   mean {mean:5.2f}")
        rows.append({"recipe": name, "true_std": STD, "std": f"{std:.3f}", "mean": f"{mean:.3f}", **circumstances("cpu")})
    path = Path(__file__).parent / "results" / "propriety.csv"
    path.unlink(missing_ok=True)
    append_csv(rows, path)


if __name__ == "__main__":
    main()
