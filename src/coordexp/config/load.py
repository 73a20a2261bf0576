"""Read an experiment file: ``extends``, ``--set``, and every fault at once."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from coordexp.config.schema import ExperimentConfig
from coordexp.data.yaml_text import PlainLoader, parse_yaml
from coordexp.errors import ConfigError
from coordexp.train.options import TrainOptions
from coordexp.train.refused import why_refused

T = typing.TypeVar("T")

# Keys that somebody may expect in a section, and what its error says.
_REFUSED: typing.Final[dict[type, dict[str, str]]] = {TrainOptions: why_refused()}

# YAML 1.1 reads ``1e-3`` and ``1e3`` as text; in an experiment they are numbers.
_EXPONENT = re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"
# YAML 1.1 reads ``no`` as false, and ``eval_strategy: no`` would not be what it says.
_BOOL_TAG = "tag:yaml.org,2002:bool"
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


class _StrictLoader(PlainLoader):
    """YAML without duplicate keys, and with two truth values, ``true`` and ``false``."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL_TAG]
    for first, resolvers in PlainLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE_TAG:
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if not isinstance(key, typing.Hashable):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, list("-+0123456789"))  # type: ignore[no-untyped-call]
_StrictLoader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tTfF"))  # type: ignore[no-untyped-call]


