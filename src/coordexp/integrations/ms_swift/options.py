"""What the plugin is told: the YAML named by ``COORDEXP_CONFIG``. Imports neither torch nor ms-swift."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from coordexp.codec import CONVENTIONS
from coordexp.config.load import load_sections
from coordexp.config.schema import ExperimentConfig
from coordexp.errors import ConfigError
from coordexp.losses.objective import CoordObjective
from coordexp.train.options import TokenTypeMetrics

CONFIG_VARIABLE: Final = "COORDEXP_CONFIG"
# The value of ``--loss_type``.
LOSS_NAME: Final = "coordexp"


@dataclass(frozen=True, kw_only=True)
class SwiftOptions:
    """``convention`` of the data (None: that of the model folder's ``coordexp.json``, else norm999); ``impl`` of the loss."""

    convention: str | None = None
    impl: Literal["auto", "eager", "chunked", "triton"] = "auto"

    def __post_init__(self) -> None:
        if self.convention is not None and self.convention not in CONVENTIONS:
            raise ValueError(f"swift.convention: expected one of {', '.join(CONVENTIONS)}, got {self.convention!r}")


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """The sections that the plugin reads. ``objective`` and ``token_type_metrics`` are those of an experiment."""

    objective: CoordObjective = field(default_factory=CoordObjective)
    token_type_metrics: TokenTypeMetrics = field(default_factory=TokenTypeMetrics)
    swift: SwiftOptions = field(default_factory=SwiftOptions)


@dataclass(frozen=True)
class ConfigSource:
    """The configuration, the file it came from (None: defaults) and the sections of that file that ms-swift decides instead."""

    config: PluginConfig
    path: Path | None
    unused: tuple[str, ...] = ()


def read_config(environment: Mapping[str, str] | None = None) -> ConfigSource:
    """The configuration that ``COORDEXP_CONFIG`` names in ``environment`` (None: this process's); the defaults where it is not set.

    The file may be an experiment: its other sections are checked for unknown keys and named as unused.

    Raises:
        ConfigError: every fault of the file, one line each, with the nearest legal name.
    """
    name = (os.environ if environment is None else environment).get(CONFIG_VARIABLE, "")
    if not name:
        return ConfigSource(PluginConfig(), None)
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{CONFIG_VARIABLE}: expected a YAML file, got nothing at {path}: correct the variable or unset it")
    config, unused = load_sections(path, PluginConfig, beside=ExperimentConfig)
    return ConfigSource(config, path, unused)
