"""Extend a model folder on disk by the coordinate tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.data.staging import staged_folder
from coordexp.errors import VocabError
from coordexp.modeling.load import check_model_folder, load_tokenizer
from coordexp.modeling.shards import Entry, Shards, with_entries
from coordexp.modeling.streamed import Streamed, open_model, save_streamed
from coordexp.vocab.adapters import base_folder, is_adapter
from coordexp.vocab.extend import Growth, plan_growth
from coordexp.vocab.options import Init, VocabOptions


@dataclass(frozen=True)
class ExtendSummary:
    """What :func:`extend_model` did."""

    out: Path
    start: int
    num_bins: int
    rows_before: int
    rows_after: int
    tied: bool
    init: Init
    added: bool = True

    def __str__(self) -> str:
        head = "tied head" if self.tied else "separate head"
        if not self.added:
            return f"the {self.num_bins} coordinate tokens were there already, their rows are left as they are; copied to {self.out}"
        return (
            f"{self.num_bins} coordinate tokens at ids {self.start}..{self.start + self.num_bins - 1} ({self.init} init, {head}); "
            f"embedding rows {self.rows_before} -> {self.rows_after}; written to {self.out}"
        )


def extend_model(source: Path, out: Path, options: VocabOptions, *, overwrite: bool = False) -> ExtendSummary:
    """Read a model folder, extend it, write it to ``out`` (not there yet, or with ``overwrite`` a model written so); an adapter is
    merged as well.

    Every tensor stays in its file and its type, and only the tables change: memory is that of a table, whatever the size of the
    model.

    Raises:
        ConfigError: ``source`` is no model folder, or ``out`` is in use.
        VocabError: see :func:`plan_growth`.
    """
    check_model_folder(source)
    with staged_folder(out, kind="model", overwrite=overwrite) as staging:
        tokenizer = load_tokenizer(source)
        adapter, base = (source, base_folder(source)) if is_adapter(source) else (None, source)
        model, known = open_model(base, adapter, text_only=True), len(tokenizer)
        vocab, growth = plan_growth(tokenizer, model.rows, options)
        shards, tied = model.merged()
        if growth is not None:
            shards = _grow(model, shards, growth, tied=tied)
        save_streamed(model, shards, staging, tied=tied, tokenizer=tokenizer, processor_from=source, text_only=True)
    rows = model.rows if growth is None else growth.rows
    return ExtendSummary(out, vocab.start, vocab.num_bins, model.rows, rows, tied, options.init, len(tokenizer) > known)


def _grow(model: Streamed, shards: Shards, growth: Growth, *, tied: bool) -> Shards:
    """The tables with their new rows, at the places and in the types that they have."""
    if any(slot.module is model.tables[1] and slot.attribute == "bias" for slot in model.slots):
        raise VocabError(f"{shards.folder}: the output head has a bias, which extending does not know: it cannot be extended")

    def grown(entry: Entry) -> Entry:
        make = entry.make or (lambda: shards.read(entry.key))
        return Entry(entry.key, entry.dtype, (growth.rows, *entry.shape[1:]), lambda: growth.grown(make()))

    entries = shards.entries
    model.model.config.get_text_config().vocab_size = growth.rows
    return with_entries(shards, {key: grown(entries[key]) for key in model.table_keys(tied)})
