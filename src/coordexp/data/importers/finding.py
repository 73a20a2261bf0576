"""Where an image is: names as other tools write them, looked for under the folders of a source."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from coordexp.data.importers.base import Unusable, brief

SUFFIXES: Final = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
# Folder names that say only that images are in them.
_PLAIN: Final = ("images", "jpegimages")
_URL: Final = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_DRIVE: Final = re.compile(r"^[a-zA-Z]:/")
# What Label Studio puts before the name of an uploaded file.
_UPLOAD: Final = re.compile(r"^[0-9a-f]{4,8}-(?=.)")


@dataclass(frozen=True)
class Found:
    """``path`` is the file itself, ``name`` its name under ``images/``, ``root`` a folder that holds it."""

    path: Path
    name: str
    root: Path


def plain_name(name: str) -> str:
    """A path with forward slashes: Windows paths, URLs and their quoting undone, the file of ``?d=FILE`` taken."""
    if _URL.match(name) or "?d=" in name:
        parts = urlsplit(name)
        query = next((p[2:] for p in parts.query.split("&") if p.startswith("d=")), "")
        name = unquote(query or parts.path)
    text = name.replace("\\", "/").strip()
    return _DRIVE.sub("", text).removeprefix("./")


@dataclass
class ImageFinder:
    """Finds images under ``roots``, the likeliest first. Nothing outside of them is taken, through a link only with ``follow``.

    The path as written counts first, under every root; then the file of the same name, with ever less of the path, in any case; then
    one with another suffix. Of several that fit alike none is taken.
    """

    roots: Sequence[Path]
    follow: bool = False
    _bases: list[tuple[Path, Path]] = field(default_factory=list)
    _index: dict[str, list[tuple[Path, PurePosixPath]]] | None = None
    _stems: dict[str, list[tuple[Path, PurePosixPath]]] | None = None

    def __post_init__(self) -> None:
        self._bases = [(root, root.resolve()) for root in dict.fromkeys(self.roots) if root.is_dir()]

    def find(self, names: Sequence[str], where: str) -> Found:
        """The one image of these names, the surest first.

        Raises:
            Unusable: none, several that fit alike, or one outside.
        """
        outside = ""
        several: Unusable | None = None
        for name in (plain_name(name) for name in names if name):
            for _, base in self._bases:
                found, why = self._exact(base, name)
                if found is not None:
                    return found
                outside = outside or why
            try:
                near = self._near(name, where)
            except Unusable as fault:
                several = several or fault
                continue
            if near is not None:
                found, why = self._exact(*near)
                if found is not None:
                    return found
                outside = outside or why
        if several is not None:
            raise several
        shown = " and ".join(dict.fromkeys(brief(name, 200) for name in names)) or "no name"
        folders = ", ".join(str(root) for root, _ in self._bases) or "a folder that is there"
        raise Unusable(
            "no image file",
            f"{where}: expected an image inside {folders}, got {shown!r}{outside}: name the folder that holds it with --images",
        )

    def _exact(self, base: Path, name: str) -> tuple[Found | None, str]:
        """The file, or why what is there is not taken."""
        # Strings, not paths: this is most of what an import does with an image.
        inner = f"{base}{os.sep}"
        link = os.path.join(base, name)
        try:
            real = os.path.realpath(link)
            if not os.path.isfile(real):
                return None, ""
        except (OSError, ValueError):  # names too long for the file system, a null byte
            return None, ""
        inside = real.startswith(inner)
        if not inside and (name.startswith("/") or ".." in name.split("/")):
            return None, " outside of it"
        if not inside and not self.follow:
            return None, f", a link to {real} (--follow-links takes it)"
        parts = (real if inside else link)[len(inner) :].split("/")
        short = parts[1:] if len(parts) > 1 and parts[0].lower() in _PLAIN else parts
        path = Path(real)
        return Found(path, "/".join(short), base if inside else path.parent), ""

    def _near(self, name: str, where: str) -> tuple[Path, str] | None:
        """The file that fits a name best, as folder and path."""
        parts = [part.lower() for part in PurePosixPath(name).parts if part not in ("/", ".", "..")]
        if not parts:
            return None
        index, stems = self._indices()
        whole = parts[-1]
        stem = os.path.splitext(whole)[0] if os.path.splitext(whole)[1] in SUFFIXES else whole
        upload = _UPLOAD.sub("", whole)
        for candidates in (index.get(whole, []), stems.get(stem, []), index.get(upload, []) if upload != whole else []):
            if not candidates:
                continue
            best = max(_common(path, parts) for _, path in candidates)
            fit = [(base, path) for base, path in candidates if _common(path, parts) == best]
            if len({(base / path).resolve() for base, path in fit}) > 1:
                shown = " and ".join(sorted(path.as_posix() for _, path in fit)[:3])
                raise Unusable("several images of one name", f"{where}: expected one image {brief(name, 200)}, got {shown}")
            return fit[0][0], fit[0][1].as_posix()
        return None

    def _indices(self) -> tuple[dict[str, list[tuple[Path, PurePosixPath]]], dict[str, list[tuple[Path, PurePosixPath]]]]:
        if self._index is None or self._stems is None:
            self._index, self._stems = defaultdict(list), defaultdict(list)
            widest = [base for _, base in self._bases if not any(base != o and base.is_relative_to(o) for _, o in self._bases)]
            for base in dict.fromkeys(widest):
                for path in image_files(base, follow=self.follow):
                    self._index[path.name.lower()].append((base, path))
                    self._stems[os.path.splitext(path.name.lower())[0]].append((base, path))
        return self._index, self._stems


def image_files(base: Path, *, follow: bool = False) -> list[PurePosixPath]:
    """All images below a folder, in order, hidden ones left out."""
    found: list[PurePosixPath] = []
    seen: set[str] = set()
    for folder, folders, files in os.walk(base, followlinks=follow):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        seen.add(real)
        inner = PurePosixPath(Path(folder).relative_to(base).as_posix())
        found += [inner / name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")]
    return sorted(found)


def _common(path: PurePosixPath, parts: Sequence[str]) -> int:
    """How many last parts of two paths are the same, the file's name aside."""
    mine = [part.lower() for part in path.parts[:-1]]
    count = 0
    for a, b in zip(reversed(mine), reversed(parts[:-1]), strict=False):
        if a != b:
            break
        count += 1
    return count
