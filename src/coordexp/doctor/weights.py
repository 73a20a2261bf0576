"""Rows of a checkpoint's tables, read from safetensors without loading the model; and what they say about training."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.vocab.extend import HARMONICS

INDEX: Final = "model.safetensors.index.json"
# Old rows that stand for the table.
SAMPLE: Final = 4096
# Spread of rows, relative to the old rows', below which they are still the mean row and its noise (0.01 at the start).
_MEAN_INIT: Final = 0.05
# Share of variance outside the curve of the ordinal start; rounding to bfloat16 gives some 1e-6.
_ORDINAL_INIT: Final = 1e-4


@dataclass(frozen=True)
class Table:
    """One ``[rows, width]`` tensor of a file."""

    file: Path
    key: str
    rows: int
    width: int

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``[start, stop)`` in float32; nothing else is read."""
        with safe_open(self.file, framework="pt") as file:
            rows: Tensor = file.get_slice(self.key)[start:stop]
        return rows.float()


@dataclass(frozen=True)
class Tables:
    """Embedding and head of a folder; None where no file holds one. ``missing``: files that the index names and that are not there."""

    embedding: Table | None
    head: Table | None
    missing: tuple[str, ...]


def find_tables(folder: Path) -> Tables:
    """Look the tables up in the folder's safetensors headers.

    Raises:
        ConfigError: a damaged file or index, or no weights.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    missing: tuple[str, ...] = ()
    index = folder / INDEX
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: expected an index of weights ({type(error).__name__}: {error})") from None
        missing = tuple(name for name in named if not (folder / name).is_file())
        files = [folder / name for name in named if name not in missing]
    if not files and not missing:
        raise ConfigError(f"{folder}: no *.safetensors weights in this folder")
    found: dict[str, Table] = {}
    for path in files:
        for name, table in _tables_of(path).items():
            found.setdefault(name, table)
    return Tables(found.get("embedding"), found.get("head"), missing)


def _tables_of(path: Path) -> dict[str, Table]:
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name = "embedding" if key.endswith("embed_tokens.weight") else "head" if key.endswith("lm_head.weight") else None
                if name is not None:
                    rows, width = file.get_slice(key).get_shape()
                    found[name] = Table(path, key, rows, width)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: these weights cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def adapter_rows(folder: Path) -> dict[str, Table]:
    """Trained coordinate rows of an adapter: ``embedding`` and, untied, ``head``.

    Raises:
        ConfigError: weights that are missing or damaged.
    """
    path = folder / "adapter_model.safetensors"
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith("trainable_tokens_delta"):
                    rows, width = file.get_slice(key).get_shape()
                    found["head" if "lm_head" in key else "embedding"] = Table(path, key, rows, width)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: these weights cannot be read ({' '.join(str(error).split())[:200]})") from None
    return found


def untrained(rows: Tensor, old: Tensor, digits: Tensor | None) -> tuple[str | None, dict[str, Any]]:
    """Why coordinate rows ``[K, D]`` look as they were made, or None; with the numbers.

    ``old [M, D]``: rows of ordinary tokens. ``digits [K, D]``: mean rows of the pieces of the numbers, what the ``digits`` start
    writes. ``spread``: mean standard deviation over k, relative to the old rows'. ``rough``: share of the rows' variance
    outside the cosine curves that the ``ordinal`` start is made of.
    """
    spread = float(rows.std(dim=0).mean())
    typical = float(old.std(dim=0).mean())
    relative = spread / typical if typical > 0 else math.inf
    details: dict[str, Any] = {"spread": spread, "relative_spread": relative if math.isfinite(relative) else None}
    if bool((rows == rows[0]).all()):
        return "all rows are identical", details
    if relative < _MEAN_INIT:
        return f"they differ by {relative:.3f} of what other rows do: still the mean row with a little noise", details
    distance = None if digits is None else float((rows - digits).abs().max() / digits.abs().max())
    if distance is not None and distance < 0.01:
        return "they are the mean rows of their numbers' pieces, as the digits start writes them", details
    angle = math.pi * torch.arange(len(rows), dtype=torch.float64) / (len(rows) - 1)
    curves = torch.cos(angle[:, None] * torch.arange(HARMONICS + 1, dtype=torch.float64))
    centred = rows.double() - rows.double().mean(dim=0)
    basis = torch.linalg.qr(curves).Q
    rest = centred - basis @ (basis.T @ centred)
    details["rough"] = float(rest.square().sum() / centred.square().sum())
    if details["rough"] < _ORDINAL_INIT:
        return "they lie on the smooth curve that the ordinal start writes", details
    return None, details
