"""A checkpoint folder: its tokens, its table, its contract. Weights are read row by row; the model is never built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from coordexp.codec import CONVENTIONS
from coordexp.doctor.base import Check
from coordexp.doctor.rows import check_rows, read_tables
from coordexp.errors import CoordexpError
from coordexp.modeling.load import TEXT_CLASSES, VISION_CLASSES, check_model_folder, load_image_processor, load_tokenizer, pixel_budget
from coordexp.modeling.manifest import CheckpointManifest, read_checkpoint_manifest
from coordexp.vocab.adapters import base_folder, is_adapter

BINS: Final = 1000
EXTEND: Final = "`coordexp vocab extend MODEL --out DIR` gives a model its tokens"


def check_checkpoint(folder: Path) -> list[Check]:
    """Every check of a model folder, or of an adapter folder with its base.

    Raises:
        ConfigError: no model folder, or a tokenizer that cannot be read.
    """
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    config = json.loads(((base_folder(folder) if is_adapter(folder) else folder) / "config.json").read_text(encoding="utf-8"))
    checks = [_architecture(folder, config)]
    manifest, broken = None, ""
    try:
        manifest = read_checkpoint_manifest(folder)
    except CoordexpError as error:
        broken = str(error)
    bins = BINS if manifest is None else manifest.num_bins
    tokens = check_tokens(tokenizer, bins)
    checks += tokens
    start = next((check.values["start"] for check in tokens if "start" in check.values), None)
    checks.append(_contract(folder, manifest, broken, start))
    tables = read_tables(folder, tied=_tied(config))
    checks.append(_padding(tables.rows, len(tokenizer)))
    checks.append(tables.tie)
    if start is None:
        checks.append(Check("C09", "coordinate rows", "skipped", "without whole coordinate tokens there are no rows to look at", EXTEND))
    else:
        checks += check_rows(tables, start, bins, tokenizer)
    checks += [_image_processor(folder, config), _chat_template(tokenizer)]
    return checks


def _architecture(folder: Path, config: dict[str, Any]) -> Check:
    kind = config.get("model_type")
    what = f"{'adapter on ' if is_adapter(folder) else ''}{kind}"
    if kind in VISION_CLASSES:
        return Check("C01", "architecture", "ok", what, "", {"model_type": kind})
    if kind in TEXT_CLASSES:
        return Check(
            "C01",
            "architecture",
            "warning",
            f"{what}: a model without eyes",
            "it can be extended, not trained on images",
            {"model_type": kind},
        )
    return Check("C01", "architecture", "fail", f"model_type {what}", f"use one of {', '.join(VISION_CLASSES)}", {"model_type": kind})


def check_tokens(tokenizer: Any, bins: int) -> list[Check]:
    """Coordinate tokens: all there, with distinct, ascending and contiguous ids, not special, and whole in running text."""
    table = tokenizer.get_vocab()
    names = [f"<|coord_{k}|>" for k in range(bins)]
    there = [name for name in names if name in table]
    if len(there) < bins:
        missing = next(name for name in names if name not in table)
        return [Check("C02", "coordinate tokens", "fail", f"{len(there)} of {bins} are there, the first missing is {missing}", EXTEND)]
    ids = [table[name] for name in names]
    checks = []
    rebuild = "rebuild the tokenizer with `coordexp vocab extend` from the checkpoint before"
    if len(set(ids)) < bins:
        checks.append(Check("C02", "coordinate tokens", "fail", f"only {len(set(ids))} distinct ids for {bins} tokens", rebuild))
    elif ids != list(range(ids[0], ids[0] + bins)):
        first = next(k for k in range(1, bins) if ids[k] != ids[k - 1] + 1)
        seen = f"ids are not ascending and contiguous: {names[first - 1]} is {ids[first - 1]}, {names[first]} is {ids[first]}"
        checks.append(Check("C02", "coordinate tokens", "fail", seen, rebuild))
    else:
        checks.append(Check("C02", "coordinate tokens", "ok", f"all {bins}, ids {ids[0]}..{ids[-1]}", "", {"start": ids[0], "bins": bins}))
    added = tokenizer.added_tokens_decoder
    special = [i for i in ids if i in added and added[i].special]
    if special:
        seen = f"{len(special)} coordinate tokens are special: decoding with skip_special_tokens drops them"
        checks.append(Check("C03", "special flag", "fail", seen, rebuild))
    else:
        checks.append(Check("C03", "special flag", "ok", "coordinate tokens are ordinary tokens: decoding keeps them"))
    text = f'{{"bbox_2d": [{names[0]}, {names[7]}, {names[bins // 2]}, {names[-1]}]}}'
    encoded = tokenizer.encode(text, add_special_tokens=False)
    whole = sum(i in set(ids) for i in encoded)
    decoded = tokenizer.decode(encoded, skip_special_tokens=True)
    if whole != 4 or decoded != text:
        seen = f"{text} is read as {whole} coordinate tokens and written back as {decoded}"
        checks.append(Check("C04", "tokens in text", "fail", seen, "add them as added tokens that are neither normalized nor stripped"))
    else:
        checks.append(Check("C04", "tokens in text", "ok", "a box is read as four coordinate tokens and written back unchanged"))
    return checks


def _contract(folder: Path, manifest: CheckpointManifest | None, broken: str, start: int | None) -> Check:
    name = "coordexp.json"
    if broken:
        return Check("C05", name, "fail", broken, "copy it from the checkpoint this one was made from")
    if manifest is None:
        return Check(
            "C05", name, "warning", f"{folder.name} has none: its convention, prompt and image size are not known",
            "right for a foreign checkpoint; pass --prompt as it was trained, and --convention where a command has it",
        )  # fmt: skip
    values = {"convention": manifest.convention, "prompt": manifest.prompt, "order": manifest.order, "num_bins": manifest.num_bins}
    if manifest.convention not in CONVENTIONS:
        return Check("C05", name, "fail", f"unknown convention {manifest.convention!r}", f"one of {', '.join(CONVENTIONS)}", values)
    if CONVENTIONS[manifest.convention].bins != manifest.num_bins:
        seen = f"{manifest.convention} has {CONVENTIONS[manifest.convention].bins} bins, the file says {manifest.num_bins}"
        return Check("C05", name, "fail", seen, "one of the two is wrong: copy the file of the training run", values)
    if start is not None and start != manifest.coord_start:
        seen = f"bin 0 is token {manifest.coord_start} by coordexp.json and {start} by the tokenizer"
        return Check("C05", name, "fail", seen, "tokenizer and coordexp.json are of different checkpoints", values)
    return Check("C05", name, "ok", f"{manifest.convention}, {manifest.num_bins} bins, prompt {manifest.prompt!r}", "", values)


def _tied(config: dict[str, Any]) -> bool:
    """As transformers reads it: the outer key, else the text part's, else not tied."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings", False) if isinstance(text, dict) else False
    return bool(config.get("tie_word_embeddings", inner))


