"""Made scenes: coloured shapes on a textured background, with exact boxes. numpy and PIL only.

A background is a random colour with smooth noise (a coarse grid, enlarged) and fine noise; shapes are
drawn four times too large and averaged down, so that their edges are soft. Every scene is a pure
function of one whole number and the options.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from coordexp.data.answers import PHRASE
from coordexp.data.options import SynthOptions
from coordexp.data.records import write_records
from coordexp.data.staging import staged_folder
from coordexp.errors import ConfigError

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 48, 42),
    "green": (46, 160, 67),
    "blue": (45, 92, 214),
    "yellow": (236, 200, 40),
    "orange": (240, 124, 24),
    "purple": (140, 50, 190),
    "cyan": (30, 196, 206),
    "pink": (240, 120, 184),
}
# Shares of the image side, so far apart that rounding to pixels keeps the names distinct.
SIZES: Final[dict[str, tuple[float, float]]] = {"small": (0.22, 0.28), "medium": (0.34, 0.41), "large": (0.47, 0.55)}
SPLITS: Final = ("train", "val", "test")
SEED_LIMIT: Final = 2**29

_SUPERSAMPLE: Final = 4
_COLOR_JITTER: Final = 12.0
_GAP: Final = 2
_PLACEMENT_TRIES: Final = 50
_LAYOUT_TRIES: Final = 50

_Box = tuple[int, int, int, int]


def _circle(draw: ImageDraw.ImageDraw, end: int) -> None:
    draw.ellipse((0, 0, end, end), fill=255)


def _square(draw: ImageDraw.ImageDraw, end: int) -> None:
    draw.rectangle((0, 0, end, end), fill=255)


def _triangle(draw: ImageDraw.ImageDraw, end: int) -> None:
    draw.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)


def _diamond(draw: ImageDraw.ImageDraw, end: int) -> None:
    draw.polygon([(end / 2, 0), (end, end / 2), (end / 2, end), (0, end / 2)], fill=255)


SHAPES: Final[dict[str, Callable[[ImageDraw.ImageDraw, int], None]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
}


def scene_seed(seed: int, split: str, index: int) -> int:
    """Seed of one scene: ``seed * 2**34 + index * 4 + split``, which no other scene of any data set has.

    Raises:
        ConfigError: ``seed`` outside ``[0, 2**29)`` (the result fits a signed 64-bit integer).
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigError(f"data.synth.seed: expected 0 to {SEED_LIMIT - 1}, got {seed}")
    if not 0 <= index < 2**32:
        raise ValueError(f"scene index must be in [0, 2**32), got {index}")
    return (seed << 34) | (index << 2) | SPLITS.index(split)


