"""The objective inside a model's forward pass: computed by the head module, where wrappers have gathered its weight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coordexp.data.targets import Targets
from coordexp.errors import ConfigError
from coordexp.losses.linear import CoordLossOutput, UngatheredWeight, linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.train.options import TokenTypeMetrics
from coordexp.vocab.adapters import Head, head_layers, head_of
from coordexp.vocab.coord_vocab import CoordVocab


def bind_coord_loss(
    model: Any, *, vocab: CoordVocab, objective: CoordObjective, impl: str = "auto", metrics: TokenTypeMetrics | None = None
) -> None:
    """Let ``model(..., targets=Targets)`` return ``(loss, _Opaque)``; :func:`coord_loss` calls it so.

    The stock forward runs to the head. With targets at hand, the forward of the head module itself computes
    :func:`linear_coord_loss` in the place of logits: every hook of a wrapper on that module (FSDP2, ZeRO-3, offloading) has run then,
    so the weight it reads is whole, and the model's own loss is never called. Without targets everything is stock, ``generate`` included.
    Of a ``PeftModel`` the base causal model is bound, and trained coordinate rows are handed over beside the frozen weight.
    Binding again replaces the objective.

    Raises:
        ConfigError: the coordinate tokens do not fit the model's table, or the head is adapted in a way the loss cannot see.
    """
    causal = unwrapped(model)
    layer, linear = head_layers(causal)
    # Of the module, not of its weight, which ZeRO-3 may have emptied already.
    rows = linear.out_features
    if vocab.start + vocab.num_bins > rows:
        raise ConfigError(
            f"the tokenizer's coordinate ids end at {vocab.start + vocab.num_bins}, the model has {rows} rows: "
            "run `coordexp vocab extend` on this model"
        )
    shown = metrics or TokenTypeMetrics()
    top5 = shown.enabled and shown.log_top5
    settings = _Settings(vocab=vocab, objective=objective, impl=impl, top5=top5, diagnostics=shown.enabled)
    bound = linear.__dict__.get("forward")
    if isinstance(bound, _LossHead):
        bound.settings = settings
        return
    head_of(layer, vocab)
    head = _LossHead(linear, layer, settings)
    # First of all, before hooks that let through only what they know.
    model.register_forward_pre_hook(head.take, with_kwargs=True, prepend=True)
    model.register_forward_hook(head.give, always_call=True)
    causal.register_forward_pre_hook(head.no_cache, with_kwargs=True)


def coord_loss(model: Any, inputs: Mapping[str, Any]) -> CoordLossOutput:
    """Loss, sums and diagnostics of a batch (its ``targets`` among ``inputs``) by a bound model, wrapped or not.

    The loss is the one that the head computed, in float32 or wider; what wrappers made of theirs takes part in the graph only.
    """
    returned, opaque = model(**inputs)
    output: CoordLossOutput = opaque.output
    if not returned.requires_grad:
        return output
    loss: Tensor = _Through.apply(output.loss, returned)  # type: ignore[no-untyped-call]
    return replace(output, loss=loss)


class _Through(torch.autograd.Function):
    """``loss``, whose gradient also runs, as zeros, through the tensor that the wrappers returned.

    FSDP2 casts what a module returns to bfloat16, the loss too, and starts its part of the backward at the cast tensor.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, returned: Tensor) -> Tensor:
        """The loss itself."""
        ctx.like = returned
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The loss's gradient to the loss alone."""
        return grad_output, torch.zeros_like(ctx.like)


class _Opaque:
    """Holds an output. Like :class:`Targets` no dataclass, mapping or sequence: nobody looks inside, so nothing is cast."""

    __slots__ = ("output",)

    def __init__(self, output: CoordLossOutput) -> None:
        self.output = output


@dataclass(frozen=True)
class _Settings:
    vocab: CoordVocab
    objective: CoordObjective
    impl: str
    top5: bool
    diagnostics: bool


class _LossHead:
    """The forward of the head's linear module. ``layer`` is the head as the model calls it: the module itself, or PEFT's around it."""

    def __init__(self, linear: nn.Linear, layer: nn.Module, settings: _Settings) -> None:
        self.settings = settings
        self.linear = linear
        self.stock: Callable[[Tensor], Tensor] = linear.forward
        self.targets: Targets | None = None
        self.output: CoordLossOutput | None = None
        linear.forward = self  # type: ignore[method-assign, assignment]
        self.layer = layer
        if layer is not linear:
            self.stock_layer = layer.forward
            layer.forward = self.skip_rows  # type: ignore[method-assign]

    def take(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the model's forward: keep the targets, which no module needs but the head."""
        if "targets" not in kwargs:
            return None
        self.targets = kwargs["targets"]
        return args, {k: v for k, v in kwargs.items() if k != "targets"}

    def no_cache(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """With a cache Qwen-VL lets the samples of a pack see each other, and holds keys and values that nobody reads."""
        return None if self.targets is None else (args, {**kwargs, "use_cache": False})

    def give(self, module: nn.Module, args: Any, output: Any) -> tuple[Tensor, _Opaque] | None:
        """After it, also after an error: the loss in the place of logits."""
        if self.targets is None:
            return None
        made, self.targets, self.output = self.output, None, None
        # None after an error, which goes its way.
        return None if made is None else (output.logits, _Opaque(made))

    def skip_rows(self, hidden: Tensor) -> Tensor:
        """PEFT's layer would build a merged table ``[V, D]``: with targets the linear module is called in its place."""
        outcome: Tensor = self.stock_layer(hidden) if self.targets is None else self.linear(hidden)
        return outcome

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.targets is None:
            return self.stock(hidden)
        try:
            # The rows are read every time: loading a checkpoint may replace them.
            self.output = self._loss(hidden, head_of(self.layer, self.settings.vocab), self.targets)
        except UngatheredWeight as error:
            raise ConfigError(f"the output head: {error}: this wrapper keeps it sharded in its forward; train with DDP or FSDP2") from error
        # Of the shape of logits, whatever the model does with them.
        return self.output.loss.reshape(1, 1, 1)

    def _loss(self, hidden: Tensor, head: Head, targets: Targets) -> CoordLossOutput:
        settings = self.settings
        return linear_coord_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            targets.labels.flatten(),
            coord_start=settings.vocab.start,
            num_bins=settings.vocab.num_bins,
            objective=settings.objective,
            centers=targets.centers.flatten(),
            extents=targets.extents.flatten(),
            normalizer=targets.normalizer,
            coord_weight=head.coord_weight,
            bias=head.bias,
            impl=settings.impl,
            top5=settings.top5,
            diagnostics=settings.diagnostics,
        )


def unwrapped(model: Any) -> Any:
    """The causal model inside a ``PeftModel``, or the model itself."""
    # A PeftModel exists only where peft has been imported; importing it for every plain model costs seconds.
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model
