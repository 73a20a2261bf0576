"""Every registered metric against a slow definition in numpy, and what the registry promises."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from coordexp import distribution
from coordexp.data.targets import Targets
from coordexp.grammar import ROLE_CODES
from coordexp.losses.linear import linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import LossSums
from coordexp.train import registry
from coordexp.train.meters import ks_uniform, quantile, step_sums, summarize
from coordexp.train.options import TokenTypeMetrics
from heads import make_head

OBJECTIVE = CoordObjective(ce=0.3, w1=0.1, sigma=1.5, temperature=0.8)


def batch_for(head, seed=3):
    g = torch.Generator().manual_seed(seed)
    is_coord = ~head.centers.isnan()
    roles = torch.where(torch.rand(len(head.labels), generator=g) < 0.4, ROLE_CODES["desc"], ROLE_CODES["format"])
    roles = torch.where(is_coord, ROLE_CODES["coord"], roles).masked_fill(head.labels == -100, ROLE_CODES["none"])
    slots = torch.randint(0, 4, (len(head.labels),), generator=g).masked_fill(~is_coord, -1)
    return {"labels": head.labels, "roles": roles, "centers": head.centers, "slots": slots, "extents": 3 * head.extents}


def sums_of(head, batch, options, part=slice(None)):
    output = linear_coord_loss(
        head.hidden[part], head.weight, head.labels[part], coord_start=head.start, num_bins=head.bins, objective=OBJECTIVE,
        centers=head.centers[part], top5=options.log_top5, diagnostics=options.enabled,
    )  # fmt: skip
    return step_sums(output, Targets({name: column[None, part] for name, column in batch.items()}, []), options)


def slow_metrics(head, batch):
    """One position at a time, in numpy."""
    logits = (head.hidden @ head.weight.T).numpy()
    columns = slice(head.start, head.start + head.bins)
    k = np.arange(head.bins)
    rows = {name: [] for name in ("all", "text", "coord", "desc", "format")}
    names = {code: name for name, code in ROLE_CODES.items()}
    roles, slots, extents = (batch[name].tolist() for name in ("roles", "slots", "extents"))
    for i, label in enumerate(head.labels.tolist()):
        if label == -100:
            continue
        z = logits[i]
        p_all = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        inside = head.start <= label < head.start + head.bins
        row = {
            "correct": float(z.argmax() == label), "correct_top5": float((z > z[label]).sum() < 5), "mass": p_all[columns].sum(),
            "argmax_is_coord": float(columns.start <= z.argmax() < columns.stop), "slot": slots[i], "extent": extents[i],
        }  # fmt: skip
        if inside:
            c, t, s = head.centers[i].item(), label - head.start, z[columns]
            p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
            pt = np.exp((s - s.max()) / 0.8)
            pt /= pt.sum()
            q = np.exp(-((k - c) ** 2) / (2 * 1.5**2))
            q /= q.sum()
            cdf, best = p.cumsum(), p.argmax()
            m = int((cdf < 0.5 * cdf[-1]).sum())
            median = m - 0.5 + (0.5 * cdf[-1] - (cdf[m] - p[m])) / p[m]
            near = abs(k - best) <= 16
            top = np.argsort(-p)[:10]
            step = np.clip(k + 1 - c, 0, 1)
            home = math.floor(c + 0.5)
            peaks = [
                j for j in k
                if p[j] > 0.1 * p.max() and all(p[j] >= p[max(0, j - 3) : j + 4]) and all(p[j] > p[max(0, j - 3) : j])
            ]  # fmt: skip
            pit = p[:home].sum() + (c + 0.5 - home) * p[home]
            row |= {
                "p_gt": p[t], "margin": s.max() - s[t], "top5": float((s > s[t]).sum() < 5), "nll": -math.log(p[t]),
                "expected": abs((p * k).sum() - c), "argmax": abs(best - c), "median": abs(median - c), "bias": median - c,
                "window": abs((p * k)[near].sum() / p[near].sum() - c), "topk": abs((p * k)[top].sum() / p[top].sum() - c),
                "entropy": -(p * np.log(p)).sum(), "std": math.sqrt((p * (k - (p * k).sum()) ** 2).sum()), "tail": p[~near].sum(),
                "modes": len(peaks), "crps": ((cdf - step) ** 2 + step * (1 - step)).sum(), "pit": pit, "ceiling": q[t],
                "kl": (q * np.log(q / pt)).sum(),
            }  # fmt: skip
        for name in ("all", "coord" if inside else "text", *([] if inside else [names[roles[i]]])):
            rows[name].append(row)

    def mean(name, group="coord", where=lambda r: True):
        return np.mean([r[name] for r in rows[group] if where(r)])

    d = {
        "coord_softce_w1/coord_vocab_mass": mean("mass"), "coord_softce_w1/p_gt_mean": mean("p_gt"),
        "coord_softce_w1/margin_mean": mean("margin"), "coord_softce_w1/acc_top5": mean("top5"), "coord_expected_bin_mae": mean("expected"),
        "coord_dist/crps": mean("crps"), "coord_dist/nll": mean("nll"), "coord_dist/entropy": mean("entropy"),
        "coord_dist/std": mean("std"),
        "coord_dist/modes": mean("modes"), "coord_dist/multimodal_frac": np.mean([r["modes"] > 1 for r in rows["coord"]]),
        "coord_dist/tail_mass": mean("tail"), "coord_dist/p_gt_ceiling": mean("ceiling"), "coord_dist/kl": mean("kl"),
        "coord_dist/argmax_bin_mae": mean("argmax"), "coord_dist/median_bin_mae": mean("median"),
        "coord_dist/window_bin_mae": mean("window"),
        "coord_dist/topk_bin_mae": mean("topk"), "coord_dist/signed_bias": mean("bias"), "token_acc": mean("correct", "all"),
        "token_acc_top5": mean("correct_top5", "all"), "text_token_acc": mean("correct", "text"),
        "coord_monitor/flip_coord_to_noncoord": 1 - mean("argmax_is_coord"), "coord_monitor/mass_tokens": len(rows["text"]),
    }  # fmt: skip
    for level in (50, 80, 95):
        d[f"coord_dist/coverage_{level}"] = np.mean([abs(r["pit"] - 0.5) <= level / 200 for r in rows["coord"]])
    for number, slot in enumerate(registry.SLOTS):
        for key, name in (("crps", "crps"), ("nll", "nll"), ("median_bin_mae", "median")):
            d[f"coord_dist/{key}_{slot}"] = mean(name, where=lambda r, n=number: r["slot"] == n)
    for size, (low, high) in registry.SIZES.items():
        for key, name in (("crps", "crps"), ("nll", "nll"), ("median_bin_mae", "median")):
            d[f"coord_dist/{key}_{size}"] = mean(name, where=lambda r, a=low, b=high: a < r["extent"] <= b)
    for role in ("coord", "desc", "format"):
        d[f"{role}_token_acc"], d[f"{role}_token_acc_top5"] = mean("correct", role), mean("correct_top5", role)
        d[f"{role}_token_frac"] = len(rows[role]) / len(rows["all"])
    for role in ("text", "desc", "format"):
        d[f"coord_monitor/flip_{role}_to_coord"] = mean("argmax_is_coord", role)
    for role in ("coord", "text", "desc", "format"):
        d[f"coord_monitor/coord_vocab_mass_at_gt_{role}"] = mean("mass", role)
    return d, rows


def test_every_metric_equals_its_slow_definition_however_the_batch_is_split():
    head = make_head(t=240, coords=120, ignored=20, scale=0.5)
    batch, options = batch_for(head), TokenTypeMetrics()
    expected, rows = slow_metrics(head, batch)
    for parts in ([slice(None)], [slice(0, 7), slice(7, 100), slice(100, 101), slice(101, 240)]):
        total = LossSums()
        for part in parts:
            total = total + sums_of(head, batch, options, part)
        metrics = summarize(total, OBJECTIVE, options)
        for key, value in expected.items():
            assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
        errors, pits = [r["median"] for r in rows["coord"]], [r["pit"] for r in rows["coord"]]
        assert metrics["coord_dist/abs_err_p90"] == pytest.approx(np.quantile(errors, 0.9, method="inverted_cdf"), abs=0.5)
        assert metrics["coord_dist/pit_ks"] == pytest.approx(kstest(pits, "uniform").statistic, abs=0.011)
        rest = set(metrics) - set(expected) - {"coord_dist/abs_err_p90", "coord_dist/pit_ks"}
        assert all(key.startswith(("loss", "contrib/", "base_ce/", "coord_softce_w1/")) for key in rest), (
            "a metric without a definition here"
        )


def test_a_batch_without_coordinates_moves_no_coordinate_metric_and_hides_no_key():
    options, head, empty = TokenTypeMetrics(), make_head(t=60), make_head(t=30, coords=0, seed=5)
    one = sums_of(head, batch_for(head), options)
    both = one + sums_of(empty, batch_for(empty), options)
    alone, together = (summarize(s, OBJECTIVE, options) for s in (one, both))
    coord = [m.key for m in registry.METRICS if m.positions.startswith("coord")]
    assert len(coord) > 40
    for key in coord:
        assert together[key] == pytest.approx(alone[key], nan_ok=True), key
    nothing = summarize(sums_of(empty, batch_for(empty), options), OBJECTIVE, options)
    assert tuple(sorted(nothing)) == tuple(sorted(alone)) == tuple(sorted(registry.keys(options)))
    assert math.isnan(nothing["coord_dist/crps"])
    assert math.isnan(nothing["coord_dist/abs_err_p90"])


@pytest.mark.parametrize(
    ("options", "gone", "kept"),
    [
        (TokenTypeMetrics(enabled=False), "token_acc", "coord_softce_w1/gate"),
        (TokenTypeMetrics(log_top5=False), "token_acc_top5", "coord_softce_w1/acc_top5"),
        (TokenTypeMetrics(coord_monitor_mass=False), "coord_monitor/coord_vocab_mass_at_gt_text", "coord_softce_w1/coord_vocab_mass"),
    ],
)
def test_a_knob_takes_its_own_keys_away_and_no_other(options, gone, kept):
    head = make_head(t=40)
    metrics = summarize(sums_of(head, batch_for(head), options), OBJECTIVE, options)
    assert gone not in metrics
    assert kept in metrics
    assert set(metrics) == set(registry.keys(options))


def test_the_cap_on_mass_positions_is_kept_and_counted():
    head = make_head(t=200, coords=50)
    batch = batch_for(head)
    for most in (1, 7, 64, 1000):
        options = TokenTypeMetrics(coord_monitor_mass_max_tokens=most)
        used = summarize(sums_of(head, batch, options), OBJECTIVE, options)["coord_monitor/mass_tokens"]
        assert 1 <= used <= most
        assert used >= min(most, 145) / 2
    with pytest.raises(ValueError, match="coord_monitor_mass_max_tokens"):
        TokenTypeMetrics(coord_monitor_mass_max_tokens=0)


def test_a_calibrated_predictor_has_a_uniform_pit_and_true_coverage():
    """Truths drawn from the distributions themselves."""
    g = torch.Generator().manual_seed(0)
    n, bins = 20_000, 60
    p = torch.softmax(2 * torch.randn(n, bins, generator=g, dtype=torch.float64), -1)
    drawn = torch.multinomial(p, 1, generator=g).squeeze(-1)
    centers = drawn + torch.rand(n, generator=g, dtype=torch.float64) - 0.5
    pit = distribution.pit(p, centers)
    assert kstest(pit.numpy(), "uniform").pvalue > 0.01
    for level in (0.5, 0.8, 0.95):
        assert ((pit - 0.5).abs() <= level / 2).double().mean().item() == pytest.approx(level, abs=0.01)


def test_histograms_give_quantiles_and_distances_to_half_a_bin():
    h = registry.Histogram("x", 0.0, 10.0, 100, "")
    values = torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10
    counts = torch.histc(values, 100, 0, 10)
    assert quantile(counts, h, 0.9) == pytest.approx(torch.quantile(values, 0.9).item(), abs=0.05)
    assert ks_uniform(counts) == pytest.approx(kstest(values.numpy() / 10, "uniform").statistic, abs=0.01)
    assert ks_uniform(torch.tensor([4.0, 0.0])) == 0.5


def test_keys_are_unique_and_the_kept_names_are_there():
    keys = registry.keys(TokenTypeMetrics())
    assert len(set(keys)) == len(keys)
    for key in (
        "loss", "base_ce/loss", "base_ce/noncoord_tokens", "coord_softce_w1/coord_vocab_mass", "coord_expected_bin_mae", "token_acc_top5",
        "desc_token_frac", "coord_monitor/flip_desc_to_coord", "coord_monitor/coord_vocab_mass_at_gt_format", "coord_dist/pit_ks",
    ):  # fmt: skip
        assert key in keys


def test_the_page_is_the_registry():
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert registry.written_into(page) == page, "run: python -m coordexp.train.registry docs/metrics.md"


def test_a_value_that_is_no_number_reaches_the_metrics_of_its_own_positions_alone():
    head = make_head(t=60, coords=30, ignored=0)
    batch, options = batch_for(head), TokenTypeMetrics()
    struck = int((batch["roles"] == ROLE_CODES["desc"]).nonzero()[0])
    head.hidden[struck] = math.nan
    metrics = summarize(sums_of(head, batch, options), OBJECTIVE, options)
    spoilt = {key for key, value in metrics.items() if math.isnan(value)}
    assert {"loss", "coord_monitor/coord_vocab_mass_at_gt_desc", "coord_monitor/coord_vocab_mass_at_gt_text"} <= spoilt
    assert not {key for key in spoilt if key.startswith("coord_dist/") or "format" in key}
    coordinate = int((batch["roles"] == ROLE_CODES["coord"]).nonzero()[0])
    head.hidden[coordinate] = math.nan
    metrics = summarize(sums_of(head, batch, options), OBJECTIVE, options)
    # From histograms too no number is read.
    assert all(math.isnan(metrics[f"coord_dist/{key}"]) for key in ("crps", "abs_err_p90", "pit_ks"))
