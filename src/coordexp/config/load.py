"""Read an experiment file: ``extends``, ``--set``, and every fault at once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from coordexp.config.schema import ExperimentConfig
from coordexp.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_config(path: Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """The experiment in ``path`` with ``section.key=value`` overrides applied.

    Raises:
        ConfigError: everything that is wrong with it, one line each, with dotted paths.
    """
    raw = _read(path, ())
    problems: list[str] = []
    for override in overrides or []:
        _override(raw, override, problems)
    raw.setdefault("name", path.stem)
    raw.setdefault("data", {})
    problems += _unknown(raw, ExperimentConfig, "")
    known = _known(raw, ExperimentConfig)
    config: ExperimentConfig | None = None
    try:
        config = TypeAdapter(ExperimentConfig).validate_python(known)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
    if problems or config is None:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    return config


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends: expected a chain that ends, got a cycle")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such experiment file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a readable YAML file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {'nothing' if loaded is None else type(loaded).__name__}")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: expected one file name, got {base!r}")
    return _merge(_read(path.parent / base, (*chain, path.resolve())), loaded)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(raw: dict[str, Any], text: str, problems: list[str]) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problems.append(f"--set {text}: expected section.key=value")
        return
    node = raw
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            problems.append(f"--set {text}: {part} is a value, not a section")
            return
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        problems.append(f"--set {text}: the value is not valid YAML")


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _unknown(raw: dict[str, Any], cls: type, prefix: str) -> list[str]:
    hints, problems = _hints(cls), []
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(hints)}"
            problems.append(f"{prefix}{key}: unknown key: {hint}")
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            problems += _unknown(value, typing.cast(type, hints[key]), f"{prefix}{key}.")
    return problems


def _known(raw: dict[str, Any], cls: type) -> dict[str, Any]:
    """``raw`` without unknown keys, so that the other faults are found too; an empty section is a default one."""
    hints, kept = _hints(cls), {}
    for key, value in raw.items():
        if key in hints:
            section = dataclasses.is_dataclass(hints[key])
            value = {} if section and value is None else value
            kept[key] = _known(value, typing.cast(type, hints[key])) if section and isinstance(value, dict) else value
    return kept


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"])
    if error["type"] == "value_error":
        # Raised by a section's own check, which names its key already.
        return message.removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    got = error["input"]
    message = message[0].lower() + message[1:]
    message = message.removeprefix("input should be ")
    return f"{where}: expected {message}, got {got!r}"


def to_plain(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values of a configuration."""
    plain = TypeAdapter(ExperimentConfig).dump_python(config, mode="json")
    assert isinstance(plain, dict)
    return plain


class _Dumper(yaml.SafeDumper):
    """Floats in a form that YAML 1.1 reads back as floats."""


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if math.isfinite(value) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _float)


def dump_config(config: ExperimentConfig) -> str:
    """The resolved configuration as YAML; reading it gives an equal one."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_sha256(config: ExperimentConfig) -> str:
    """Hash of the resolved configuration."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()
