"""Bind the objective into a causal model's forward, so that wrappers (DDP, FSDP) see it."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor

from coordexp.errors import ConfigError
from coordexp.losses.linear import CoordLossOutput, linear_coord_loss
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import Normalizer
from coordexp.vocab.coord_vocab import CoordVocab


def bind_coord_loss(model: Any, *, vocab: CoordVocab, objective: CoordObjective, impl: str = "auto") -> None:
    """Replace ``model.forward``, in place, by one that takes ``shift_labels`` and returns ``CoordLossOutput``.

    It runs the backbone, then :func:`linear_coord_loss` on the head's weight; the model's own loss is
    never called and no ``[B, T, V]`` logits are made. Without ``shift_labels`` it is the stock forward, so
    ``generate`` works. State-dict keys do not change.

    Raises:
        ConfigError: the coordinate tokens do not fit the model's table.
    """
    head = model.get_output_embeddings()
    if vocab.start + vocab.num_bins > head.weight.shape[0]:
        raise ConfigError(
            f"the tokenizer's coordinate ids end at {vocab.start + vocab.num_bins}, the model has {head.weight.shape[0]} rows: "
            "run `coordexp vocab extend` on this model"
        )
    stock = model.forward

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
            bias=head.bias,
            impl=impl,
        )
        return output

    # ``generate`` checks its arguments against the signature.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
