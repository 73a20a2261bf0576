"""What the objective costs on top of a language-model head: time (interleaved medians) and peak memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import backward

from coordexp.bench import baselines
from coordexp.bench.baselines import Workload, make_workload
from coordexp.bench.measure import Progress, circumstances, interleaved, spread
from coordexp.losses import targets, terms
from coordexp.losses.linear import DEFAULT_BUDGET_MB, linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.losses.terms import CoordSlice

FULL = CoordObjective(ce=0.5, w1=0.05, crps=0.05)

# Another loss on the same inputs: made once, from the workload and the buffer in MB; a call is a forward pass.
Rival = Callable[[Workload, float], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class LossBench:
    """Sizes; ``rounds`` are counted after one that warms up; ``impl`` as in ``linear_coord_loss``."""

    rows: int = 2048
    coords: int = 700
    vocab: int = 152_670
    dim: int = 256
    bins: int = 1000
    rounds: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    impl: str = "auto"

    @property
    def budget_mb(self) -> float:
        """Buffer of the chunked variants, ours and torch's."""
        return DEFAULT_BUDGET_MB[self.device.split(":")[0]]

    def workload(self) -> Workload:
        """The inputs of every variant."""
        return make_workload(
            rows=self.rows, coords=self.coords, vocab=self.vocab, dim=self.dim, bins=self.bins, dtype=getattr(torch, self.dtype),
            device=self.device,
        )  # fmt: skip


def variants(bench: LossBench, w: Workload, rivals: Mapping[str, Rival]) -> dict[str, Callable[[], object]]:
    """Calls that each run one forward and backward on the same inputs, by name."""

    def ours(objective: CoordObjective, *, text_only: bool = False, frozen: bool = False, rows: bool = False) -> Callable[[], object]:
        # Without coordinates the slice is two unused rows: the same code as plain fused cross-entropy.
        labels = torch.where(w.is_coord, w.labels - w.bins, w.labels).cpu() if text_only else w.labels.cpu()
        weight = w.weight.detach() if frozen or rows else w.weight
        coord_weight = w.weight.detach()[w.start :].clone().requires_grad_() if rows else None
        start, bins = (bench.vocab - 2, 2) if text_only else (w.start, w.bins)
        return lambda: backward(
            linear_coord_loss(
                w.hidden, weight, labels, coord_start=start, num_bins=bins, objective=objective, impl=bench.impl, coord_weight=coord_weight
            ).loss
        )

    def trained(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: backward(call())

    table: dict[str, Callable[[], object]] = {
        "three_products": baselines.products(w, bench.budget_mb),
        "ours_ce_only": ours(CoordObjective.plain_ce(), text_only=True),
        "ours_full": ours(FULL),
        "ours_full_tau_0.9": ours(replace(FULL, temperature=0.9)),
        "ours_full_no_gate": ours(replace(FULL, gate=0.0)),
        "ours_full_frozen_head": ours(FULL, frozen=True),
        "ours_full_rows_only": ours(FULL, rows=True),
        "textbook_ce_only": trained(lambda: baselines.textbook_loss(w, coordinates=False)),
        "textbook_full": trained(lambda: baselines.textbook_loss(w, coordinates=True)),
        **{name: trained(make(w, bench.budget_mb)) for name, make in rivals.items()},
    }
    return {name: _fresh(call, w) for name, call in table.items()}


def _fresh(call: Callable[[], object], w: Workload) -> Callable[[], None]:
    def run() -> None:
        w.hidden.grad = w.weight.grad = None
        call()

    return run


def measure(
    bench: LossBench,
    *,
    memory: bool = True,
    progress: Progress | None = None,
    rivals: Mapping[str, Rival] | None = None,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """One row a variant: milliseconds, ratios to the products, to our own CE and to the textbook, peak memory in MB.

    ``only``: names of the variants to measure, rivals included (None: all). A ratio to one that is not measured is empty.
    """
    rivals = rivals or {}
    calls = variants(bench, bench.workload(), rivals)
    seconds = interleaved(
        {name: call for name, call in calls.items() if only is None or name in only}, bench.rounds, device=bench.device, progress=progress
    )
    peaks = {name: peak_mb(bench, name, rivals) for name in seconds} if memory else {}
    median = {name: spread(values)[1] for name, values in seconds.items()}
    shared = circumstances(bench.device)
    rows = []
    for name, values in seconds.items():
        p20, p50, p80 = (1000 * v for v in spread(values))
        rows.append(
            {
                "variant": name, "rows": bench.rows, "coords": bench.coords, "vocab": bench.vocab, "dim": bench.dim, "dtype": bench.dtype,
                "n": len(values), "p20_ms": f"{p20:.2f}", "p50_ms": f"{p50:.2f}", "p80_ms": f"{p80:.2f}",
                "to_products": _ratio(median, name, "three_products"),
                "to_ours_ce": _ratio(median, name, "ours_ce_only"),
                "to_textbook": _ratio(median, name, "textbook_full"),
                "peak_mb": f"{peaks[name]:.0f}" if memory else "",
                "memory_to_textbook": _ratio(peaks, name, "textbook_full"),
                **shared,
            }
        )  # fmt: skip
    return rows


def _ratio(values: Mapping[str, float], name: str, base: str) -> str:
    return f"{values[name] / values[base]:.3f}" if base in values else ""


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of :func:`measure` for people, without what was not measured."""
    notes = (
        ("to_products", "x products {}"), ("to_ours_ce", "x our CE {}"), ("to_textbook", "x textbook {}"),
        ("peak_mb", "peak {} MB"), ("memory_to_textbook", "(x textbook {})"),
    )  # fmt: skip
    return [
        f"{row['variant']:<28}{row['p50_ms']:>10} ms (p20 {row['p20_ms']}, p80 {row['p80_ms']})  "
        + "  ".join(words.format(row[key]) for key, words in notes if row[key])
        for row in rows
    ]


def peak_mb(bench: LossBench, variant: str, rivals: Mapping[str, Rival]) -> float:
    """Peak memory above the inputs of one call, gradients included: a process of its own on a CPU, the allocator's count on a GPU."""
    if bench.device == "cpu":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_resident_mb, bench, variant, rivals).result()
    call = variants(bench, bench.workload(), rivals)[variant]
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    call()
    return (torch.cuda.max_memory_allocated(bench.device) - before) / 2**20


def _resident_mb(bench: LossBench, variant: str, rivals: Mapping[str, Rival]) -> float:
    """In this process: peak resident memory of one call above what was resident before it, MB."""
    call = variants(bench, bench.workload(), rivals)[variant]
    # The kernel's peak of a process counts from its parent's: start it again from here.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _peak_resident_kb()
    call()
    return (_peak_resident_kb() - before) / 1024


def _peak_resident_kb() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0])


