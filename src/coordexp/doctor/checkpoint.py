"""Checks of a checkpoint folder, a whole model or an adapter. Weights are looked into, never loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.codec import CONVENTIONS
from coordexp.doctor.checks import Check
from coordexp.doctor.rows import check_adapter_rows, check_head, check_rows, check_sizes
from coordexp.doctor.tokenizer import check_round_trip, check_special, check_tokens
from coordexp.doctor.weights import Tables, find_tables
from coordexp.errors import ConfigError
from coordexp.modeling.load import BUDGET_FILES, load_image_processor, load_tokenizer, pixel_budget
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, CheckpointManifest, read_checkpoint_manifest
from coordexp.vocab.adapters import ADAPTER_CONFIG, base_folder, is_adapter
from coordexp.vocab.coord_vocab import CoordVocab

RUN_MANIFEST: Final = "manifest.json"
_TOKENIZER_CHECKS: Final = ("checkpoint.tokens", "checkpoint.round_trip", "checkpoint.special_tokens")


@dataclass(frozen=True)
class Folders:
    """``own``: the folder asked about. ``model``: the one with config and weights, which of an adapter is its base (None: not found)."""

    own: Path
    model: Path | None
    adapter: bool

    def holding(self, names: tuple[str, ...]) -> Path | None:
        """The first of both that has one of the files."""
        return next((f for f in (self.own, self.model) if f is not None and any((f / name).is_file() for name in names)), None)


def check_checkpoint(path: Path) -> list[Check]:
    """All checks of the folder (of a run directory: of its final checkpoint), under ``checkpoint.``.

    Raises:
        ConfigError: no such folder, or a run without a final checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder: expected a model, a checkpoint or a run directory")
    own = path
    if (path / RUN_MANIFEST).is_file():
        own = path / "checkpoints" / "final"
        if not own.is_dir():
            raise ConfigError(f"{path}: a run directory without checkpoints/final: name one of its checkpoint folders")
    folders, base = _folders(own)
    config, config_problem = _config(folders)
    checks = [_check_files(folders, config_problem), *base]
    manifest, contract = _check_contract(folders)
    tokenizer_checks, vocab, length = _tokenizer_checks(folders, config, manifest)
    checks += tokenizer_checks
    checks += _weights_checks(folders, config, config_problem, vocab, length)
    checks.append(_with_vocab(contract, manifest, vocab))
    checks.append(_check_pixels(folders, manifest))
    return checks


def _folders(own: Path) -> tuple[Folders, list[Check]]:
    if not is_adapter(own):
        return Folders(own, own, adapter=False), []
    try:
        base = base_folder(own)
    except (ConfigError, OSError) as error:
        advice = f"put the base model where {ADAPTER_CONFIG} says, or name its new place there"
        return Folders(own, None, adapter=True), [Check("checkpoint.base", "fail", str(error), advice)]
    if is_adapter(base):
        seen = f"{base} is an adapter itself"
        advice = "merge it first: `coordexp vocab export`"
        return Folders(own, None, adapter=True), [Check("checkpoint.base", "fail", seen, advice)]
    return Folders(own, base, adapter=True), [Check("checkpoint.base", "ok", f"adapter of {base}, which is there")]


def _check_files(folders: Folders, config_problem: str) -> Check:
    missing = []
    if folders.model is not None and not (folders.model / "config.json").is_file():
        missing.append("config.json")
    if folders.adapter and not (folders.own / "adapter_model.safetensors").is_file():
        missing.append("adapter_model.safetensors")
    if folders.model is not None and not list(folders.model.glob("*.safetensors")):
        missing.append("*.safetensors")
    for names in (("tokenizer_config.json",), ("tokenizer.json", "vocab.json"), BUDGET_FILES):
        if folders.holding(names) is None:
            missing.append(" or ".join(names))
    kind = "an adapter" if folders.adapter else "a model"
    if missing:
        advice = "copy the missing files from the model it started from; weights must be saved again"
        return Check("checkpoint.files", "fail", f"{folders.own}: of {kind}, missing: {', '.join(missing)}", advice, {"missing": missing})
    if folders.model is not None and config_problem:
        return Check("checkpoint.files", "fail", config_problem, "take the file of the model it started from")
    return Check("checkpoint.files", "ok", f"{folders.own}: {kind} with weights, tokenizer and processor files")


def _config(folders: Folders) -> tuple[dict[str, Any] | None, str]:
    if folders.model is None:
        return None, "the base model was not found"
    path = folders.model / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return None, f"{path} cannot be read ({' '.join(str(error).split())[:120]})"
    return (content, "") if isinstance(content, dict) else (None, f"{path}: expected an object")


