"""Which samples share a sequence: a static best-fit-decreasing plan and its schedule over epochs and ranks. stdlib only."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from coordexp.errors import ConfigError, DataError

# In a schedule: a slot without a pack. It keeps the ranks in step and supervises nothing.
FILLER: Final = -1


@dataclass(frozen=True)
class PackPlan:
    """``packs`` hold sample numbers, each at most ``length`` tokens together; ``dropped`` are the over-long samples.

    Every sample is in exactly one pack or in ``dropped``. ``fingerprint`` is a SHA-256 over everything the plan depends on.
    """

    packs: tuple[tuple[int, ...], ...]
    sample_lengths: tuple[int, ...]
    length: int
    seed: int
    dropped: tuple[int, ...]
    fingerprint: str

    @property
    def num_samples(self) -> int:
        """Samples in packs."""
        return sum(map(len, self.packs))

    @property
    def tokens(self) -> int:
        """Tokens in packs."""
        return sum(self.sample_lengths[i] for pack in self.packs for i in pack)

    @property
    def fill(self) -> float:
        """``tokens / (packs * length)``, the last pack included."""
        return self.tokens / (len(self.packs) * self.length)


def plan_packs(
    sample_lengths: Sequence[int],
    *,
    length: int,
    seed: int,
    on_overlong: Literal["error", "drop"] = "error",
    names: Sequence[str],
    inputs: Mapping[str, Any],
) -> PackPlan:
    """Best fit decreasing: longest sample first, each into the fullest pack that still takes it.

    Samples of equal length are taken in an order drawn from ``seed``. ``names`` stand in messages; ``inputs`` are further things
    the fingerprint must depend on (JSON values: data, tokenizer, template ...).

    Raises:
        DataError: a sample longer than ``length`` under ``on_overlong='error'``, or nothing left to pack.
    """
    overlong = [i for i, n in enumerate(sample_lengths) if n > length]
    if overlong and on_overlong == "error":
        longest = max(sample_lengths)
        more = f" ({len(overlong)} samples are too long, the longest has {longest})" if len(overlong) > 1 else ""
        raise DataError(
            f"{names[overlong[0]]}: sample of {sample_lengths[overlong[0]]} tokens, data.packing.length is {length}{more}: "
            f"set data.packing.length to {longest} or more, or data.packing.on_overlong=drop to leave such samples out"
        )
    order = [i for i, n in enumerate(sample_lengths) if n <= length]
    if not order:
        raise DataError(
            f"every one of the {len(sample_lengths)} samples is longer than data.packing.length={length}: "
            f"set it to {max(sample_lengths, default=0)} to keep all"
        )
    random.Random(f"{seed}:plan").shuffle(order)
    order.sort(key=lambda i: -sample_lengths[i])  # stable: the draw decides among equals
    packs = _best_fit([(i, sample_lengths[i]) for i in order], length)
    key = {**inputs, "length": length, "seed": seed, "on_overlong": on_overlong, "sample_lengths": list(sample_lengths)}
    return PackPlan(
        packs=tuple(map(tuple, packs)),
        sample_lengths=tuple(sample_lengths),
        length=length,
        seed=seed,
        dropped=tuple(overlong),
        fingerprint=digest(key),
    )


def _best_fit(items: Sequence[tuple[int, int]], length: int) -> list[list[int]]:
    packs: list[list[int]] = []
    # Packs by the room they have left, and the rooms as bits: the tightest fit is then the lowest set bit from `size` up.
    by_room: dict[int, list[int]] = {}
    rooms = 0
    for sample, size in items:
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = length, len(packs)
            packs.append([])
        packs[pack].append(sample)
        by_room.setdefault(room - size, []).append(pack)
        rooms |= 1 << (room - size)
    return packs


@dataclass(frozen=True)
class PackSchedule:
    """The packs of a plan, epoch by epoch, over ``ranks`` of ``batch`` packs a micro-batch, ``accumulate`` micro-batches a step.

    Every rank gets the same number of micro-batches. ``tail``: what becomes of the last incomplete step of an epoch: ``drop``
    leaves its packs out (others in every epoch, counted in ``left_out``); ``pad`` takes the step with the packs there are, and where
    ranks would fall out of step adds ``FILLER`` slots.

    Raises:
        ConfigError: ``tail='drop'`` with fewer packs than one step takes.
    """

    plan: PackPlan
    ranks: int = 1
    batch: int = 1
    accumulate: int = 1
    tail: Literal["drop", "pad"] = "pad"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.tail == "drop" and len(self.plan.packs) < self.window:
            raise ConfigError(
                f"data.packing.tail: drop leaves nothing: {len(self.plan.packs)} packs, one step takes {self.window}: "
                "set data.packing.tail=pad, or lower train.per_device_train_batch_size, train.gradient_accumulation_steps or "
                "data.packing.length"
            )

    @property
    def window(self) -> int:
        """Packs of one full optimizer step."""
        return self.ranks * self.batch * self.accumulate

    @property
    def slots(self) -> int:
        """Packs and fillers of an epoch."""
        packs = len(self.plan.packs)
        if self.tail == "drop":
            return packs - packs % self.window
        return packs if self.ranks == 1 else _up(packs, self.ranks * self.batch)

    @property
    def left_out(self) -> int:
        """Packs that ``tail='drop'`` leaves out of an epoch."""
        return max(len(self.plan.packs) - self.slots, 0)

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return _up(self.slots, self.window) // self.window

    def order(self, epoch: int) -> tuple[int, ...]:
        """Pack numbers of an epoch, ``FILLER`` where there is none; a pure function of the plan's seed and ``epoch``."""
        packs = list(range(len(self.plan.packs)))
        if self.shuffle:
            random.Random(f"{self.plan.seed}:epoch:{epoch}").shuffle(packs)
        return tuple(packs[: self.slots]) + (FILLER,) * (self.slots - len(packs))

    def shard(self, epoch: int, rank: int) -> tuple[tuple[int, ...], ...]:
        """The micro-batches of one rank: micro-batch j of the epoch goes to rank ``j mod ranks``."""
        order = self.order(epoch)
        batches = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        return tuple(batches[rank :: self.ranks])


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
