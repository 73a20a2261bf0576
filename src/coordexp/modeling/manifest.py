"""``coordexp.json``: what a checkpoint was trained to read and write, kept beside its weights. stdlib only.

A checkpoint works only with the convention, prompt and image size it was trained with, and none of them can be
seen from the weights. Reading a folder compares what the caller wants with what stands there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from coordexp.errors import ConfigError
from coordexp.grammar import GEOMETRIES, Geometry

CHECKPOINT_MANIFEST: Final = "coordexp.json"
GRAMMAR: Final = "coord_json"
SCHEMA: Final = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The contract of a checkpoint.

    ``convention`` and ``num_bins`` are the codec's, ``coord_start`` is the token id of bin 0; ``grammar`` and ``order``
    are those of the answer, ``geometries`` what its objects may be; ``min_pixels`` and ``max_pixels`` bound the area of the
    resized image. ``versions`` are those of the packages that made it. An export adds ``sources`` (SHA-256 by file name)
    and ``export`` (how, and the measured difference).
    """

    convention: str
    num_bins: int
    coord_start: int
    order: str
    prompt: str
    min_pixels: int
    max_pixels: int
    grammar: str = GRAMMAR
    geometries: tuple[Geometry, ...] = ("bbox_2d",)
    versions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The file's content."""
        content: dict[str, Any] = {
            "schema": SCHEMA,
            "codec": {"convention": self.convention, "num_bins": self.num_bins, "coord_start": self.coord_start},
            "grammar": {"name": self.grammar, "order": self.order, "geometries": list(self.geometries)},
            "prompt": self.prompt,
            "pixels": {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels},
            "versions": self.versions,
        }
        content |= {"sources": self.sources, "export": self.export} if self.export else {}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def exported(self, *, versions: dict[str, str], sources: dict[str, str], export: dict[str, Any]) -> CheckpointManifest:
        """The same contract for an exported folder."""
        return replace(self, versions=versions, sources=sources, export=export)


# Dotted place in the file, field, type.
_FIELDS: Final[tuple[tuple[str, str, type], ...]] = (
    ("codec.convention", "convention", str),
    ("codec.num_bins", "num_bins", int),
    ("codec.coord_start", "coord_start", int),
    ("grammar.name", "grammar", str),
    ("grammar.order", "order", str),
    ("prompt", "prompt", str),
    ("pixels.min_pixels", "min_pixels", int),
    ("pixels.max_pixels", "max_pixels", int),
)


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest | None:
    """The manifest of a folder, or None where it has none.

    Raises:
        ConfigError: a file that is no such manifest.
    """
    path = folder / CHECKPOINT_MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: schema: expected {SCHEMA}, got {found!r}: another version of coordexp wrote it")
    values: dict[str, Any] = {}
    for dotted, name, kind in _FIELDS:
        value: Any = content
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{path}: {dotted}: expected {'text' if kind is str else 'a whole number'}, got {value!r}")
        values[name] = value
    geometries = content["grammar"].get("geometries", ["bbox_2d"])  # folders from before there was a choice hold boxes
    if not isinstance(geometries, list) or not geometries or set(map(str, geometries)) - set(GEOMETRIES):
        raise ConfigError(f"{path}: grammar.geometries: expected some of {', '.join(GEOMETRIES)}, got {geometries!r}")
    extra: dict[str, Any] = {key: content.get(key, {}) for key in ("versions", "sources", "export")}
    wrong = [key for key, value in extra.items() if not isinstance(value, dict)]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]}: expected an object, got {extra[wrong[0]]!r}")
    return CheckpointManifest(**values, **extra, geometries=tuple(geometries))


def check_contract(
    folder: Path,
    *,
    prompt: str | None = None,
    convention: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    keys: dict[str, str] | None = None,
) -> CheckpointManifest | None:
    """The folder's manifest, after comparing what is wanted (None: whatever it says) with it.

    ``keys`` names what the user sets, by field; by default the keys of an experiment.

    Raises:
        ConfigError: every contradiction, one line each, with both values.
    """
    found = read_checkpoint_manifest(folder)
    if found is None:
        return None
    keys = {"prompt": "data.prompt", "min_pixels": "model.min_pixels", "max_pixels": "model.max_pixels"} | (keys or {})
    problems = []
    if convention is not None and convention != found.convention:
        problems.append(
            f"codec.convention: the checkpoint was trained with {found.convention!r} ({folder / CHECKPOINT_MANIFEST}), "
            f"wanted is {convention!r}: use a checkpoint trained with {convention!r}"
        )
    wanted = {"prompt": prompt, "min_pixels": min_pixels, "max_pixels": max_pixels}
    for name, value in wanted.items():
        trained = getattr(found, name)
        if value is not None and value != trained:
            problems.append(
                f"{keys[name]}: the checkpoint was trained with {trained!r} ({folder / CHECKPOINT_MANIFEST}), got {value!r}: "
                f"set {keys[name]} to the former"
            )
    if problems:
        raise ConfigError(problems)
    return found
