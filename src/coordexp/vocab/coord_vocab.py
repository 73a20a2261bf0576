"""``CoordVocab``: where the coordinate tokens of a tokenizer are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordexp.errors import VocabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CoordVocab:
    """``num_bins`` consecutive token ids from ``start`` on; bin k is id ``start + k``."""

    start: int
    num_bins: int

    @property
    def ids(self) -> range:
        """Token ids of bins 0 .. num_bins - 1."""
        return range(self.start, self.start + self.num_bins)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, num_bins: int = 1000) -> CoordVocab:
        """Find ``<|coord_0|>`` .. ``<|coord_{num_bins-1}|>`` and check that they are usable.

        Raises:
            VocabError: tokens missing, special (decoding would drop them), not distinct, or not contiguous
                and ascending.
        """
        table = tokenizer.get_vocab()
        names = [f"<|coord_{k}|>" for k in range(num_bins)]
        missing = [name for name in names if name not in table]
        if missing:
            raise VocabError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has {num_bins - len(missing)} of {num_bins} coordinate "
                f"tokens (first missing: {missing[0]}): run `coordexp vocab extend MODEL --out DIR` first"
            )
        ids = [table[name] for name in names]
        if ids != list(range(ids[0], ids[0] + num_bins)):
            raise VocabError("the coordinate tokens are not contiguous and ascending: rebuild them with `coordexp vocab extend`")
        # ``all_special_tokens`` lists the named ones only; decoding drops every token that carries the mark.
        added = tokenizer.added_tokens_decoder
        special = [i for i in ids if i in added and added[i].special]
        if special:
            raise VocabError(f"{len(special)} coordinate tokens are special, decoding would drop them: rebuild them with `vocab extend`")
        return cls(start=ids[0], num_bins=num_bins)
