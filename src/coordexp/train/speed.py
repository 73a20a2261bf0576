"""Throughput of training, and the loss layer's share of it."""

from __future__ import annotations

import time
from typing import Any, Final

import torch
from torch import Tensor, nn

KEYS: Final = ("speed/tokens_per_s", "speed/supervised_tokens_per_s", "speed/samples_per_s", "speed/loss_share")


class SpeedMeter:
    """Times of the steps of a log window; evaluation, saving and the probe are not in them.

    The loss layer is the forward of ``head``, the head's linear module. Its gradient is made there too, so that is all of its cost but a
    scaling. With ``cuda`` both ends are events of the stream, read when the window is logged.
    """

    def __init__(self, head: nn.Module, *, cuda: bool) -> None:
        self._cuda = cuda
        self._ends: list[tuple[Any, Any]] = []
        self._start: Any = None
        self._begin: float | None = None
        self._seconds = 0.0
        self._tokens: list[Tensor | int] = []
        self._supervised: list[Tensor] = []
        self.latest: dict[str, float] = {}
        head.register_forward_pre_hook(self._before_head)
        head.register_forward_hook(self._after_head)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _before_head(self, module: nn.Module, args: Any) -> None:
        self._start = self._now()

    def _after_head(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            self._ends.append((self._start, self._now()))

    def begin(self) -> None:
        """A step starts, before its batches are drawn."""
        self._begin = time.perf_counter()

    def batches(self, batches: list[dict[str, Any]], supervised: Tensor) -> None:
        """The step's micro-batches of this rank, and its supervised positions over all ranks."""
        for batch in batches:
            # Packs come without a mask; what pads their rows is then counted too.
            self._tokens.append(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
        self._supervised.append(supervised)

    def end(self) -> None:
        """The optimizer has moved."""
        if self._begin is not None:
            self._seconds += time.perf_counter() - self._begin
            self._begin = None

    def take(self, samples: float, ranks: int, total: Any) -> dict[str, float]:
        """Values since the last call: ``samples`` over all ranks, ``total(tensor)`` sums over ranks; times are this rank's."""
        local = torch.tensor([float(sum(int(count) for count in self._tokens))], dtype=torch.float64)
        tokens = float(total(local)) if ranks > 1 else float(local)
        supervised = float(sum(float(count) for count in self._supervised))
        if self._cuda:
            torch.cuda.synchronize()
        inside = sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in self._ends)
        seconds, self._seconds = self._seconds, 0.0
        self._tokens.clear()
        self._supervised.clear()
        self._ends.clear()
        if seconds <= 0:
            return {}
        self.latest = dict(zip(KEYS, (tokens / seconds, supervised / seconds, samples / seconds, inside / seconds), strict=True))
        return self.latest
