"""The ``arms`` section of an A/B file: an ordinary experiment, run several times with one thing changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from coordexp.config.load import build, differing_keys, merge, read_raw, to_plain, validated
from coordexp.config.schema import ExperimentConfig
from coordexp.errors import ConfigError

# What must be the same in every arm, or the arms cannot be compared.
SHARED: Final = (
    "name", "question", "seed", "output_dir", "data", "evaluate", "report", "train.max_steps", "train.num_train_epochs",
    "train.per_device_train_batch_size", "train.gradient_accumulation_steps",
)  # fmt: skip
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class ArmsOptions:
    """``variants`` maps the name of an arm to the sections it changes, as they would stand in the file; ``baseline`` is one of them.

    Every arm runs once per seed. ``warmup``: the sections that make the file's recipe a warm-up run; there is one a seed, and its arms
    go on from its weights.

    Raises:
        ValueError: fewer than two arms, a baseline that is none, a seed given twice, a name that is no name of a folder.
    """

    baseline: str
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    warmup: dict[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        if len(self.variants) < 2:
            raise ValueError(f"arms.variants: expected at least two arms, got {len(self.variants)}")
        for name in self.variants:
            if not _NAME.fullmatch(name):
                raise ValueError(f"arms.variants.{name}: expected a name of letters, digits, dots, dashes and underscores")
        if self.baseline not in self.variants:
            raise ValueError(f"arms.baseline: expected one of {', '.join(self.variants)}, got {self.baseline!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"arms.seeds: expected distinct whole numbers from 0, got {list(self.seeds)}")


@dataclass(frozen=True)
class AbPlan:
    """A checked A/B. ``arms``: configuration by name, without its seed; ``changed``: how each arm differs from the baseline, one
    ``key: baseline -> arm`` an entry."""

    name: str
    question: str | None
    baseline: str
    seeds: tuple[int, ...]
    output_dir: str
    arms: dict[str, ExperimentConfig]
    changed: dict[str, list[str]]
    warmup: ExperimentConfig | None


def with_seed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The configuration at a seed: order of samples, dropout, and the model's and the rows' start; the scenes stay the same."""
    model = replace(config.model, tiny=replace(config.model.tiny, seed=seed))
    return replace(config, seed=seed, model=model, vocab=replace(config.vocab, seed=seed))


def load_ab(path: Path, overrides: list[str] | None = None) -> AbPlan:
    """The A/B in ``path``; ``--set`` changes the part that all arms share, or ``arms`` itself.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    problems: list[str] = []
    raw = read_raw(path, overrides, problems)
    section = raw.pop("arms", None)
    if not isinstance(section, dict):
        raise ConfigError(f"{path.name}: arms: expected a section with baseline and variants: without it, coordexp run is the command")
    options = validated(section, ArmsOptions, problems, "arms.")
    base = build(raw, problems)
    if problems or options is None or base is None:
        raise ConfigError([f"{path.name}: {problem.replace('arms.arms.', 'arms.')}" for problem in problems])
    arms = {name: _arm(raw, name, variant or {}, problems) for name, variant in options.variants.items()}
    warmup = None if options.warmup is None else build(merge(raw, options.warmup), problems, "arms.warmup: ")
    built = {name: config for name, config in arms.items() if config is not None}
    if not problems:
        _distinct(built, problems)
    if problems:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    first = to_plain(built[options.baseline])
    changed = {name: differing_keys(first, to_plain(config)) for name, config in built.items()}
    return AbPlan(base.name, base.question, options.baseline, options.seeds, base.output_dir, built, changed, warmup)


def _arm(raw: dict[str, Any], name: str, variant: dict[str, Any], problems: list[str]) -> ExperimentConfig | None:
    """One arm's configuration; its faults, and what it must not change, go to ``problems``."""
    prefix = f"arms.variants.{name}: "
    config = build(merge(raw, variant), problems, prefix)
    for key in SHARED:
        node: Any = variant
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            problems.append(f"{prefix}{key}: is the same in every arm: set it outside of arms")
    return config


def _distinct(arms: dict[str, ExperimentConfig], problems: list[str]) -> None:
    seen: dict[str, str] = {}
    for name, config in arms.items():
        twin = seen.setdefault(repr(config), name)
        if twin != name:
            problems.append(f"arms.variants.{name}: is the same as {twin}: remove it or change something")
