"""The protocol of readers: raw images and objects as a source writes them, each with its place; nothing is converted or judged here.

A format is one module with ``read(job) -> list[RawSplit]`` and ``looks(head) -> bool`` (whether a file or folder is of the format), and one
line in :mod:`coordexp.data.importers.formats`. What is shared, images found, names, units, single items judged, losses counted, is in
``finding``, ``judging`` and ``writing``. ``doctor`` reads the same raw objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from coordexp.errors import ConfigError, DataError

# How the numbers of a box stand. ``xyxy1``: corners of pixels counted from 1, inclusive (Pascal VOC).
Layout = Literal["xyxy", "xyxy1", "xywh", "cxcywh", "yxyx", "point", "outline"]
LAYOUTS: Final[tuple[Layout, ...]] = ("xyxy", "xywh", "cxcywh", "yxyx")
# ``share of the side = (number + shift) / scale``; None: pixels.
UNITS: Final[dict[str, tuple[float, float] | None]] = {
    "pixel": None,
    "norm1": (0.0, 1.0),
    "norm100": (0.0, 100.0),
    "norm1000": (0.0, 1000.0),
    "norm1023": (0.0, 1023.0),
    "floor1000": (0.5, 1000.0),
}
# What a user can say that numbers are, and the unit of that.
COORDS: Final[dict[str, str]] = {"absolute": "pixel", "norm1000": "norm1000", "norm1": "norm1"}
SPLITS: Final[dict[str, str]] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test",
    "testing": "test", "trainval": "trainval",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """``splits``: the names to import (all, if empty); for single files, the one name to write them under.

    ``images``: the folder of the images, where it is not the format's own; ``follow_links``: images and labels may be links that leave
    the source. ``coords``, ``layout`` and ``origin`` (VOC: the number of the first pixel) say what a source leaves open. ``name``
    is the description of objects that have none. ``polygons``: take outlines instead of boxes where the source has both. ``clip``: cut
    what leaves the image at its border instead of leaving it out. ``copy``: copy images instead of linking them.
    ``on_invalid``: ``error`` stops at the first item that cannot be imported. ``allow_loss``: write also what lost a large part.
    """

    splits: tuple[str, ...] = ()
    images: Path | None = None
    follow_links: bool = False
    coords: str | None = None
    layout: str | None = None
    origin: int | None = None
    name: str | None = None
    polygons: bool = False
    clip: bool = False
    copy: bool = False
    on_invalid: Literal["error", "skip"] = "skip"
    allow_loss: bool = False

    def __post_init__(self) -> None:
        if self.on_invalid not in ("error", "skip"):
            raise ConfigError(f"on_invalid: expected 'error' or 'skip', got {self.on_invalid!r}")
        for what, value, legal in (("coords", self.coords, (*COORDS,)), ("layout", self.layout, LAYOUTS), ("origin", self.origin, (0, 1))):
            if value is not None and value not in legal:
                raise ConfigError(f"{what}: expected one of {', '.join(map(str, legal))}, got {value!r}")
        if self.images is not None and not self.images.is_dir():
            raise DataError(f"--images: expected a folder, got nothing at {self.images}")


class Unusable(DataError):
    """Something that is left out: ``reason`` is what it is counted under, the message its line. ``empty``: it held no object."""

    def __init__(self, reason: str, line: str, *, empty: bool = False) -> None:
        self.reason, self.empty = reason, empty
        super().__init__(one_line(line))


@dataclass(slots=True)
class RawObject:
    """An object as it is written. ``values`` and ``name`` can be anything; ``units`` None: the source does not say."""

    where: str
    values: Any
    layout: Layout
    units: str | None = "pixel"
    name: Any = None
    crowd: Any = None
    difficult: Any = None
    area: Any = None


@dataclass(slots=True)
class RawImage:
    """An image as the source names it: ``names`` are paths or names to look for, the surest first.

    ``image_id`` is the source's own id of the image, ``row`` the place of a sample where several may be about one image.
    ``size`` is what is stated (None, 0 or nothing: unknown). ``labelled`` is False where the file that would hold its objects is
    missing. ``content`` are the bytes of an image that is not a file.
    """

    where: str
    names: tuple[str, ...]
    objects: Iterable[RawObject | Unusable]
    image_id: str | None = None
    row: str | None = None
    size: tuple[Any, Any] = (None, None)
    metadata: dict[str, Any] = field(default_factory=dict)
    labelled: bool = True
    content: bytes | None = None
    stored: bool = False


@dataclass
class RawSplit:
    """``count`` images, which can be gone through several times; ``roots`` are the folders in which they lie, the likeliest first.

    ``stray``: objects without an image. ``unlabelled``: what to say if no image has a file of labels.
    """

    name: str
    count: int
    images: Iterable[RawImage | Unusable]
    roots: tuple[Path, ...]
    stray: Sequence[Unusable] = ()
    unlabelled: Callable[[], str] = lambda: "nothing to learn from"


@dataclass(frozen=True)
class Again:
    """Images that can be gone through several times: ``make`` begins anew each time."""

    make: Callable[[], Iterator[RawImage | Unusable]]

    def __iter__(self) -> Iterator[RawImage | Unusable]:
        return self.make()


@dataclass
class Job:
    """One source to read, and notes about what was not as it should be but is read all the same."""

    source: Path
    options: ImportOptions
    notes: dict[str, None] = field(default_factory=dict)

    def note(self, line: str) -> None:
        """Remember a warning, once."""
        self.notes[one_line(line)] = None

    def wanted(self, name: str) -> bool:
        """Whether a split is to be read."""
        return not self.options.splits or name in {SPLITS.get(split, split) for split in self.options.splits}

    def choose(self, names: Iterable[str]) -> list[str]:
        """Those of the source's splits that are asked for.

        Raises:
            ConfigError: one is asked for that is not there.
        """
        have = list(dict.fromkeys(names))
        for split in self.options.splits:
            if SPLITS.get(split, split) not in have:
                raise ConfigError(f"--split: expected one of {', '.join(have) or 'none'}, got {split!r}: {self.source} has no other")
        return [name for name in have if self.wanted(name)]

    def file_split(self, default: str) -> str:
        """The name under which a single file is written: what ``--split`` says, else ``default``.

        Raises:
            ConfigError: several names.
        """
        if len(self.options.splits) > 1:
            raise ConfigError(f"--split: expected one name for the one file {self.source}, got {len(self.options.splits)}")
        return self.options.splits[0] if self.options.splits else default


def split_name(text: str) -> str:
    """A split's usual name: ``valid`` and ``validation`` are ``val``."""
    return SPLITS.get(text.lower(), text)


def folder_split(parts: Sequence[str]) -> str | None:
    """The split that a path names by one of its folders, or None."""
    return next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), None)


def by_key(pairs: Iterable[tuple[Any, Any]], what: str, where: str) -> dict[str, Any]:
    """Values by id, ids compared as text (``1``, ``1.0`` and ``"1"`` are one id).

    Raises:
        DataError: an id that stands for two different values.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        text = id_text(key)
        if text in found and found[text] != value:
            raise DataError(f"{where}: {what}: expected an id once, got {text} as {found[text]!r} and as {value!r}: give each its own id")
        found[text] = value
    return found


def id_text(value: Any) -> str:
    """An id as text; whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value)


def one_line(text: str) -> str:
    """A text without characters that break a line or that no file can hold: names of images can have them."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def brief(value: Any, length: int = 80) -> str:
    """A value for a message: one line, cut."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."

