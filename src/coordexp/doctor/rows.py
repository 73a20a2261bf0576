"""Checks of a checkpoint's tables: sizes, head, coordinate rows, and the rows that an adapter trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from coordexp.doctor.checks import Check
from coordexp.doctor.weights import SAMPLE, Table, Tables, adapter_rows, untrained
from coordexp.errors import ConfigError
from coordexp.vocab.adapters import ADAPTER_CONFIG
from coordexp.vocab.coord_vocab import CoordVocab

_EXTEND = "`coordexp vocab extend MODEL --out DIR` on the model it started from"


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    part = config.get("text_config", config)
    return part if isinstance(part, dict) else config


def tied(config: dict[str, Any]) -> bool:
    """Whether the configuration ties head and embedding; the top level counts, then the text model's part. Unset means not."""
    for part in (config, _text_config(config)):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return False


def check_sizes(config: dict[str, Any], tables: Tables, vocab: CoordVocab | None, length: int | None) -> Check:
    """``checkpoint.sizes``: rows of the table, ``vocab_size`` and the tokenizer's length fit each other."""
    name, table = "checkpoint.sizes", tables.embedding
    if table is None:
        return Check(name, "skipped", "no embedding")
    stated = _text_config(config).get("vocab_size")
    details = {"rows": table.rows, "vocab_size": stated, "tokenizer": length}
    problems = []
    if stated != table.rows:
        problems.append(f"config.json says vocab_size {stated}, the embedding has {table.rows} rows")
    if tables.head is not None and tables.head.rows != table.rows:
        problems.append(f"the head has {tables.head.rows} rows, the embedding {table.rows}")
    if length is not None and length > table.rows:
        problems.append(f"the tokenizer has {length} tokens, the embedding only {table.rows} rows")
    if vocab is not None and vocab.start + vocab.num_bins > table.rows:
        problems.append(f"coordinate ids end at {vocab.start + vocab.num_bins - 1}, the last row is {table.rows - 1}")
    if problems:
        return Check(name, "fail", "; ".join(problems), f"tokenizer and weights do not belong together: {_EXTEND}", details)
    seen = f"{table.rows} rows of {table.width}, as config.json says"
    seen += "" if length is None else f"; {length} tokens, {table.rows - length} rows of padding"
    return Check(name, "ok", seen, details=details)


def check_head(config: dict[str, Any], tables: Tables, vocab: CoordVocab | None) -> Check:
    """``checkpoint.head``: a tied head is the embedding, an untied one is in the weights."""
    name, is_tied, part = "checkpoint.head", tied(config), _text_config(config)
    if not is_tied and tables.head is None:
        advice = "a random head would be made: set tie_word_embeddings to true if it was tied, or save the checkpoint again"
        return Check(name, "fail", "config.json says the head is not tied, but there is no lm_head.weight", advice)
    if is_tied and tables.head is not None and tables.embedding is not None:
        start, stop = (vocab.start, vocab.start + vocab.num_bins) if vocab is not None else (0, SAMPLE)
        mine, other = tables.head.read(start, stop), tables.embedding.read(start, stop)
        if mine.shape != other.shape or not torch.equal(mine, other):
            advice = "set tie_word_embeddings to false: as it stands the head's own weights are dropped when the model is loaded"
            return Check(name, "fail", "config.json says the head is tied, but lm_head.weight differs from the embedding", advice)
    if part.get("tie_word_embeddings", is_tied) != is_tied:
        seen = f"tie_word_embeddings is {is_tied} in config.json and {not is_tied} in its text_config"
        return Check(name, "warning", seen, "set both to what the weights are: libraries read different ones", {"tied": is_tied})
    return Check(name, "ok", "tied to the embedding" if is_tied else "separate head, its weights are there", details={"tied": is_tied})


def check_rows(tables: Tables, vocab: CoordVocab | None, tokenizer: Any) -> Check:
    """``checkpoint.rows`` of a whole model: finite, and not as they were made."""
    if vocab is None or tables.embedding is None or vocab.start + vocab.num_bins > tables.embedding.rows:
        return Check("checkpoint.rows", "skipped", "no coordinate rows")
    parts = {"embedding": tables.embedding} | ({} if tables.head is None else {"head": tables.head})
    return _judge_rows({key: _slice(table, vocab) for key, table in parts.items()}, tables.embedding, vocab, tokenizer)