def _padding(rows: int | None, tokens: int) -> Check:
    name = "table size"
    if rows is None:
        return Check(
            "C06", name, "fail", "no embedding table in the *.safetensors files", "the folder's weights are not whole: copy it again"
        )
    values = {"rows": rows, "tokens": tokens}
    if rows < tokens:
        seen = f"{rows} rows for {tokens} tokens: the last {tokens - rows} tokens have no row"
        return Check("C06", name, "fail", seen, "tokenizer and weights are of different checkpoints, or the table was not resized", values)
    multiple = "a multiple of 128" if rows % 128 == 0 else "not a multiple of 128, which costs some speed on a GPU"
    return Check("C06", name, "ok", f"{rows} rows for {tokens} tokens, {rows - tokens} of padding; {multiple}", "", values)


def _image_processor(folder: Path, config: dict[str, Any]) -> Check:
    if config.get("model_type") in TEXT_CLASSES:
        return Check("C10", "image size", "skipped", "a text model has no image processor")
    try:
        low, high = pixel_budget(load_image_processor(folder))
    except CoordexpError as error:
        return Check("C10", "image size", "fail", str(error), "copy the processor files of the base model into the folder")
    return Check("C10", "image size", "ok", f"images are resized to {low:,}..{high:,} pixels", "", {"min_pixels": low, "max_pixels": high})


def _chat_template(tokenizer: Any) -> Check:
    if tokenizer.chat_template is None:
        return Check("C11", "chat template", "fail", "the tokenizer has none", "copy chat_template.jinja of the base model into the folder")
    return Check("C11", "chat template", "ok", f"{len(tokenizer.chat_template)} characters")
