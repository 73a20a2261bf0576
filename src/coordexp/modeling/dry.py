"""A training step without numbers: every tensor has its shape and type and no storage, and what would be alive is added up.

The real modules run, forward and backward, on torch's fake tensors (:mod:`torch._subclasses`), so layers, adapters, checkpointing, autocast
and attention are those of training, whatever the architecture. Nothing is read and nothing is allocated but indices and masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coordexp.errors import ConfigError

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
# Without a dtype these make what their numbers are; all others make floating point.
_BY_VALUE = (_aten.arange, _aten.full, _aten.scalar_tensor, _aten.randint, _aten.randperm)


@dataclass(frozen=True)
class Sample:
    """A sequence of ``tokens`` tokens, of which ``image`` are placeholders of a picture of ``patches`` patches."""

    tokens: int
    image: int
    patches: int


Rows = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class DryStep:
    """Bytes beside the weights: most during the forward pass, kept at its end for the backward pass, and most during the backward pass,
    with the gradients that were made until then and without any."""

    forward: int
    kept: int
    backward: int
    backward_alone: int


class DryMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Floating point is fake, integers and booleans are real: lengths, positions and masks keep their values, which shapes depend on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.alive = self.peak = self.gradients = self.peak_alone = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` on fakes where it has to do with floating point; count what it makes."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        faked = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if faked and func in _INDEXING:
            # How much a mask selects is known, since masks are real.
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        if faked or (not tensors and _makes_floats(func, args, kwargs)):
            with self.fake:
                made = func(*args, **kwargs)
        else:
            made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        """Add the tensor's storage to what is alive, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size
        self._mark()

    def gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is there: it counts apart from now on."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _mark(self) -> None:
        self.peak = max(self.peak, self.alive)
        self.peak_alone = max(self.peak_alone, self.alive - self.gradients)

    def restart(self) -> int:
        """What is alive; peaks start anew from there."""
        self.peak, self.peak_alone = self.alive, self.alive - self.gradients
        return self.alive


def _makes_floats(func: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("dtype") is not None:
        return bool(kwargs["dtype"].is_floating_point)
    return func.overloadpacket not in _BY_VALUE or any(isinstance(value, float) for value in tree_leaves(args))


def _places(index: Any) -> tuple[Any, ...]:
    if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return tuple(index.nonzero(as_tuple=True))
    return (index,)


def dry(model: Any, mode: DryMode) -> None:
    """Give a skeleton on the meta device fake tensors of the CPU in place of its parameters and buffers; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode.fake:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: convert(tensor) for name, tensor in store.items() if tensor is not None and tensor.is_floating_point()})


@dataclass(frozen=True)
class DryModel:
    """A ``model`` that went through :func:`dry` with ``mode``, and its ``backbone``: the head and its loss are not in the figures.

    Several samples in a row are a pack. ``autocast`` is the context of the forward pass. Without ``masked`` no attention mask is made, as
    with FlashAttention.
    """

    model: Any
    backbone: Any
    mode: DryMode
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    masked: bool = True

    def step(self, rows: Rows) -> DryStep:
        """Forward and backward on a batch of ``rows``."""
        mode, model = self.mode, self.model
        with _told(), mode:
            batch, before = self._start(rows)
            with self.autocast():
                hidden = self.backbone(**batch, use_cache=False)[0]
            forward, kept = mode.peak - before, mode.alive - before
            hooks = [p.register_post_accumulate_grad_hook(mode.gradient) for p in model.parameters() if p.requires_grad]
            with mode.fake:
                upstream = torch.empty_like(hidden)
            mode.restart()
            if hidden.requires_grad:
                hidden.backward(upstream)
            backward, alone = mode.peak - before, mode.peak_alone - before
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
        mode.gradients = 0
        return DryStep(forward, kept, backward, alone)

    def evaluation(self, rows: Rows) -> int:
        """Most that is alive beside the weights in a forward pass that keeps nothing."""
        with _told(), self.mode, torch.no_grad():
            batch, before = self._start(rows)
            with self.autocast():
                self.backbone(**batch, use_cache=False)
            return self.mode.peak - before

    def _start(self, rows: Rows) -> tuple[dict[str, Tensor], int]:
        # Views of these are not new memory.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self.mode.count(tensor)
        before = self.mode.restart()
        return _batch(self.mode, self.backbone.config, rows, self.masked), before


@contextmanager
def _told() -> Iterator[None]:
    """Around a step: an architecture whose shapes depend on numbers has no dry run.

    Raises:
        ConfigError: the operation that asked for a number.
    """
    unknown = (
        fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException, fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )  # fmt: skip
    try:
        yield
    except unknown as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
        raise ConfigError(f"the memory of this model is not known without running it ({reason})") from error


def _batch(mode: DryMode, config: Any, rows: Rows, masked: bool) -> dict[str, Tensor]:
    """Inputs of those lengths: each sample is its picture, then text. Pictures are one merged patch high, and as long as they must be."""
    length = max(sum(sample.tokens for sample in row) for row in rows)
    ids, attended = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    grids: list[list[int]] = []
    vision = config.vision_config
    side = vision.spatial_merge_size
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            ids[r, start : start + sample.image] = config.image_token_id
            positions[r, start : start + sample.tokens] = torch.arange(sample.tokens)
            start += sample.tokens
            if sample.image:
                grids.append([1, side, sample.patches // side])
        attended[r, :start] = 1
    packed = any(len(row) > 1 for row in rows)
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    with mode.fake:
        pixels = torch.empty(sum(sample.patches for row in rows for sample in row), channels, dtype=torch.float32)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor(grids),
        # As the collators: a mask for padded samples, positions for packs.
        **({"position_ids": positions.expand(4, -1, -1)} if packed else {"attention_mask": attended} if masked else {}),
    }
