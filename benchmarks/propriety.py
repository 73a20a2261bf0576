"""What each objective's optimum is: one categorical over the bins fitted to labels whose distribution is known.

    python benchmarks/propriety.py

``one mode``: labels with a standard deviation of 5 bins; ``two modes``: 80 % of them at 40, 20 % at 60, each with one of 2. A proper
objective ends with the labels' own distribution. Exact expectation, float64, L-BFGS; no data, no seed. Writes
``results/propriety.csv``: ``std`` (bins) of the optimum, and its mass within 10 bins of the smaller mode.
"""

from __future__ import annotations

from pathlib import Path

import torch

from coordexp.bench.measure import append_csv, circumstances
from coordexp.losses.objective import TERMS, CoordObjective
from coordexp.losses.targets import soft_target
from coordexp.losses.terms import SLICE_TERMS, CoordSlice

BINS = 101
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
    "soft_ce + 0.1 entropy": {"soft_ce": 1.0, "entropy": 0.1},
    "soft_ce + 0.3 entropy": {"soft_ce": 1.0, "entropy": 0.3},
    "soft_ce + 0.001 variance": {"soft_ce": 1.0, "variance": 0.001},
    "soft_ce + 0.01 variance": {"soft_ce": 1.0, "variance": 0.01},
    "soft_ce, temperature 0.5, read at 1": {"soft_ce": 1.0, "temperature": 0.5},
    "soft_ce, temperature 2, read at 1": {"soft_ce": 1.0, "temperature": 2.0},
}


def labels(kind: str) -> torch.Tensor:
    """Probability of each bin as a label ``[BINS]``."""
    k = torch.arange(BINS, dtype=torch.float64)
    if kind == "one mode":
        return torch.softmax(-0.5 * ((k - 50) / 5) ** 2, -1)
    return 0.8 * torch.softmax(-0.5 * ((k - 40) / 2) ** 2, -1) + 0.2 * torch.softmax(-0.5 * ((k - 60) / 2) ** 2, -1)


def optimum(objective: CoordObjective, chance: torch.Tensor) -> torch.Tensor:
    """The distribution, read at temperature 1, that minimises the expected loss."""
    bins = torch.arange(BINS)
    q = soft_target(objective, bins.double(), BINS)
    logits = torch.zeros(BINS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=4000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        s = CoordSlice.of(logits.expand(BINS, BINS), bins, bins.double(), q, objective.temperature)
        loss = sum(objective.weight(name) * (chance * SLICE_TERMS[name].value(s)).sum() for name in objective.active)
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(logits.detach(), -1)


def main() -> None:
    """Fit all recipes, print and write them."""
    k, rows = torch.arange(BINS, dtype=torch.float64), []
    for kind in ("one mode", "two modes"):
        truth = labels(kind)
        for name, settings in {"the labels themselves": None, **RECIPES}.items():
            p = truth if settings is None else optimum(CoordObjective(**({term: 0.0 for term in TERMS} | settings)), truth)
            mean = (p * k).sum()
            std, minor = (p * (k - mean) ** 2).sum().sqrt().item(), p[50:71].sum().item()
            print(f"{kind:<10} {name:<40} std {std:5.2f}   mass at 50..70 {minor:.3f}")
            rows.append({"labels": kind, "recipe": name, "std": f"{std:.3f}", "mass_50_70": f"{minor:.4f}", **circumstances("cpu")})
    path = Path(__file__).parent / "results" / "propriety.csv"
    path.unlink(missing_ok=True)
    append_csv(rows, path)


if __name__ == "__main__":
    main()
