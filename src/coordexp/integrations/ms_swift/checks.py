"""What is looked at before the first step: arguments that cannot work, the vocabulary, the data's contract; and the banner."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.data.options import PHRASE_FIELD
from coordexp.errors import ConfigError, DataError, VocabError
from coordexp.grammar import COORD_TOKEN, Geometry
from coordexp.integrations.ms_swift.options import CONFIG_VARIABLE, LOSS_NAME, ConfigSource
from coordexp.integrations.ms_swift.rows import answers_of, name_of, row_targets
from coordexp.modeling.manifest import CHECKPOINT_MANIFEST, check_contract, read_checkpoint_manifest
from coordexp.train.forward import unwrapped
from coordexp.train.launch import step_line
from coordexp.vocab.adapters import head_layers, head_of
from coordexp.vocab.coord_vocab import CoordVocab

# Rows of each data set that are read before the first step; the others are checked as they come.
CHECKED_ROWS: Final = 64


def refuse_arguments(args: Any, template: Any, model: Any) -> None:
    """Arguments that would change the loss behind the objective's back, or that the plugin does not support.

    Raises:
        ConfigError: all of them, one line each, with the argument.
    """
    wrong = [
        (template.packing or template.padding_free, "--packing, --padding_free: not supported: train unpacked, or with `coordexp train`"),
        (template.sequence_parallel_size > 1, "--sequence_parallel_size: expected 1: sequences are not split"),
        (bool(args.label_smoothing_factor), "--label_smoothing_factor: expected 0: the target is the objective's (target, sigma)"),
        (args.enable_dft_loss, "--enable_dft_loss: expected false: it is another loss"),
        (args.enable_channel_loss, "--enable_channel_loss: expected false: metrics are those of the registry"),
        (args.use_liger_kernel, "--use_liger_kernel: expected false: it would replace the forward that computes the objective"),
        (args.predict_with_generate, "--predict_with_generate: expected false: use `coordexp predict` and `coordexp evaluate`"),
        (args.eval_metric is not None, "--eval_metric: expected none: the evaluation logs the registry's metrics"),
        (args.tuner_backend == "unsloth", "--tuner_backend: expected peft: unsloth replaces the forward"),
        (
            bool(model.model_info.is_moe_model and args.router_aux_loss_coef),
            "--router_aux_loss_coef: expected 0: the router's loss is not part of the objective",
        ),
        (args.n_gpu > 1, "several GPUs in one process (DataParallel) are not supported: set NPROC_PER_NODE"),
    ]
    found = [f"--loss_type {LOSS_NAME}: {text}" for bad, text in wrong if bad]
    if found:
        raise ConfigError(found)


@dataclass(frozen=True)
class DataFacts:
    """What the first rows say: their ``prompts``, how many were read, how many of those with coordinates have no ground truth."""

    prompts: tuple[str, ...]
    read: int
    without_objects: int
    ordered: bool
    geometries: frozenset[Geometry] = frozenset()


def look_at_rows(name: str, rows: Any, codec: CoordCodec) -> DataFacts:
    """Check the first rows without decoding an image.

    Raises:
        DataError: a row that cannot be trained on, with its number.
    """
    prompts: dict[str, None] = {}
    bare, read, ordered, kinds = 0, 0, True, frozenset[Geometry]()
    for index in range(min(CHECKED_ROWS, len(rows))):
        row = rows[index]
        try:
            targets = row_targets(row, codec)
        except DataError as error:
            raise DataError(f"{name} row {name_of(row, str(index))}: {error}") from error
        read += 1
        prompts |= dict.fromkeys(_text(m["content"]) for m in row["messages"] if m["role"] == "user")
        has_tokens = any(COORD_TOKEN.search(answer) for answer in answers_of(row))
        bare += bool(has_tokens and not (row.get("objects") or {}).get("bbox"))
        for target in targets:
            kinds |= target.geometries
            corners = [(target.centers[k + 1], target.centers[k]) for k, slot in enumerate(target.slots) if slot[1] == 0]
            ordered = ordered and all(a <= b for a, b in itertools.pairwise(corners))
    return DataFacts(tuple(prompts), read, bare, ordered, kinds)


def _text(content: Any) -> str:
    return str(content).replace("<image>", "").strip()


@dataclass(frozen=True)
class Contract:
    """Vocabulary and codec of the run; ``source`` says who named the convention."""

    vocab: CoordVocab
    codec: CoordCodec
    source: str


def contract_of(folder: Path, tokenizer: Any, convention: str | None) -> Contract:
    """The vocabulary of the tokenizer and the convention of the model folder, which must agree with each other and with ``convention``.

    Raises:
        VocabError: coordinate tokens missing, special, out of order, or elsewhere than ``coordexp.json`` says.
        ConfigError: another convention than that of ``coordexp.json``.
    """
    manifest = read_checkpoint_manifest(folder)
    check_contract(folder, convention=convention)
    named = convention or (manifest.convention if manifest is not None else "norm999")
    source = "swift.convention" if convention else CHECKPOINT_MANIFEST if manifest is not None else "the default"
    codec = CoordCodec(CONVENTIONS[named].bins, named)
    vocab = CoordVocab.from_tokenizer(tokenizer, codec.num_bins)
    if manifest is not None and vocab.start != manifest.coord_start:
        raise VocabError(
            f"{folder / CHECKPOINT_MANIFEST}: codec.coord_start: {manifest.coord_start}, but the tokenizer has <|coord_0|> at "
            f"{vocab.start}: tokenizer and weights are of different models"
        )
    return Contract(vocab, codec, source)


def check_prompts(folder: Path, facts: list[DataFacts]) -> str | None:
    """The one prompt of the data, or that of the folder with its ``{phrase}``; None where there are several and no folder says.

    Raises:
        ConfigError: a prompt other than that of the folder's ``coordexp.json``.
    """
    prompts = list(dict.fromkeys(prompt for fact in facts for prompt in fact.prompts))
    manifest = read_checkpoint_manifest(folder)
    if manifest is not None and PHRASE_FIELD in manifest.prompt:
        shape = re.compile("(.+)".join(map(re.escape, manifest.prompt.split(PHRASE_FIELD))), re.DOTALL)
        if all(shape.fullmatch(prompt) for prompt in prompts):
            return manifest.prompt
    for prompt in prompts:
        check_contract(folder, prompt=prompt, keys={"prompt": "the user's message (`data export swift --prompt`)"})
    return prompts[0] if len(prompts) == 1 else None


def banner(
    model: Any, args: Any, source: ConfigSource, contract: Contract, facts: list[DataFacts], resize: str | None, version_note: str | None
) -> list[str]:
    """What is trained towards what, what divides what, and what is left out."""
    objective, vocab = source.config.objective, contract.vocab
    terms = " + ".join(f"{objective.weight(name):g} {name}" for name in objective.active)
    where = f"defaults ({CONFIG_VARIABLE} is not set)" if source.path is None else str(source.path)
    read, bare = sum(f.read for f in facts), sum(f.without_objects for f in facts)
    centres = f"unrounded, from objects.bbox ({read} rows checked)"
    if bare:
        centres = f"unrounded where a row has objects.bbox; {bare} of {read} rows checked have none: there the token's bin is the centre"
    head = head_of(head_layers(unwrapped(model))[0], vocab)
    rows = head.weight if head.coord_weight is None else head.coord_weight
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"objective of {where}: {terms}",
        step_line(objective, args, "samples"),
        f"coordinates: ids {vocab.start}..{vocab.start + vocab.num_bins - 1}, {contract.codec.convention} by {contract.source}; their rows "
        f"of the head are {'trained' if rows.requires_grad else 'FROZEN: rows that were only added to the vocabulary stay as they are'}",
        f"centres: {centres}",
        f"trains {trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters",
        "evaluation divides the same sums by the same counts, over the whole set; no logits are kept",
    ]
    if source.unused:
        lines.append(f"not used of that file, ms-swift's arguments decide: {', '.join(source.unused)}")
    return lines + [line for line in (resize, version_note) if line is not None]


def resize_note(processor: Any, size: tuple[int, int], grid: Any, tokens: Callable[[int, int], int]) -> str | None:
    """A warning where ms-swift resizes an image otherwise than the folder's own processor, which predictions are made with."""
    width, height = size
    own, here = tokens(height, width), int(grid.prod())
    if own == here:
        return None
    return (
        f"WARNING: ms-swift cuts a {width}x{height} image into {here} patches, the folder's processor into {own}: "
        "set IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM (or MAX_PIXELS) to the budget that predictions are made with"
    )
