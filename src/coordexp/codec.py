"""Pixels to coordinate bins and back, under named conventions.

A *bin position* ``b`` is real; a *bin* ``k`` is the integer that has a token. Bin ``k`` covers
``[k - 0.5, k + 0.5)`` on the bin axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coordexp.errors import ConfigError


@dataclass(frozen=True)
class Convention:
    """``b = x / side * scale`` with ``bins`` tokens; ``floor`` says how a real position becomes a bin."""

    scale: float
    bins: int
    floor: bool
    source: str


CONVENTIONS: Final[dict[str, Convention]] = {
    "norm999": Convention(999.0, 1000, False, "Pix2Seq and Rex-Omni style: round(x/side*999), read back k/999"),
    "norm1000": Convention(1000.0, 1001, False, "Qwen2-VL and Qwen3-VL text coordinates: 0..1000 inclusive"),
    "floor1000": Convention(1000.0, 1000, True, "Florence-2 style: floor(x/side*1000), read back k/1000"),
    "paligemma": Convention(1023.0, 1024, False, "PaliGemma style: round(x/side*1023), read back k/1023"),
}


@dataclass(frozen=True)
class CoordCodec:
    """Codec between pixels on one image side and coordinate bins.

    ``norm999``: ``b = x / side * 999`` for ``x`` in ``[0, side]``; ``to_pixel`` is its exact inverse for
    real ``b`` (up to float64 rounding). A quantised value reads back within half a bin, i.e.
    ``side / 999 / 2`` pixels (one whole bin under the flooring convention).

    ``num_bins`` is the number of bins and must be what the convention has. All methods take scalars or
    arrays and work in float64.

    Raises:
        ConfigError: unknown convention, or ``num_bins`` that is not the convention's.
    """

    num_bins: int = 1000
    convention: str = "norm999"

    def __post_init__(self) -> None:
        if self.convention not in CONVENTIONS:
            raise ConfigError(f"unknown coordinate convention {self.convention!r}: choose one of {', '.join(CONVENTIONS)}")
        expected = CONVENTIONS[self.convention].bins
        if self.num_bins != expected:
            raise ConfigError(f"convention {self.convention!r} has {expected} bins, got num_bins={self.num_bins}")

    @property
    def scale(self) -> float:
        """Bins per whole image side, the factor of the convention."""
        return CONVENTIONS[self.convention].scale

    @overload
    def to_bin(self, x: float, side: float) -> float: ...
    @overload
    def to_bin(self, x: ArrayLike, side: ArrayLike) -> float | NDArray[np.float64]: ...
    def to_bin(self, x: ArrayLike, side: ArrayLike) -> float | NDArray[np.float64]:
        """Continuous bin position ``x / side * scale``. ``x`` and ``side`` in pixels; nothing is clamped.

        Raises:
            ValueError: a side that is not positive and finite, or ``x`` that is not finite.
        """
        xs, sides = np.asarray(x, dtype=np.float64), np.asarray(side, dtype=np.float64)
        if not (np.all(np.isfinite(sides)) and np.all(sides > 0)):
            raise ValueError(f"image side must be positive and finite, got {side!r}")
        if not np.all(np.isfinite(xs)):
            raise ValueError(f"coordinate must be finite, got {x!r}")
        return _unwrap(xs / sides * self.scale)

    def quantize(self, x: ArrayLike, side: ArrayLike, *, clip: bool = False) -> int | NDArray[np.int64]:
        """Nearest bin of ``x`` (the bin below under a flooring convention), as an integer.

        Halves round up, so that the result does not depend on the parity of the bin. A coordinate
        outside the image is an error unless ``clip=True``.

        Raises:
            ValueError: ``x`` outside ``[0, side]`` without ``clip``; see also :meth:`to_bin`.
        """
        position = np.asarray(self.to_bin(x, side), dtype=np.float64)
        inside = np.logical_and(position >= 0, position <= self.scale)
        if not clip and not np.all(inside):
            raise ValueError(f"coordinate {x!r} is outside the image side [0, {side!r}]: pass clip=True to clamp it")
        floored = np.floor(position) if CONVENTIONS[self.convention].floor else np.floor(position + 0.5)
        bins = np.clip(floored, 0, self.num_bins - 1).astype(np.int64)
        return int(bins) if bins.ndim == 0 else bins

    @overload
    def to_pixel(self, b: float, side: float) -> float: ...
    @overload
    def to_pixel(self, b: ArrayLike, side: ArrayLike) -> float | NDArray[np.float64]: ...
    def to_pixel(self, b: ArrayLike, side: ArrayLike) -> float | NDArray[np.float64]:
        """Pixel position ``b / scale * side`` of a real bin position ``b``."""
        return _unwrap(np.asarray(b, dtype=np.float64) / self.scale * np.asarray(side, dtype=np.float64))

    def quantize_box(self, box: ArrayLike, width: float, height: float, *, clip: bool = False) -> tuple[tuple[int, int, int, int], bool]:
        """Bins of an xyxy pixel box, and whether an axis collapsed and was reopened.

        When both edges of an axis fall into one bin, the edge that lies nearer to the neighbouring bin
        moves there, so that ``x2 > x1`` and ``y2 > y1`` always hold; callers count these boxes.

        Raises:
            ValueError: a reversed or empty box, or one outside the image without ``clip``.
        """
        x1, y1, x2, y2 = (float(v) for v in np.asarray(box, dtype=np.float64))
        if not (x2 > x1 and y2 > y1):
            raise ValueError(f"box must have x2 > x1 and y2 > y1, got {[x1, y1, x2, y2]}")
        left, right, moved_x = self._open_axis(x1, x2, width, clip)
        top, bottom, moved_y = self._open_axis(y1, y2, height, clip)
        return (left, top, right, bottom), moved_x or moved_y

    def _open_axis(self, low: float, high: float, side: float, clip: bool) -> tuple[int, int, bool]:
        first, last = int(self.quantize(low, side, clip=clip)), int(self.quantize(high, side, clip=clip))
        if last > first:
            return first, last, False
        below = float(self.to_bin(low, side)) - (first - 1)
        above = (last + 1) - float(self.to_bin(high, side))
        if last == self.num_bins - 1 or (first > 0 and below < above):
            return first - 1, last, True
        return first, last + 1, True


def _unwrap(values: NDArray[np.float64]) -> float | NDArray[np.float64]:
    return float(values) if values.ndim == 0 else values
