"""Bind the objective into a causal model's forward, so that wrappers (DDP, FSDP) see it."""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.losses.linear import CoordLossOutput, linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import Normalizer
from coordexp.train.options import TokenTypeMetrics
from coordexp.vocab.adapters import head_of
from coordexp.vocab.coord_vocab import CoordVocab


def bind_coord_loss(
    model: Any, *, vocab: CoordVocab, objective: CoordObjective, impl: str = "auto", metrics: TokenTypeMetrics | None = None
) -> None:
    """Replace the forward, in place, by one that takes ``shift_labels`` and returns ``CoordLossOutput``.

    It runs the backbone, then :func:`linear_coord_loss` on the head's weight; the model's own loss is
    never called and no ``[B, T, V]`` logits are made. Without ``shift_labels`` it is the stock forward, with its
    signature, which ``generate`` looks at. State-dict keys do not change. Of a ``PeftModel`` the base causal model is bound,
    and the head's coordinate rows are handed over as trained, beside its frozen weight.

    Raises:
        ConfigError: the coordinate tokens do not fit the model's table, or the head is adapted in a way the loss cannot see.
    """
    shown = metrics or TokenTypeMetrics()
    causal = unwrapped(model)
    rows = head_of(causal, vocab).weight.shape[0]
    if vocab.start + vocab.num_bins > rows:
        raise ConfigError(
            f"the tokenizer's coordinate ids end at {vocab.start + vocab.num_bins}, the model has {rows} rows: "
            "run `coordexp vocab extend` on this model"
        )
    stock = causal.forward

    def forward(
        self: Any,
        *args: Any,
        shift_labels: Tensor | None = None,
        coord_centers: Tensor | None = None,
        coord_extents: Tensor | None = None,
        normalizer: Normalizer | None = None,
        **inputs: Any,
    ) -> Any:
        if shift_labels is None:
            return stock(*args, **inputs)
        hidden = self.model(*args, **inputs, use_cache=False)[0]
        # Read every time: loading a checkpoint may replace the rows.
        head = head_of(self, vocab)
        output: CoordLossOutput = linear_coord_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            shift_labels.reshape(-1),
            coord_start=vocab.start,
            num_bins=vocab.num_bins,
            objective=objective,
            centers=None if coord_centers is None else coord_centers.reshape(-1),
            extents=None if coord_extents is None else coord_extents.reshape(-1),
            normalizer=normalizer,
            coord_weight=head.coord_weight,
            bias=head.bias,
            impl=impl,
            top5=shown.enabled and shown.log_top5,
            diagnostics=shown.enabled,
        )
        return output

    # ``generate`` drops or refuses arguments by the signature; a bound method's shows one parameter less.
    signature = inspect.signature(stock)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
    causal.forward = types.MethodType(forward, causal)


def unwrapped(model: Any) -> Any:
    """The causal model inside a ``PeftModel``, or the model itself."""
    # A PeftModel exists only where peft has been imported; importing it for every plain model costs seconds.
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model