def note_table(bench: LossBench, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Forward time of the loss alone on given logits, ``coords`` rows: hard CE, soft CE + W1, gate.

    The textbook's gate is two logsumexp, one over the whole vocabulary; ours takes the one that cross-entropy has made.
    """
    logits = torch.empty(bench.coords, bench.vocab, device=bench.device).normal_()
    bins = torch.randint(0, bench.bins, (bench.coords,), device=bench.device)
    part, centers = logits[:, -bench.bins :].clone(), bins.float()
    objective = CoordObjective()
    lse_rest, lse_coord = torch.logsumexp(logits[:, : -bench.bins], -1), torch.logsumexp(part, -1)

    def ours_soft() -> object:
        s = CoordSlice.of(part, bins, centers, targets.soft_target(objective, centers, bench.bins), 1.0)
        return terms.soft_ce(s.log_p, s.q), terms.w1(s.p, s.q)

    calls: dict[str, Callable[[], object]] = {
        "textbook: hard CE": lambda: torch.nn.functional.cross_entropy(part, bins, reduction="none"),
        "textbook: soft CE + W1": lambda: baselines.soft_ce_w1(part, baselines.gaussian(bins, bench.bins, 2.0)),
        "textbook: gate": lambda: torch.logsumexp(logits, -1) - torch.logsumexp(part, -1),
        "ours: hard CE": lambda: terms.ce(torch.log_softmax(part, -1), bins),
        "ours: soft CE + W1": ours_soft,
        "ours: gate": lambda: terms.gate(lse_coord, lse_rest),
    }
    seconds = interleaved(calls, max(20, bench.rounds), device=bench.device, progress=progress)
    shared = circumstances(bench.device)
    return [
        {"loss": name, "coords": bench.coords, "vocab": bench.vocab, "bins": bench.bins, "n": len(values)}
        | {f"{label}_ms": f"{1000 * v:.4f}" for label, v in zip(("p20", "p50", "p80"), spread(values), strict=True)}
        | shared
        for name, values in seconds.items()
    ]
