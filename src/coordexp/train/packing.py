"""Packed training: data sets, collator, and the probe that refuses a set-up in which samples of a pack see each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from coordexp.data.collate import TrainCollator
from coordexp.data.dataset import RecordDataset
from coordexp.data.options import PackingOptions
from coordexp.data.packed import Pack, PackCollator, PackedDataset, plan_dataset
from coordexp.data.packing import PackSchedule
from coordexp.data.staging import atomic_text
from coordexp.data.template import Example
from coordexp.errors import ConfigError
from coordexp.modeling.positions import RopeIndex, backbone

# Relative difference of hidden states allowed between a pack and its samples alone. Leaks are above 0.1.
TOLERANCE: Final = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 0.05, torch.float16: 0.02}
# Same shapes, same kernels: what a sample does not see cannot move it, in no precision.
UNSEEN: Final = 1e-6


@dataclass(frozen=True)
class PackedData:
    """What the trainer gets instead of plain data sets and collator."""

    train: PackedDataset
    eval: PackedDataset
    collator: PackCollator

    def lines(self) -> list[str]:
        """The plan in words, for the start-up banner."""
        schedule, plan = self.train.schedule, self.train.schedule.plan
        lines = [
            f"packing: {plan.num_samples} samples in {len(plan.packs)} packs of at most {plan.length} tokens, fill {plan.fill:.4f}, "
            f"{schedule.steps} steps an epoch, plan {plan.fingerprint[:12]}"
        ]
        if schedule.left_out:
            lines.append(f"packing leaves {schedule.left_out} packs out of every epoch (data.packing.tail=drop), others each time")
        for split, data in (("train", self.train), ("val", self.eval)):
            dropped = [data.samples.records[i].image_id for i in data.schedule.plan.dropped]
            if dropped:
                named = ", ".join(dropped[:5]) + (", ..." if len(dropped) > 5 else "")
                lines.append(f"packing left out {len(dropped)} {split} samples over {plan.length} tokens: {named} (all in packing.json)")
        return lines

    def write(self, path: Path) -> None:
        """Both plans as JSON."""
        with atomic_text(path) as file:
            json.dump({"train": _summary(self.train), "val": _summary(self.eval)}, file, indent=1)
            file.write("\n")


def _summary(data: PackedDataset) -> dict[str, Any]:
    schedule, plan = data.schedule, data.schedule.plan
    return {
        "fingerprint": plan.fingerprint,
        "length": plan.length,
        "samples": plan.num_samples,
        "tokens": plan.tokens,
        "packs": len(plan.packs),
        "fill": plan.fill,
        "steps_per_epoch": schedule.steps,
        "packs_left_out_per_epoch": schedule.left_out,
        "dropped": [data.samples.records[i].image_id for i in plan.dropped],
    }


def packed_data(
    options: PackingOptions, *, model: Any, train: RecordDataset, evaluation: RecordDataset, collate: TrainCollator, args: Any
) -> PackedData:
    """Plans and schedules of both splits for the ranks and batch sizes of ``args``; evaluation is neither shuffled nor cut.

    Raises:
        CoordexpError: an architecture, a length or a tail that cannot work.
    """
    rope = RopeIndex.of(model)
    plan = plan_dataset(train, options, seed=args.data_seed)
    ranks = args.world_size
    schedule = PackSchedule(
        plan, ranks=ranks, batch=args.train_batch_size, accumulate=args.gradient_accumulation_steps, tail=options.tail
    )  # fmt: skip
    held_out = PackSchedule(plan_dataset(evaluation, options, seed=args.data_seed), ranks=ranks, batch=args.eval_batch_size, shuffle=False)
    single_row = "flash" in model.config._attn_implementation
    return PackedData(PackedDataset(train, schedule), PackedDataset(evaluation, held_out), PackCollator(collate, rope, single_row))


def refuse_leaks(
    data: PackedDataset,
    *,
    model: torch.nn.Module,
    run: Callable[[dict[str, Any]], Any],
    collate: TrainCollator,
    packed: Callable[[Sequence[Pack]], dict[str, Any]],
    attention: str,
    dtype: torch.dtype,
) -> float | None:
    """Run one real pack as training does and compare it with its samples alone; returns the largest relative difference.

    Two questions, to the backbone's last hidden states under ``run(batch)``, in evaluation mode: does the pack give every sample
    the states it has alone (``|a - b| / |b|``, Frobenius, within :data:`TOLERANCE` of ``dtype``)? Does the last sample stay as it is,
    to :data:`UNSEEN`, when the answers of the others change? The second needs no allowance for rounding. None: no pack holds two samples.

    Raises:
        ConfigError: samples of a pack see each other, or lose their positions.
    """
    pack = next((data[i] for i in range(len(data)) if len(data.schedule.plan.packs[data.schedule.order(0)[i]]) > 1), None)
    if pack is None:
        return None
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = _split(_states(model, run, packed([pack])), pack.examples)
            alone = [_states(model, run, collate([example]))[0] for example in pack.examples]
            blanked = Pack((*(_blank(example, collate.pad_token_id) for example in pack.examples[:-1]), pack.examples[-1]))
            other = _split(_states(model, run, packed([blanked])), pack.examples)
    finally:
        model.train(training)
    way_out = (
        f"packing with model.attn_implementation={attention} lets samples of one pack see each other: "
        "{}: set model.attn_implementation=sdpa, or data.packing.enabled=false"
    )
    moved = _difference(other[-1], together[-1])
    if not moved <= UNSEEN:
        raise ConfigError(way_out.format(f"the last sample's hidden states move by {moved:.1e} when the answers before it change"))
    worst = max(_difference(a, b) for a, b in zip(together, alone, strict=True))
    if not worst <= TOLERANCE[dtype]:
        raise ConfigError(way_out.format(f"hidden states in a pack differ by {worst:.1e} from those of the samples alone"))
    return worst


def _states(model: torch.nn.Module, run: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> Tensor:
    """Last hidden states ``[B, T, D]`` in float64, taken where training takes them."""
    seen: list[Tensor] = []
    handle = backbone(model).register_forward_hook(lambda module, args, output: seen.append(output[0].double()))
    try:
        run(batch)
    finally:
        handle.remove()
    (states,) = seen
    return states


def _split(states: Tensor, examples: Sequence[Example]) -> list[Tensor]:
    return list(torch.split(states[0], [len(example.input_ids) for example in examples]))


def _blank(example: Example, pad: int) -> Example:
    """The sample with its answer replaced by padding tokens."""
    return dataclasses.replace(example, input_ids=[pad if r else i for i, r in zip(example.input_ids, example.roles, strict=True)])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