def _parse(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: not YAML, or YAML that this configuration does not read; the message holds the line.
    """
    return parse_yaml(text, _StrictLoader)


def load_config(path: Path, overrides: list[str] | None = None) -> ExperimentConfig:
    """The experiment in ``path`` with ``section.key=value`` overrides applied.

    Raises:
        ConfigError: everything that is wrong with it, one line each, with dotted paths; or an A/B file.
    """
    problems: list[str] = []
    raw = read_raw(path, overrides, problems)
    if "arms" in raw:
        raise ConfigError(f"{path.name}: arms: this file is an A/B of several runs: run it with coordexp ab")
    config = build(raw, problems)
    if problems or config is None:
        raise ConfigError([_blame(problem, path.name, overrides or []) for problem in problems])
    return config


def read_raw(path: Path, overrides: list[str] | None, problems: list[str]) -> dict[str, Any]:
    """The sections of a file as they stand, ``extends`` and overrides applied; faults of overrides go to ``problems``.

    Raises:
        ConfigError: a file that cannot be read.
    """
    raw = _read(path, ())
    for override in overrides or []:
        _override(raw, override, problems)
    raw.setdefault("name", path.stem)
    raw.setdefault("data", {})
    return raw


def build(raw: dict[str, Any], problems: list[str], prefix: str = "") -> ExperimentConfig | None:
    """The typed configuration; its faults go to ``problems``, each behind ``prefix``, and the result is then None or partial."""
    return validated(raw, ExperimentConfig, problems, prefix)


def validated(raw: dict[str, Any], cls: type[T], problems: list[str], prefix: str = "") -> T | None:
    """``raw`` as the dataclass ``cls``, strictly; every fault goes to ``problems`` with its dotted path."""
    found: list[str] = []
    known = _known(raw, cls, "", found)
    config: T | None = None
    try:
        config = TypeAdapter(cls).validate_python(known)
    except ValidationError as error:
        found += [_describe(item) for item in error.errors()]
    problems += [prefix + problem for problem in found]
    return config


def load_sections(path: Path, wanted: type[T], *, beside: type) -> tuple[T, tuple[str, ...]]:
    """The sections of dataclass ``wanted`` in ``path``, and the names of its other sections, which those of ``beside`` may be.

    The keys of the others are checked, their values are not.

    Raises:
        ConfigError: everything that is wrong with it, one line each, with dotted paths.
    """
    raw = _read(path, ())
    others = {key: value for key, value in raw.items() if key in _hints(beside) and key not in _hints(wanted)}
    problems: list[str] = []
    known = _known({key: value for key, value in raw.items() if key not in others}, wanted, "", problems)
    _known(others, beside, "", problems)
    found: T | None = None
    try:
        found = TypeAdapter(wanted).validate_python(known)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
    if problems or found is None:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    return found, tuple(others)


def _blame(problem: str, file: str, overrides: list[str]) -> str:
    """A fault with where it was written: the last ``--set`` of its key, around it or inside it, else the file."""
    if problem.startswith("--set "):
        return problem
    key, _, rest = problem.partition(": ")
    for override in reversed(overrides):
        name = override.partition("=")[0].strip()
        if key == name:
            return f"--set {name}: {rest}"
        if key.startswith(f"{name}.") or name.startswith(f"{key}."):
            return f"--set {name}: {problem}"
    return f"{file}: {problem}"


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends: expected a chain that ends, got a cycle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        wanted_by = f" (extends: of {chain[-1].name})" if chain else ""
        raise ConfigError(f"{path}: no such experiment file{wanted_by}") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable YAML file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a YAML file in UTF-8") from None
    try:
        loaded = _parse(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {'nothing' if loaded is None else type(loaded).__name__}")
    base = loaded.pop("extends", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: expected one file name, got {base!r}")
    return merge(_read(path.parent / base, (*chain, path.resolve())), loaded)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``, section by section."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(raw: dict[str, Any], text: str, problems: list[str]) -> None:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        problems.append(f"--set {text}: expected section.key=value")
        return
    node = raw
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}  # a section that is missing or empty
        child = node[part]
        if not isinstance(child, dict):
            problems.append(f"--set {text}: {part} is a value, not a section")
            return
        node = child
    try:
        node[parts[-1]] = _parse(value)
    except ValueError as error:
        problems.append(f"--set {text}: the value is not valid YAML: {error}")


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _known(raw: dict[str, Any], cls: type, prefix: str, problems: list[str]) -> dict[str, Any]:
    """``raw`` without unknown keys and mistaken numbers, which go to ``problems``, so that the other faults are found too.

    An empty section is one of defaults.
    """
    hints, kept = _hints(cls), {}
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(hints)}"
            problems.append(f"{prefix}{key}: {_REFUSED.get(cls, {}).get(key) or f'unknown key: {hint}'}")
        elif dataclasses.is_dataclass(hints[key]) and (value is None or isinstance(value, dict)):
            kept[key] = _known(value or {}, typing.cast(type, hints[key]), f"{prefix}{key}.", problems)
        elif (expected := _not_a_number(value, hints[key])) is not None:
            problems.append(f"{prefix}{key}: expected {expected}, got {value!r}")
        else:
            kept[key] = value
    return kept


def _not_a_number(value: Any, hint: Any) -> str | None:
    """What a numeric or on/off key expects, if pydantic would read another kind of value as one (``true`` as 1, ``1`` as true)."""
    kinds = set(typing.get_args(hint) or (hint,))
    if value is None and type(None) in kinds:
        return None
    kinds -= {type(None)}
    if kinds == {bool}:
        return None if isinstance(value, bool) else "true or false"
    if kinds <= {int, float} and isinstance(value, bool | str):
        return "a whole number" if kinds == {int} else "a number"
    return None


# pydantic's own words name Python types; these name what stands in a file.
_EXPECTED = {
    "dataclass_type": "a section of keys",
    "dict_type": "a mapping of keys",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
}


def _describe(error: Any) -> str:
    # A key that takes text or a list is named by pydantic with the kind it tried: no part of the path.
    where = ".".join(str(part) for part in error["loc"] if part not in ("str", "bool") and "[" not in str(part))
    message = str(error["msg"])
    if error["type"] == "value_error":
        # Raised by a section's own check, which names its key already.
        return message.removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{where}: required, but missing"
    message = message[0].lower() + message[1:]
    return f"{where}: expected {_EXPECTED.get(error['type'], message.removeprefix('input should be '))}, got {error['input']!r}"


def to_plain(config: ExperimentConfig) -> dict[str, Any]:
    """Nested plain values of a configuration."""
    plain = TypeAdapter(ExperimentConfig).dump_python(config, mode="json")
    assert isinstance(plain, dict)
    return plain


def differing_keys(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys at which two plain configurations differ, as ``key: old -> new``."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return found


class _Dumper(yaml.SafeDumper):
    """Floats in a form that YAML 1.1 reads back as floats; text that the loader would take for one is quoted."""


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if math.isfinite(value) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar(_FLOAT_TAG, text)


_Dumper.add_representer(float, _float)
_Dumper.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, list("-+0123456789"))  # type: ignore[no-untyped-call]


def dump_config(config: ExperimentConfig) -> str:
    """The resolved configuration as YAML; reading it gives an equal one."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)


def config_sha256(config: ExperimentConfig) -> str:
    """Hash of the resolved configuration."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()
