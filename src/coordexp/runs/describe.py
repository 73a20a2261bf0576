"""A run in words: set-up, provenance and times, from its configuration and manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordexp.errors import DataError
from coordexp.losses.objective import TERMS
from coordexp.runs.logs import RunLog


def setup_rows(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run at a glance, from the sections of the configuration that are there.

    Raises:
        DataError: a section with values of other types than a run's configuration has.
    """
    rows = []
    for label, section, describe in (
        ("Model", "model", _model_line),
        ("Data", "data", _data_line),
        ("Objective", "objective", _objective_line),
        ("Training", "train", _train_line),
        ("Decoding", "decode", _decode_line),
    ):
        values = config.get(section)
        try:
            text = describe(values) if isinstance(values, dict) else ""
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"config.yaml: {section}: expected the values of a run's configuration: {error}") from error
        if text:
            rows.append((label, text))
    return rows


def _model_line(section: Mapping[str, Any]) -> str:
    if section.get("path"):
        return f"from {section['path']}"
    tiny = section.get("tiny") or {}
    shape = [f"{tiny[key]} {label}" for key, label in (("num_layers", "layers"), ("hidden_size", "wide")) if key in tiny]
    return "tiny Qwen3-VL with random weights, made for the run" + (f" ({', '.join(shape)})" if shape else "")


def _data_line(section: Mapping[str, Any]) -> str:
    kind = section.get("kind")
    if kind == "synth":
        synth = section.get("synth") or {}
        sizes = ", ".join(f"{synth[split]} {split}" for split in ("train", "val", "test") if split in synth)
        return "synthetic scenes" + (f" of {synth['side']} px" if "side" in synth else "") + (f": {sizes}" if sizes else "")
    return " ".join(str(v) for v in (kind, section.get("source")) if v)


def _objective_line(section: Mapping[str, Any]) -> str:
    weights = [f"{section[term]:g} {term}" for term in TERMS if isinstance(section.get(term), (int, float)) and section[term]]
    soft = any(section.get(term) for term in ("soft_ce", "w1"))
    width = f"alpha {section['alpha']:g}" if section.get("alpha") else f"sigma {section['sigma']:g} bins" if "sigma" in section else ""
    target = f"; {section['target']} target, {width}" if soft and "target" in section else ""
    return " + ".join(weights) + target


def _train_line(section: Mapping[str, Any]) -> str:
    parts = [f"{section[key]:g} {unit}" for key, unit in (("max_steps", "steps"), ("num_train_epochs", "epochs")) if section.get(key)]
    if "per_device_train_batch_size" in section:
        parts.append(f"batch {section['per_device_train_batch_size']} × {section.get('gradient_accumulation_steps', 1)} accumulated")
    if "learning_rate" in section:
        schedule = f", {section['lr_scheduler_type']}" if "lr_scheduler_type" in section else ""
        parts.append(f"learning rate {section['learning_rate']:g}{schedule}")
    return "; ".join(parts)


def _decode_line(section: Mapping[str, Any]) -> str:
    return f"greedy, boxes read by {section['readout']}" if "readout" in section else ""


def provenance_rows(manifest: Mapping[str, Any], results: Mapping[str, Any], log: RunLog) -> list[tuple[str, str]]:
    """When, how, with which code, versions, machine and files: label and text."""
    rows: list[tuple[str, str]] = []
    for key, label in (("started", "Started"), ("finished", "Finished")):
        if manifest.get(key):
            rows.append((label, str(manifest[key])))
    if manifest.get("command"):
        rows.append(("Command", " ".join(map(str, manifest["command"]))))
    git = manifest.get("git")
    if isinstance(git, dict):
        rows.append(("Commit", f"{git.get('commit')}{' with uncommitted changes' if git.get('dirty') else ''}"))
    else:
        rows.append(("Commit", "not known"))
    if manifest.get("convention"):
        rows.append(("Coordinates", str(manifest["convention"])))
    rows += [(f"Version of {name}", str(version)) for name, version in (manifest.get("versions") or {}).items()]
    rows += _flatten("Hardware", manifest.get("hardware") or {})
    config_hash = manifest.get("config_sha256")
    if config_hash:
        rows.append(("SHA-256 of config.yaml", str(config_hash)))
        if log.header is not None and log.header.get("config_sha256") not in (None, config_hash):
            rows.append(("Warning", f"the log was written with another config: {log.header['config_sha256']}"))
    rows += [(f"SHA-256 of {name}", str(digest)) for name, digest in (manifest.get("files") or {}).items()]
    rows += _flatten("Evaluation", results.get("provenance") or {})
    return rows


def _flatten(prefix: str, value: Any) -> list[tuple[str, str]]:
    """Nested objects as rows, one a leaf."""
    if isinstance(value, dict):
        labels = {key: f"{prefix}: {key}".replace("_gib", ", GiB").replace("_", " ") for key in value}
        return [row for key, inner in value.items() for row in _flatten(labels[key], inner)]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [row for i, item in enumerate(value) for row in _flatten(f"{prefix} {i}", item)]
    return [] if value is None else [(prefix, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def stage_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Stage, time as text, and share of all stages."""
    stages = manifest.get("stages")
    written = stages.items() if isinstance(stages, dict) else ()
    seconds = {k: float(v) for k, v in written if isinstance(v, int | float) and 0 <= v < 1e9}
    total = sum(seconds.values())
    rows = [(name, duration(value), value / total if total else 0.0) for name, value in seconds.items()]
    return [*rows, ("total", duration(total), 1.0)] if len(rows) > 1 else rows


def duration(seconds: float) -> str:
    """Seconds as ``4.2 s``, ``3 min 20 s`` or ``1 h 02 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
