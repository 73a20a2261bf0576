"""Embedding and head rows of the coordinate tokens: there, finite, different from each other, trained?

What is trained is told from what ``vocab extend`` and the library write: identical rows; ``mean``, one row with a little noise;
``ordinal``, a curve of ``HARMONICS`` cosines, so a matrix of that rank; ``digits``, the mean of the rows of the digits' pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from coordexp.doctor.base import Check
from coordexp.vocab.adapters import base_folder, is_adapter
from coordexp.vocab.extend import HARMONICS

TRAIN: Final = (
    "right after `coordexp vocab extend` this is expected; after training it means that these rows were not trained (adapter.new_rows)"
)
_EMBED: Final = ("embed_tokens.weight", "wte.weight")
_SAMPLE: Final = 4096
_DELTA: Final = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Tables:
    """The two tables as ``(file, key)``; ``head`` is None where it is the embedding. ``deltas``: an adapter's trained rows by table."""

    embedding: tuple[Path, str] | None
    head: tuple[Path, str] | None
    rows: int | None
    tie: Check
    deltas: dict[str, tuple[Path, str]]


def read_tables(folder: Path, *, tied: bool) -> Tables:
    """Find the tables of a model folder, or of an adapter's base with the rows that the adapter brings."""
    base = base_folder(folder) if is_adapter(folder) else folder
    keys = _keys(base)
    embedding = next(((file, key) for key, file in keys.items() if key.endswith(_EMBED)), None)
    head = next(((file, key) for key, file in keys.items() if key.endswith("lm_head.weight")), None)
    deltas: dict[str, tuple[Path, str]] = {}
    if base is not folder:
        for key, file in _keys(folder).items():
            if _DELTA.rpartition(".")[2] in key:
                deltas["head" if "lm_head" in key else "embedding"] = (file, key)
    rows = None if embedding is None else _shape(embedding)[0]
    return Tables(embedding, None if tied else head, rows, _tie(embedding, head, tied), deltas)


def _keys(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found.update(dict.fromkeys(weights.keys(), file))
    return found


def _shape(place: tuple[Path, str]) -> list[int]:
    from safetensors import safe_open

    with safe_open(place[0], framework="pt") as weights:
        return list(weights.get_slice(place[1]).get_shape())


def _read(place: tuple[Path, str], rows: slice | Sequence[int]) -> Tensor:
    """Some rows of a table, float32; only they are read."""
    from safetensors import safe_open

    with safe_open(place[0], framework="pt") as weights:
        table = weights.get_slice(place[1])
        if isinstance(rows, slice):
            return table[rows].float()
        return torch.stack([table[row : row + 1][0] for row in rows]).float()


def _tie(embedding: tuple[Path, str] | None, head: tuple[Path, str] | None, tied: bool) -> Check:
    name, values = "tied head", {"tie_word_embeddings": tied, "stored_head": head is not None}
    if embedding is None:
        return Check("C07", name, "skipped", "no embedding table was found", "", values)
    if not tied and head is None:
        seen = "config.json says that the head is not tied, and the weights hold no lm_head: it would be random"
        return Check("C07", name, "fail", seen, "set tie_word_embeddings to true, or export again with --untie", values)
    if tied and head is not None and not torch.equal(_read(embedding, slice(None)), _read(head, slice(None))):
        seen = "config.json says that the head is tied, the weights hold another one: loading throws it away"
        return Check("C07", name, "warning", seen, "set tie_word_embeddings to false if the stored head was trained", values)
    return Check("C07", name, "ok", "tied to the embedding" if tied else "a table of its own", "", values)


def check_rows(tables: Tables, start: int, bins: int, tokenizer: Any) -> list[Check]:
    """One check for the embedding, and one for a head of its own."""
    if tables.embedding is None or tables.rows is None:
        return [Check("C09", "coordinate rows", "skipped", "no embedding table was found")]
    if start + bins > tables.rows:
        seen = f"the table has {tables.rows} rows, coordinate tokens are ids {start}..{start + bins - 1}"
        return [Check("C09", "coordinate rows", "fail", seen, "extend the model with `coordexp vocab extend`, not the tokenizer alone")]
    checks = [_check_table("embedding", tables.embedding, tables.deltas.get("embedding"), start, bins, tokenizer)]
    if tables.head is not None:
        checks.append(_check_table("head", tables.head, tables.deltas.get("head"), start, bins, tokenizer))
    return checks


def _check_table(which: str, place: tuple[Path, str], delta: tuple[Path, str] | None, start: int, bins: int, tokenizer: Any) -> Check:
    from_adapter = delta is not None and _shape(delta)[0] == bins
    rows = _read(delta, slice(None)) if from_adapter and delta is not None else _read(place, slice(start, start + bins))
    name = f"coordinate rows of the {which}{' (the adapter)' if from_adapter else ''}"
    if not bool(torch.isfinite(rows).all()):
        count = int((~torch.isfinite(rows).all(dim=1)).sum())
        return Check("C09", name, "fail", f"{count} of {bins} hold values that are no numbers", "go back to an earlier checkpoint")
    others = sorted({round(float(row)) for row in torch.linspace(0, start - 1, min(start, _SAMPLE))})
    text = _read(place, others)
    mean, spread = rows.mean(dim=0), float(rows.std(dim=0).mean())
    distinct = len({row.numpy().tobytes() for row in rows})
    values = {
        "distinct": distinct, "spread": spread, "text_spread": float(text.std(dim=0).mean()),
        "norm": float(rows.norm(dim=1).mean()), "text_norm": float(text.norm(dim=1).mean()),
        "neighbour_cosine": _neighbours(rows - mean),
    }  # fmt: skip
    if distinct == 1:
        what = "all zero" if not bool(rows.any()) else "all the same"
        return Check(
            "C09", name, "fail", f"{bins} rows are {what}: no bin can be told from another", f"extend with --init ordinal; {TRAIN}", values
        )
    if distinct < bins:
        return Check(
            "C09", name, "warning", f"only {distinct} of {bins} rows differ", "bins with the same row can never be told apart", values
        )
    fresh = _initialisation(rows, text, values, place, tokenizer, bins)
    norms = f"norm {values['norm']:.3g} (text {values['text_norm']:.3g})"
    about = f"{bins} different rows, {norms}, cosine of neighbours {values['neighbour_cosine']:.2f}"
    if fresh is not None:
        return Check("C09", name, "warning", f"{about}: as `{fresh}` makes them, not trained", TRAIN, values | {"init": fresh})
    return Check("C09", name, "ok", f"{about}: trained", "", values | {"init": None})


def _neighbours(centred: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(centred[1:], centred[:-1]).mean())


def _initialisation(rows: Tensor, text: Tensor, values: dict[str, Any], place: tuple[Path, str], tokenizer: Any, bins: int) -> str | None:
    """The ``--init`` whose fresh rows these are, or None."""
    if values["spread"] < 0.03 * values["text_spread"]:
        return "mean"
    energy = torch.linalg.svdvals((rows - rows.mean(dim=0)).double()) ** 2
    # Rounding to bfloat16 leaves 2^-18 of the energy, of a table stored so.
    if len(energy) > HARMONICS and float(energy[HARMONICS:].sum() / energy.sum()) < 1e-4:
        return "ordinal"
    chosen = list(range(0, bins, max(1, bins // 40)))
    pieces = [tokenizer.encode(str(k), add_special_tokens=False) for k in chosen]
    wanted = torch.stack([_read(place, ids).mean(dim=0) for ids in pieces])
    gap = (rows[chosen] - wanted).norm() / wanted.norm()
    return "digits" if float(gap) < 1e-2 else None
