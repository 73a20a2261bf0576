"""Losses counted by reason, and the verdict on them: what lost a large part of its objects stops unless it is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from coordexp.data.importers.base import ImportOptions, RawObject, Unusable
from coordexp.data.importers.judging import judge
from coordexp.errors import DataError

# A larger share of objects or images left out is a misread source, not a few bad items.
MAX_LOSS: Final = 0.2
# One bad item of a handful is judged alone.
_FEWEST: Final = 2


class Stop(DataError):
    """Ends an import whose ``on_invalid`` is ``error``."""


@dataclass
class Tally:
    """Counts of one split. ``images`` and ``objects`` are those of the source, the others those of them that are left out."""

    images: int = 0
    objects: int = 0
    images_lost: int = 0
    objects_lost: int = 0
    unlabelled: int = 0
    without_boxes: int = 0
    images_by_reason: Counter[str] = field(default_factory=Counter)
    objects_by_reason: Counter[str] = field(default_factory=Counter)
    # Of objects whose numbers are pixels: the largest number, to know those that are shares of the side.
    largest: float = 0.0
    firsts: dict[str, str] = field(default_factory=dict)

    def lose_object(self, reason: str, line: str, count: int = 1) -> None:
        """``count`` objects are left out."""
        self.objects += count
        self.objects_lost += count
        self.objects_by_reason[reason] += count
        self.firsts.setdefault(reason, line)

    def judge(
        self, raw: RawObject | Unusable, size: tuple[int, int], options: ImportOptions, coords: str | None, repaired: Callable[[str], None]
    ) -> dict[str, Any]:
        """The object of a record, counted.

        Raises:
            ConfigError: units that nobody has named.
            Unusable: it is left out, and counted so.
        """
        try:
            if isinstance(raw, Unusable):
                raise raw
            made = judge(raw, size, options, repaired, coords=coords)
        except Unusable as fault:
            self.lose_object(fault.reason, str(fault))
            raise
        self.objects += 1
        if self.largest <= 1.0:
            pixels = raw.units == "pixel" or (raw.units is None and coords == "absolute")
            self.largest = max(self.largest, *(abs(float(value)) for value in raw.values)) if pixels else 2.0
        return made

    def lose_image(self, fault: Unusable) -> None:
        """An image (or sample) is left out; one that held no object is no loss."""
        if fault.empty:
            self.without_boxes += 1
            return
        self.images_lost += 1
        self.images_by_reason[fault.reason] += 1
        self.firsts.setdefault(fault.reason, str(fault))

    @property
    def first(self) -> str:
        """The first line of the commonest reason, or nothing."""
        counts = self.objects_by_reason or self.images_by_reason
        return self.firsts[counts.most_common(1)[0][0]] if counts else ""

    @property
    def by_reason(self) -> dict[str, int]:
        """Objects left out by reason, and images (``images: REASON``); the commonest first."""
        images = {f"images: {reason}": count for reason, count in self.images_by_reason.most_common()}
        return {**dict(self.objects_by_reason.most_common()), **images}

    def problem(self, unlabelled: Callable[[], str], cause: Callable[[], str]) -> str | None:
        """Why the split must not pass as it is, with the likely cause, or None."""
        if self.images and self.unlabelled == self.images:
            return f"{self.images} images and not one file of labels: {unlabelled()}; other splits alone are taken with --split"
        if self.objects > self.objects_lost and self.largest <= 1.0:
            return f"no number of its {self.objects} boxes is above 1: they look like shares of the side (0..1), not pixels: {cause()}"
        objects, images = self.objects_lost, self.images_lost
        if objects and (objects == self.objects or (objects >= _FEWEST and objects > MAX_LOSS * self.objects)):
            return (
                f"{objects} of {self.objects} objects ({objects / self.objects:.0%}) left out: {_words(self.objects_by_reason)}: {cause()}"
            )
        if images and (images == self.images or (images >= _FEWEST and images > MAX_LOSS * self.images)):
            return f"{images} of {self.images} images ({images / self.images:.0%}) left out: {_words(self.images_by_reason)}: {cause()}"
        return None


def _words(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common(4))
