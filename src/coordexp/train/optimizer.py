"""Optimizer groups: language model, vision tower, aligner and coordinate rows, each with its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from coordexp.errors import ConfigError
from coordexp.train.options import TrainOptions
from coordexp.vocab.adapters import part_of

# The first group's rate is what transformers logs as ``learning_rate``.
LABELS: Final = {
    "language_model": "language model",
    "vision": "vision tower",
    "aligner": "aligner",
    "coord_rows": "coordinate rows",
}


@dataclass(frozen=True, kw_only=True)
class GroupRates:
    """Learning rate and weight decay by part; ``None`` is the base rate."""

    base: float
    weight_decay: float
    vision: float | None = None
    aligner: float | None = None
    coord_rows: float | None = None

    @classmethod
    def of(cls, options: TrainOptions) -> GroupRates:
        """The rates of the ``train`` section."""
        return cls(
            base=options.learning_rate,
            weight_decay=options.weight_decay,
            vision=options.lr_vision,
            aligner=options.lr_aligner,
            coord_rows=options.lr_coord_rows,
        )

    def own(self, part: str) -> float | None:
        """The rate set for a part, if one is."""
        return {"vision": self.vision, "aligner": self.aligner, "coord_rows": self.coord_rows}.get(part)

    def rate(self, part: str) -> float:
        """The rate a part trains with."""
        own = self.own(part)
        return self.base if own is None else own


def parameter_groups(model: nn.Module, rates: GroupRates) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group of ``{"name", "params", "lr", "weight_decay"}``; empty ones are left out.

    A part has a group with and one without weight decay: vectors (norms, biases, the magnitudes of DoRA) and coordinate
    rows are not decayed. The rows of a full table cannot form a group: an adaptive step does not depend on the
    scale of a gradient, so scaling theirs would not be a learning rate.

    Raises:
        ConfigError: nothing is trainable, or a part has a rate of its own and nothing to train.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            decays = part != "coord_rows" and parameter.ndim > 1
            members.setdefault((part, decays), []).append(parameter)
    if not members:
        raise ConfigError("adapter.freeze: no parameter is left to train: freeze fewer parts")
    for part, label in LABELS.items():
        if rates.own(part) is not None and not any(found == part for found, _ in members):
            raise ConfigError(
                f"train.lr_{part}: the {label} has no trainable parameter of its own: remove it, or see adapter.* for what is trained"
            )
    return [
        {
            "name": part if decays else f"{part}.no_decay",
            "params": members[part, decays],
            "lr": rates.rate(part),
            "weight_decay": rates.weight_decay if decays else 0.0,
        }
        for part in LABELS
        for decays in (True, False)
        if (part, decays) in members
    ]


def keep_whole_states(model: nn.Module, optimizer: Any) -> None:
    """In an 8-bit optimizer of bitsandbytes the states of embeddings and coordinate rows stay in float32, as its authors advise for
    tables of which a step sees few rows. Before the first step."""
    from bitsandbytes.optim import GlobalOptimManager

    rows = [p for group in optimizer.param_groups if group["name"].startswith("coord_rows") for p in group["params"]]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    GlobalOptimManager.get_instance().override_config([*tables, *rows], "optim_bits", 32)


def describe_groups(model: nn.Module, rates: GroupRates) -> list[str]:
    """A line for each part: how many parameters it trains, of how many, and at which learning rate.

    Raises:
        ConfigError: see :func:`parameter_groups`.
    """
    groups = parameter_groups(model, rates)
    trained, total = dict.fromkeys(LABELS, 0), dict.fromkeys(LABELS, 0)
    for name, parameter in model.named_parameters():
        total[part_of(name)] += parameter.numel()
    for group in groups:
        trained[group["name"].removesuffix(".no_decay")] += sum(p.numel() for p in group["params"])
    lines = []
    for part, label in LABELS.items():
        if trained[part]:
            lines.append(f"{label}: {trained[part]:,} of {total[part]:,} parameters, learning rate {rates.rate(part):g}")
        elif total[part]:
            lines.append(f"{label}: frozen ({total[part]:,} parameters)")
    return lines
