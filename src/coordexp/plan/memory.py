"""What lies in the memory of one process, by what it is for."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from coordexp.config.schema import ExperimentConfig
from coordexp.losses.linear import DEFAULT_BUDGET_MB
from coordexp.modeling.load import skeleton
from coordexp.modeling.shards import open_shards
from coordexp.modeling.tiny import tiny_skeleton
from coordexp.plan.workload import Reader
from coordexp.train.forward import unwrapped
from coordexp.vocab.adapters import adapt, base_folder, head_layers, head_of, is_adapter, part_of
from coordexp.vocab.extend import padded_rows

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)


def _adam8(p: nn.Parameter) -> float:
    """Two bytes a number and two scales a block of 256; bitsandbytes keeps small tensors in float32."""
    return 2 * (p.numel() + 4 * math.ceil(p.numel() / 256)) if p.numel() >= 4096 else 8 * p.numel()


def _adafactor(p: nn.Parameter) -> float:
    """A row and a column of squares for each matrix, float32."""
    return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) if p.ndim > 1 else 4 * p.numel()


# Bytes that an optimizer keeps for a trained parameter. torch's own keep them in the parameter's type.
OPTIMIZERS: Final[dict[str, Callable[[nn.Parameter], float]]] = {
    "adamw_torch": lambda p: 2 * p.nbytes,
    "adamw_torch_fused": lambda p: 2 * p.nbytes,
    "adamw_8bit": _adam8,
    "adamw_bnb_8bit": _adam8,
    "adafactor": _adafactor,
    "adagrad": lambda p: p.nbytes,
    "rmsprop": lambda p: p.nbytes,
    "sgd": lambda p: 0,
}

# DeepSpeed's defaults, in numbers: a bucket that is reduced or gathered, and parameters that stage 3 keeps gathered at once.
_BUCKET: Final = 500_000_000
_LIVE: Final = 1_000_000_000
# float32 [rows of a chunk, bins] that live at once in the loss: slice logits, targets, terms, their gradients.
_SLICE: Final = 12


@dataclass(frozen=True)
class Shapes:
    """Bytes of all ``weights`` (``numbers`` of them), and of ``gradients`` of the ``trained`` ones, ``parameters``. Units of sharding: the
    largest ``layer``, and the ``root``, which is in no layer. ``item``: size of a number of the head, ``[vocabulary, width]``; ``head``
    says whether it is trained, ``rows`` how many rows beside it are. ``largest``: the largest trained parameter. ``stored``: bytes of the
    files where they are of another type, else 0."""

    weights: float
    trained: int
    gradients: float
    parameters: tuple[nn.Parameter, ...]
    layer: float
    root: float
    item: int
    vocabulary: int
    width: int
    head: bool
    rows: int
    largest: float
    numbers: int
    stored: float


def prepared(config: ExperimentConfig, folder: Path | None, reader: Reader) -> tuple[Any, Shapes]:
    """The model as training will have it, on the meta device: tables grown, adapter in place, what is frozen frozen."""
    options = config.model
    model = tiny_skeleton(options.tiny) if folder is None else skeleton(folder)
    before = model.get_input_embeddings().weight.shape[0]
    rows = padded_rows(len(reader.tokenizer), before)
    if rows > before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.set_attn_implementation("eager" if options.attn_implementation == "eager" else "sdpa")
    dtype: torch.dtype = getattr(torch, options.dtype)
    if folder is None:
        stored = 0 if dtype == torch.float32 else sum(p.nbytes for p in model.parameters())
    else:
        weights = open_shards(base_folder(folder) if is_adapter(folder) else folder)
        stored = sum(entry.nbytes for entry in weights.entries.values() if entry.dtype != dtype)
    model = adapt(model.to(dtype), config.adapter, reader.vocab, base=folder or Path())
    return model, _shapes(model, reader, stored, options.quantization)


def switch_on_checkpointing(model: Any) -> None:
    """Gradient checkpointing as :mod:`coordexp.train.arguments` asks for it: every layer keeps its input, and nothing twice."""
    with warnings.catch_warnings():
        # Newer versions of transformers have another name for it beside this one.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated", category=FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _saved_bits(causal: Any, quantization: str | None) -> float:
    """Bytes that bitsandbytes saves: linear layers of the language model, in 4 bits with two levels of scales, or in 8 bits."""
    if quantization is None:
        return 0.0
    size = 1.0 if quantization == "int8" else 0.5 + 1 / 64 + 4 / (64 * 256)
    linear = [
        module.weight for name, module in causal.named_modules()
        if isinstance(module, nn.Linear) and part_of(name) == "language_model" and "lora_" not in name and not name.startswith("lm_head")
    ]  # fmt: skip
    return sum(weight.nbytes - size * weight.numel() for weight in linear)


def _shapes(model: Any, reader: Reader, stored: float, quantization: str | None) -> Shapes:
    causal = unwrapped(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.nbytes for p in model.parameters()) - _saved_bits(causal, quantization)
    units = causal._no_split_modules or ()
    layers = [sum(p.nbytes for p in module.parameters()) for module in model.modules() if type(module).__name__ in units]
    head = head_of(head_layers(causal)[0], reader.vocab)
    return Shapes(
        weights=weights, trained=sum(p.numel() for p in trained), gradients=sum(p.nbytes for p in trained),
        parameters=tuple(trained), layer=max(layers, default=0), root=weights - sum(layers), item=head.weight.element_size(),
        vocabulary=head.weight.shape[0], width=head.weight.shape[1], head=head.weight.requires_grad,
        rows=0 if head.coord_weight is None or not head.coord_weight.requires_grad else head.coord_weight.shape[0],
        largest=max((p.nbytes for p in trained), default=0), numbers=sum(p.numel() for p in model.parameters()), stored=stored,
    )  # fmt: skip


@dataclass(frozen=True)
class LossBytes:
    """Beside the model: most in the loss, most when its gradient begins, and the head's gradient, which waits for the embedding's."""

    forward: float
    backward: float
    head: float


def loss_bytes(
    shapes: Shapes, config: ExperimentConfig, rows: int, kind: str, *, positions: int = 0, gradient: bool = True
) -> LossBytes:
    """Buffers of :func:`coordexp.losses.chunked.fused_loss` for ``rows`` supervised of all ``positions``, on a ``cpu`` or ``cuda`` device.

    Rows and weight in the type of the products (copies where they have another), a chunk of logits, the slice's own in float32; for the
    gradient ``dh`` in that type and ``dW`` in float32, which are cast at the end, ``dh`` spread over all positions.
    """
    hidden, half = torch.finfo(getattr(torch, config.model.dtype)).bits // 8, config.train.bf16 or config.model.dtype == "bfloat16"
    product = 2 if half and kind != "cpu" else 4  # on a CPU never below float32
    table, states = shapes.vocabulary * shapes.width, rows * shapes.width
    chunk = max(1, min(rows, int(DEFAULT_BUDGET_MB[kind] * 2**20 // (shapes.vocabulary * product))))
    made = states * hidden + chunk * (shapes.vocabulary * product + _SLICE * 4 * 1000)
    made += (states * product if product != hidden else 0) + (table * product if product != shapes.item else 0)
    if not gradient:
        return LossBytes(made, 0.0, 0.0)
    weight = 4 * (table if shapes.head else shapes.rows * shapes.width)
    head = table * shapes.item if shapes.head else 0
    kept = states * product + weight
    # Spread by zeros and their sum with the rows.
    copies = (head if shapes.item != 4 else 0) + (states * hidden if product != hidden else 0) + 2 * positions * shapes.width * hidden
    return LossBytes(made + kept, kept + copies, head)


def held(shapes: Shapes, config: ExperimentConfig, strategy: Strategy, ranks: int) -> dict[str, float]:
    """Bytes that one of ``ranks`` processes holds for the whole step: ``weights``, ``gradients``, ``states``, and ``buffers`` in which
    parameters are gathered and gradients reduced. What accelerate sets up, with the defaults of torch and DeepSpeed."""
    state = OPTIMIZERS.get(config.train.optim, OPTIMIZERS["adamw_torch"])
    weights, gradients, states = shapes.weights, shapes.gradients, float(sum(state(p) for p in shapes.parameters))
    if strategy == "ddp":
        # DDP reduces copies of the gradients.
        return {"weights": weights, "gradients": gradients, "states": states, "buffers": gradients if ranks > 1 else 0.0}
    item = 2 if config.train.bf16 else shapes.item
    if strategy == "fsdp2":
        share, trained = item / shapes.item, gradients / weights
        # The root stays gathered; of the layers the one at work and the next. Gradients of a unit are whole until they are reduced.
        buffers = (shapes.root + 2 * shapes.layer) * share + (shapes.root + shapes.layer) * trained
        return {"weights": weights / ranks, "gradients": gradients / ranks, "states": states / ranks, "buffers": buffers}
    if config.train.bf16:
        # Weights become bf16, and what is trained has a float32 copy beside float32 states.
        states = states / shapes.item * 4 + 4 * shapes.trained
    buckets = 2 * item * min(_BUCKET, shapes.trained)
    whole = {"weights": shapes.numbers * item, "gradients": shapes.trained * item / ranks, "states": states / ranks, "buffers": buckets}
    if strategy == "zero2":
        return whole
    return whole | {"weights": shapes.numbers * item / ranks, "buffers": buckets + item * min(_LIVE, shapes.numbers)}


def step_bytes(shapes: Shapes, config: ExperimentConfig) -> float:
    """What the optimizer makes for itself while it moves the weights: a fused one nothing, the others copies of a parameter at a time."""
    return 0.0 if "fused" in config.train.optim or "8bit" in config.train.optim else 2 * shapes.largest


def strategy_of(config: ExperimentConfig) -> Strategy:
    """How the experiment spreads over its ranks, by ``train.deepspeed`` and ``train.fsdp`` or the launcher; DDP without them."""
    given = config.train.deepspeed
    if isinstance(given, dict):
        stage = str(given.get("zero_optimization", {}).get("stage", 0))
    else:
        # A file says its stage inside; its name is what is looked at. `accelerate launch` tells in the environment.
        stage = Path(given).stem if given else os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if "3" in stage or "2" in stage:
        return "zero3" if "3" in stage else "zero2"
    return "fsdp2" if config.train.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"
