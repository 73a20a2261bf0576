"""Extend a model folder on disk by the coordinate tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coordexp.data.staging import staged_folder
from coordexp.modeling.load import check_model_folder, load_model, load_tokenizer, save_model_folder, stored_dtype
from coordexp.vocab.extend import extend
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
    """Read a model folder, extend it, write it to ``out`` (which must not exist; with ``overwrite`` it may be a model that was written so).

    Raises:
        ConfigError: ``source`` is no model folder, or ``out`` is in use.
        VocabError: see :func:`add_coord_tokens`.
    """
    check_model_folder(source)
    with staged_folder(out, kind="model", overwrite=overwrite) as staging:
        tokenizer, model = load_tokenizer(source), load_model(source, text_only=True)
        before, known = model.get_input_embeddings().weight.shape[0], len(tokenizer)
        vocab = extend(model, tokenizer, options)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        save_model_folder(model.to(getattr(torch, stored_dtype(source))), tokenizer, staging, processor_from=source)
    tied, added = head.data_ptr() == table.data_ptr(), len(tokenizer) > known
    return ExtendSummary(out, vocab.start, vocab.num_bins, before, table.shape[0], tied, options.init, added)