def _slice(table: Table, vocab: CoordVocab) -> Tensor:
    return table.read(vocab.start, vocab.start + vocab.num_bins)


def _judge_rows(parts: dict[str, Tensor], table: Table, vocab: CoordVocab, tokenizer: Any) -> Check:
    name, details, why = "checkpoint.rows", {}, {}
    old = table.read(0, min(vocab.start, SAMPLE))
    for part, rows in parts.items():
        if not bool(torch.isfinite(rows).all()):
            count = int((~torch.isfinite(rows)).any(dim=1).sum())
            return Check(name, "fail", f"{count} coordinate rows of the {part} hold NaN or infinity", "take an earlier checkpoint")
        # Of a head of its own only the embedding's start by digits is known.
        digits = _digit_rows(table, vocab, tokenizer) if part == "embedding" else None
        why[part], details[part] = untrained(rows, old, digits)
    bad = {part: text for part, text in why.items() if text is not None}
    if bad:
        seen = "; ".join(f"coordinate rows of the {part} look untrained: {text}" for part, text in bad.items())
        advice = "right for a model that is about to be trained; a trained one was saved without its rows, or never trained them"
        return Check(name, "warning", seen, advice, details)
    return Check(name, "ok", f"coordinate rows of {' and '.join(parts)} are finite and have moved from every known start", details=details)


def _digit_rows(table: Table, vocab: CoordVocab, tokenizer: Any) -> Tensor:
    pieces = [tokenizer.encode(str(k), add_special_tokens=False) for k in range(vocab.num_bins)]
    needed = sorted({i for ids in pieces for i in ids})
    rows = {i: table.read(i, i + 1)[0] for i in needed}
    return torch.stack([torch.stack([rows[i] for i in ids]).mean(dim=0) for ids in pieces])


def check_adapter_rows(folder: Path, config: dict[str, Any], tables: Tables, vocab: CoordVocab | None, tokenizer: Any) -> list[Check]:
    """``checkpoint.adapter`` (are the coordinate rows saved, for all tables) and ``checkpoint.rows`` of an adapter on its base."""
    name = "checkpoint.adapter"
    try:
        saved = adapter_rows(folder)
        stated = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (ConfigError, OSError, ValueError, SafetensorError) as error:
        failed = Check(name, "fail", " ".join(str(error).split()), "copy the adapter again, or take an earlier checkpoint")
        return [failed, Check("checkpoint.rows", "skipped", "no readable adapter")]
    asked = stated.get("trainable_token_indices") or (
        stated.get("token_indices") if stated.get("peft_type") == "TRAINABLE_TOKENS" else None
    )
    if vocab is None:
        return [Check(what, "skipped", "no coordinate tokens") for what in (name, "checkpoint.rows")]
    base = check_rows(tables, vocab, tokenizer)
    if not saved:
        if asked:
            seen = f"{ADAPTER_CONFIG} trains rows of the embedding, but they are not in adapter_model.safetensors"
            return [Check(name, "fail", seen, "save the adapter again, or take an earlier checkpoint"), base]
        outcome, advice = "ok", ""
        if base.outcome == "warning":
            outcome, advice = "warning", "train with adapter.new_rows=true: this adapter cannot make up for rows that were never trained"
        return [Check(name, outcome, "trains no coordinate rows: the base's are used", advice), base]  # type: ignore[arg-type]
    needed = ["embedding"] if tied(config) else ["embedding", "head"]
    problems = [f"the {part}'s coordinate rows are not saved" for part in needed if part not in saved]
    problems += [
        f"{table.rows} rows of the {part} are saved, expected {vocab.num_bins}"
        for part, table in saved.items()
        if table.rows != vocab.num_bins
    ]
    lists = asked.values() if isinstance(asked, dict) else [asked]
    if any(list(ids or []) != list(vocab.ids) for ids in lists):
        problems.append(f"{ADAPTER_CONFIG} names other rows than the coordinate tokens {vocab.start}..{vocab.start + vocab.num_bins - 1}")
    if problems:
        advice = "train a new adapter with adapter.new_rows=true on this base; untied heads need their own rows"
        return [Check(name, "fail", "; ".join(problems), advice), base]
    trained = {part: table.read(0, table.rows) for part, table in saved.items()}
    assert tables.embedding is not None
    return [
        Check(name, "ok", f"coordinate rows of {' and '.join(saved)} are saved"),
        _judge_rows(trained, tables.embedding, vocab, tokenizer),
    ]
