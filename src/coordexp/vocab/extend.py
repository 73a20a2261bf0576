"""Give a tokenizer the 1,000 coordinate tokens, and the tables of its model their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from coordexp.errors import VocabError
from coordexp.vocab.coord_vocab import CoordVocab
from coordexp.vocab.options import Init, VocabOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_ROWS_TO: Final = 128
HARMONICS: Final = 24


def add_coord_tokens(tokenizer: PreTrainedTokenizerBase, num_bins: int = 1000) -> CoordVocab:
    """Add ``<|coord_*|>`` (a wildcard used by older data) and ``<|coord_k|>`` as ordinary added tokens, in place.

    They are not *special* (decoding must keep them) and not normalised. With all present, nothing is added.

    Raises:
        VocabError: only some of the tokens are there.
    """
    from tokenizers import AddedToken

    names = ["<|coord_*|>", *(f"<|coord_{k}|>" for k in range(num_bins))]
    known = tokenizer.get_vocab()  # a new dict of the whole vocabulary at every call
    present = [name for name in names[1:] if name in known]
    if present and len(present) != num_bins:
        raise VocabError(f"the tokenizer has {len(present)} of {num_bins} coordinate tokens: start from one with all or none")
    if not present:
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return CoordVocab.from_tokenizer(tokenizer, num_bins)


def initial_rows(table: Tensor, vocab: CoordVocab, init: Init, digit_ids: list[list[int]], seed: int) -> Tensor:
    """Rows ``[K, D]`` for the new tokens, float32, from the ``[V, D]`` table of the old ones.

    ``mean``: the mean old row plus a little noise, what the library does by default. ``digits``: mean row
    of the pieces of "k". ``ordinal``: mean row plus a random smooth curve over k,
    ``sum_j cos(pi j k / (K-1)) / sqrt(j) * g_j`` with ``g_j`` normal, scaled to the spread of the old rows,
    so that neighbouring bins start similar.
    """
    old = table.float()
    mean, spread = old.mean(dim=0), old.std(dim=0).mean()
    generator = torch.Generator().manual_seed(seed)
    if init == "digits":
        return torch.stack([old[ids].mean(dim=0) for ids in digit_ids])
    if init == "mean":
        return mean + 1e-2 * spread * torch.randn(vocab.num_bins, old.shape[1], generator=generator)
    angle = math.pi * torch.arange(vocab.num_bins) / (vocab.num_bins - 1)
    j = torch.arange(1, HARMONICS + 1)
    curve = (torch.cos(angle[:, None] * j) / j.sqrt()) @ torch.randn(HARMONICS, old.shape[1], generator=generator)
    return mean + curve * (spread / curve.std())


def padded_rows(tokens: int, rows: int) -> int:
    """Rows of the table that is to hold ``tokens`` ids: the next multiple of 128, never fewer than the ``rows`` it has."""
    return max(rows, math.ceil(tokens / PAD_ROWS_TO) * PAD_ROWS_TO) if tokens > rows else rows


@dataclass(frozen=True)
class Growth:
    """What extending does to a table: its first ``old`` rows keep their values, and it has ``rows`` rows afterwards."""

    vocab: CoordVocab
    old: int
    rows: int
    digit_ids: list[list[int]]
    options: VocabOptions

    def grown(self, table: Tensor) -> Tensor:
        """``[rows, D]`` in the type of ``table`` ``[V, D]``: older tokens' rows, the coordinates' initial rows, the mean row elsewhere."""
        return torch.cat([table[: self.old], self._rest(table[: self.old].float()).to(table.dtype)])

    def _rest(self, old: Tensor) -> Tensor:
        rows = old.mean(dim=0).expand(self.rows - self.old, -1).clone()
        start = self.vocab.start - self.old
        rows[start : start + self.vocab.num_bins] = initial_rows(old, self.vocab, self.options.init, self.digit_ids, self.options.seed)
        return rows


def plan_growth(tokenizer: PreTrainedTokenizerBase, rows: int, options: VocabOptions) -> tuple[CoordVocab, Growth | None]:
    """Add the tokens to the tokenizer of a model with tables of ``rows`` rows, in place, and say what its tables need.

    None where they have their coordinate rows already: extending twice changes nothing.

    Raises:
        VocabError: a tokenizer with a part of the tokens or in another order, or tables with a part of their rows.
    """
    had, tokens_before = "<|coord_0|>" in tokenizer.get_vocab(), len(tokenizer)
    vocab = add_coord_tokens(tokenizer)
    end = vocab.start + vocab.num_bins
    if had and end <= rows:
        return vocab, None
    if had and vocab.start < rows:
        raise VocabError(
            f"the model has {rows} embedding rows, its coordinate tokens are ids {vocab.start}..{end - 1}: a part of their rows "
            "is missing: start from the checkpoint and tokenizer before they were extended"
        )
    digits = [tokenizer.encode(str(k), add_special_tokens=False) for k in range(vocab.num_bins)]
    # A checkpoint pads its table beyond its tokens: those rows were never trained, and say nothing about a typical row.
    old = min(rows, vocab.start if had else tokens_before)
    return vocab, Growth(vocab, old, padded_rows(len(tokenizer), rows), digits, options)
