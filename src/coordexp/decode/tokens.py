"""What the tokens of a byte-level tokenizer stand for, as bytes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from coordexp.errors import VocabError


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where printable, else 256, 257, ... in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + n): byte for n, byte in enumerate(hidden)}


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Bytes of every token id. Added tokens stand for their own text; an id without a token has none.

    Raises:
        VocabError: a tokenizer that is not byte-level.
    """
    table = _byte_of_character()
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    found = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            found[i] = added[i]
        elif all(character in table for character in token):
            found[i] = bytes(table[character] for character in token)
        else:
            raise VocabError(
                f"token {i} ({token!r}) is not byte-level: answers are read by bytes, so prediction needs a byte-level tokenizer, as Qwen's"
            )
    return found


def token_spans(ids: Sequence[int], table: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text and each token's character range in it.

    Bytes that are no UTF-8 become U+FFFD. A character made of several tokens belongs to the last of them;
    the others have an empty range. An id beyond ``table`` (a padding row of the model) has no text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for i in ids:
        parts.append(decoder.decode(table[i] if i < len(table) else b""))
        spans.append((length, length + len(parts[-1])))
        length += len(parts[-1])
    return "".join(parts) + decoder.decode(b"", final=True), spans