def make_scene(seed: int, options: SynthOptions) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One scene and its objects ``{"desc": "small red circle", "bbox_2d": [x1, y1, x2, y2]}``, sorted by (y1, x1).

    Boxes are pixel edges and hold exactly the pixels that were painted. Boxes lie at least 1 px from the border
    and 2 px apart in x or y. The background depends on ``seed`` and the side only.

    Raises:
        ConfigError: unknown colours, shapes or sizes (all at once); ``min_objects`` that do not fit.
    """
    _check_names(options)
    rng = np.random.default_rng(seed)
    image = _background(rng, options.side)
    count = int(rng.integers(options.min_objects, options.max_objects + 1))
    objects = [(desc, _paint(image, rng, desc, box)) for desc, box in _layout(rng, count, options)]
    objects.sort(key=lambda item: (item[1][1], item[1][0]))
    return image, [{"desc": desc, "bbox_2d": list(box)} for desc, box in objects]


def write_scenes(
    out: Path, options: SynthOptions, progress: Callable[[int, int], None] | None = None, *, overwrite: bool = False
) -> dict[str, Path]:
    """Write ``out/{train,val,test}.jsonl`` and ``out/images/{split}-{index:06d}.png``; return the record files.

    Each record's ``metadata`` holds its ``seed``: ``make_scene(seed, options)`` makes the image again. Equal
    options give equal files, and ``out`` appears only when everything is written. ``progress(done, total)``
    is called after every scene.

    Raises:
        ConfigError: ``out`` is not empty (see ``overwrite``), or options that cannot be drawn.
    """
    _check_names(options)
    counts = {split: getattr(options, split) for split in SPLITS}
    total, done = sum(counts.values()), 0
    with staged_folder(Path(out), kind="data set", overwrite=overwrite) as folder:
        (folder / "images").mkdir()
        for split, count in counts.items():
            rows = []
            for index in range(count):
                rows.append(_write_scene(folder, f"{split}-{index:06d}", scene_seed(options.seed, split, index), options))
                done += 1
                if progress is not None:
                    progress(done, total)
            write_records(folder / f"{split}.jsonl", rows)
    return {split: Path(out) / f"{split}.jsonl" for split in SPLITS}


def _write_scene(folder: Path, name: str, seed: int, options: SynthOptions) -> dict[str, Any]:
    image, objects = make_scene(seed, options)
    metadata: dict[str, Any] = {"seed": seed}
    if options.task == "grounding":
        # A stream of its own: the scene stays what make_scene makes of the seed.
        objects = [objects[int(np.random.default_rng([seed, 1]).integers(len(objects)))]]
        metadata[PHRASE] = objects[0]["desc"]
    # Noise hardly compresses: a higher level costs time and saves little.
    image.save(folder / "images" / f"{name}.png", compress_level=1)
    size = {"width": options.side, "height": options.side}
    return {"images": [f"images/{name}.png"], **size, "objects": objects, "image_id": name, "metadata": metadata}


def _check_names(options: SynthOptions) -> None:
    problems: list[str] = []
    legal: dict[str, Mapping[str, object]] = {"colors": COLORS, "shapes": SHAPES, "sizes": SIZES}
    for field, names in (("colors", options.colors), ("shapes", options.shapes), ("sizes", options.sizes)):
        known = list(legal[field])
        if not names:
            problems.append(f"data.synth.{field}: expected at least one of {', '.join(known)}, got none")
        for name in names:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                problems.append(f"data.synth.{field}: expected names among {', '.join(known)}, got {name!r}: did you mean {nearest!r}?")
    if problems:
        raise ConfigError(problems)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    base = 0.5 * rng.uniform(90, 200, 3) + 0.5 * rng.uniform(90, 200)
    cells = int(rng.integers(3, 9))
    grid = Image.fromarray(rng.uniform(0, 255, (cells, cells)).astype(np.uint8))
    smooth = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    texture = (smooth - 128) / 128 * rng.uniform(8, 30) + rng.normal(0, 4, (side, side))
    pixels: NDArray[np.uint8] = np.clip(base + texture[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _layout(rng: np.random.Generator, count: int, options: SynthOptions) -> list[tuple[str, _Box]]:
    """Descriptions and boxes. A crowded scene may hold fewer than ``count`` objects, never fewer than ``min_objects``."""
    for _ in range(_LAYOUT_TRIES):
        placed: list[tuple[str, _Box]] = []
        for _ in range(count):
            found = _place(rng, [box for _, box in placed], options)
            if found is not None and (options.task == "detection" or found[0] not in {desc for desc, _ in placed}):
                placed.append(found)
        if len(placed) >= options.min_objects:
            return placed
    raise ConfigError(
        f"data.synth.min_objects: expected objects that fit, got {options.min_objects} of sizes {', '.join(options.sizes)} "
        f"on {options.side} pixels: ask for fewer or smaller ones"
    )


def _place(rng: np.random.Generator, taken: list[_Box], options: SynthOptions) -> tuple[str, _Box] | None:
    for _ in range(_PLACEMENT_TRIES):
        size, shape = (names[rng.integers(len(names))] for names in (options.sizes, options.shapes))
        extent = round(rng.uniform(*SIZES[size]) * options.side)
        x, y = (int(v) for v in rng.integers(1, options.side - extent, 2))
        box = (x, y, x + extent, y + extent)
        if all(_apart(box, other) for other in taken):
            return f"{size} {options.colors[rng.integers(len(options.colors))]} {shape}", box
    return None


def _apart(a: _Box, b: _Box) -> bool:
    return a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]


def _paint(image: Image.Image, rng: np.random.Generator, desc: str, box: _Box) -> _Box:
    """Draw one object; return the box of the pixels it covers, if only in part."""
    _, color, shape = desc.split(" ")
    red, green, blue = (int(v) for v in np.clip(np.asarray(COLORS[color]) + rng.normal(0, _COLOR_JITTER, 3), 0, 255))
    x, y, extent = box[0], box[1], box[2] - box[0]
    large = Image.new("L", (extent * _SUPERSAMPLE, extent * _SUPERSAMPLE), 0)
    SHAPES[shape](ImageDraw.Draw(large), extent * _SUPERSAMPLE - 1)
    mask = large.resize((extent, extent), Image.Resampling.BOX)
    image.paste((red, green, blue), (x, y), mask)
    covered = mask.getbbox()
    assert covered is not None
    return x + covered[0], y + covered[1], x + covered[2], y + covered[3]