def _tokenizer_checks(
    folders: Folders, config: dict[str, Any] | None, manifest: CheckpointManifest | None
) -> tuple[list[Check], CoordVocab | None, int | None]:
    where = folders.holding(("tokenizer_config.json",))
    if where is None:
        return [Check(name, "skipped", "no tokenizer") for name in _TOKENIZER_CHECKS], None, None
    try:
        tokenizer = load_tokenizer(where)
    except ConfigError as error:
        first = Check(_TOKENIZER_CHECKS[0], "fail", str(error), "take the tokenizer files of the model it started from")
        return [first, *(Check(name, "skipped", "no tokenizer") for name in _TOKENIZER_CHECKS[1:])], None, None
    num_bins = 1000 if manifest is None else manifest.num_bins
    tokens, vocab = check_tokens(tokenizer, num_bins)
    trip = Check(_TOKENIZER_CHECKS[1], "skipped", "no usable coordinate tokens")
    # Tokens that are there but special are what a round trip shows best.
    if f"<|coord_{num_bins - 1}|>" in tokenizer.get_vocab():
        trip = check_round_trip(tokenizer, num_bins)
    return [tokens, trip, check_special(tokenizer, config)], vocab, len(tokenizer)


def _weights_checks(
    folders: Folders, config: dict[str, Any] | None, config_problem: str, vocab: CoordVocab | None, length: int | None
) -> list[Check]:
    names = ("checkpoint.weights", "checkpoint.sizes", "checkpoint.head", "checkpoint.rows")
    if folders.model is None or config is None:
        return [Check(name, "skipped", config_problem) for name in names]
    try:
        tables = find_tables(folders.model)
    except ConfigError as error:
        first = Check(names[0], "fail", str(error), "copy the file again, or save the checkpoint again")
        return [first, *(Check(name, "skipped", "no readable weights") for name in names[1:])]
    checks = [_check_shards(tables), check_sizes(config, tables, vocab, length), check_head(config, tables, vocab)]
    tokenizer_folder = folders.holding(("tokenizer_config.json",))
    tokenizer = None if vocab is None or tokenizer_folder is None else load_tokenizer(tokenizer_folder)
    if folders.adapter:
        return [*checks, *check_adapter_rows(folders.own, config, tables, vocab, tokenizer)]
    return [*checks, check_rows(tables, vocab, tokenizer)]


def _check_shards(tables: Tables) -> Check:
    if tables.missing:
        seen = f"the index names {len(tables.missing)} files that are not there, first {tables.missing[0]}"
        return Check("checkpoint.weights", "fail", seen, "copy them, or save the checkpoint again", {"missing": list(tables.missing)})
    if tables.embedding is None:
        return Check("checkpoint.weights", "fail", "no embed_tokens.weight in the weights", "save the checkpoint again, whole")
    return Check("checkpoint.weights", "ok", "all files readable, the embedding is there")


def _check_contract(folders: Folders) -> tuple[CheckpointManifest | None, Check]:
    name = "checkpoint.contract"
    where = folders.holding((CHECKPOINT_MANIFEST,))
    if where is None:
        advice = "expected before the first training; without it nothing checks the convention, prompt and image size at prediction"
        return None, Check(name, "warning", f"no {CHECKPOINT_MANIFEST}", advice)
    try:
        manifest = read_checkpoint_manifest(where)
    except ConfigError as error:
        return None, Check(name, "fail", str(error), "take the file of the run that made this checkpoint")
    assert manifest is not None
    problem = None
    if manifest.convention not in CONVENTIONS:
        problem = f"codec.convention: expected one of {', '.join(CONVENTIONS)}, got {manifest.convention!r}"
    elif CONVENTIONS[manifest.convention].bins != manifest.num_bins:
        problem = f"codec.num_bins: {manifest.convention} has {CONVENTIONS[manifest.convention].bins}, got {manifest.num_bins}"
    if problem is not None:
        return None, Check(name, "fail", f"{where / CHECKPOINT_MANIFEST}: {problem}", "take the file of the run that made this checkpoint")
    seen = (
        f"{manifest.convention}, {manifest.num_bins} bins from id {manifest.coord_start}, prompt {manifest.prompt!r}, "
        f"{', '.join(manifest.geometries)}, {manifest.order}"
    )
    return manifest, Check(name, "ok", seen)


def _with_vocab(contract: Check, manifest: CheckpointManifest | None, vocab: CoordVocab | None) -> Check:
    if manifest is None or vocab is None or vocab.start == manifest.coord_start:
        return contract
    seen = f"{CHECKPOINT_MANIFEST}: codec.coord_start: {manifest.coord_start}, but the tokenizer has <|coord_0|> at {vocab.start}"
    return Check(contract.name, "fail", seen, "tokenizer and weights are of different models: take both from one checkpoint")


def _check_pixels(folders: Folders, manifest: CheckpointManifest | None) -> Check:
    name = "checkpoint.pixels"
    where = folders.holding(BUDGET_FILES)
    if where is None:
        return Check(name, "skipped", "no processor files")
    advice = "set the size of preprocessor_config.json to what the checkpoint was trained with, see coordexp.json"
    try:
        low, high = pixel_budget(load_image_processor(where))
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        return Check(name, "fail", " ".join(str(error).split()), advice)
    details = {"min_pixels": low, "max_pixels": high}
    if manifest is not None and (low, high) != (manifest.min_pixels, manifest.max_pixels):
        # The manifest and the processor files may lie in different folders.
        seen = f"images are resized to {low}..{high} pixels, trained was {manifest.min_pixels}..{manifest.max_pixels}"
        return Check(name, "fail", seen, advice, details)
    seen = f"images are resized to {low}..{high} pixels" + ("" if manifest is None else f", as {CHECKPOINT_MANIFEST} says")
    return Check(name, "ok", seen, details=details)
