"""Checks of a checkpoint's tokenizer: coordinate tokens, round trip, special tokens."""

from __future__ import annotations

from typing import Any, Final

from coordexp.doctor.checks import Check
from coordexp.errors import VocabError
from coordexp.grammar import Instance, parse, render
from coordexp.vocab.coord_vocab import CoordVocab

# The chat and the picture stand or fall with these.
NEEDED: Final = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# Special in Qwen's tokenizers, where they are there at all.
OTHERS: Final = (
    "<|endoftext|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_pad|>", "<|video_pad|>",
)  # fmt: skip


def check_tokens(tokenizer: Any, num_bins: int) -> tuple[Check, CoordVocab | None]:
    """``checkpoint.tokens``: all there, not special, contiguous and in order; each text is encoded as its one id."""
    try:
        vocab = CoordVocab.from_tokenizer(tokenizer, num_bins)
    except VocabError as error:
        return Check("checkpoint.tokens", "fail", str(error), "`coordexp vocab extend MODEL --out DIR` on the model it started from"), None
    ids = tokenizer.encode("".join(f"<|coord_{k}|>" for k in range(num_bins)), add_special_tokens=False)
    if ids != list(vocab.ids):
        wrong = next((k for k, (a, b) in enumerate(zip(ids, vocab.ids, strict=False)) if a != b), min(len(ids), num_bins))
        seen = f"the text of the coordinate tokens is not encoded as their ids, first at <|coord_{wrong}|>"
        return Check("checkpoint.tokens", "fail", seen, "the tokenizer's added tokens are damaged: extend the model again"), None
    seen = f"{num_bins} coordinate tokens at ids {vocab.start}..{vocab.start + num_bins - 1}, in order, not special"
    return Check("checkpoint.tokens", "ok", seen, details={"start": vocab.start, "num_bins": num_bins}), vocab


def check_round_trip(tokenizer: Any, num_bins: int) -> Check:
    """``checkpoint.round_trip``: an answer is encoded, decoded as generation does, and parsed to the same objects."""
    last = num_bins - 1
    objects = (
        Instance("black cat", (0, 1, last - 1, last)),
        Instance('a "quoted" café', (10, 200, 311, 422)),
        Instance("tip", (7, last // 2), "point_2d"),
    )
    text = render(objects).text
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True)
    if decoded == text and parse(decoded).instances == objects:
        return Check("checkpoint.round_trip", "ok", "an answer comes back from encode and decode as it was")
    at = next((i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b), min(len(text), len(decoded)))
    seen = f"an answer changes in encode and decode: {text[at : at + 40]!r} became {decoded[at : at + 40]!r}"
    advice = "coordinate tokens must be added as ordinary tokens (special=False), clean_up_tokenization_spaces must be off"
    return Check("checkpoint.round_trip", "fail", seen, advice)


def check_special(tokenizer: Any, config: dict[str, Any] | None) -> Check:
    """``checkpoint.special_tokens``: Qwen's are one id each and left out of decoded answers; the configuration means the same ids."""
    table = tokenizer.get_vocab()
    problems = []
    missing = [name for name in NEEDED if name not in table]
    if missing:
        problems.append(f"{', '.join(missing)} missing")
    present = [name for name in (*NEEDED, *OTHERS) if name in table]
    split = [name for name in present if tokenizer.encode(name, add_special_tokens=False) != [table[name]]]
    if split:
        problems.append(f"{', '.join(split)} encoded as several pieces")
    plain = [name for name in present if tokenizer.decode([table[name]], skip_special_tokens=True) != ""]
    if plain:
        problems.append(f"{', '.join(plain)} no longer special: they stay in decoded answers")
    if "<|im_end|>" in table and tokenizer.eos_token_id != table["<|im_end|>"]:
        problems.append(f"the end of an answer is {tokenizer.eos_token!r}, expected '<|im_end|>'")
    for key, name in (("image_token_id", "<|image_pad|>"), ("vision_start_token_id", "<|vision_start|>")):
        stated = None if config is None else config.get(key)
        if stated is not None and name in table and stated != table[name]:
            problems.append(f"config.json: {key} is {stated}, the tokenizer has {name} at {table[name]}")
    advice = (
        "take the tokenizer files of the model it started from and run `coordexp vocab extend`: adding tokens with "
        "additional_special_tokens replaces the old list"
    )
    if problems:
        return Check("checkpoint.special_tokens", "fail", "; ".join(problems), advice, {"problems": problems})
    # Decoding goes by a mark on the token, other code by this list; only the first makes answers wrong.
    listed = set(tokenizer.all_special_tokens)
    unlisted = [name for name in NEEDED if name not in listed]
    if unlisted:
        seen = f"{', '.join(unlisted)} left out when decoding, but no longer in the tokenizer's list of special tokens"
        return Check("checkpoint.special_tokens", "warning", seen, advice, {"unlisted": unlisted})
    return Check("checkpoint.special_tokens", "ok", f"{len(present)} special tokens of the chat and pictures, one id each")
