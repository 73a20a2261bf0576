"""One self-contained ``report.html`` from a run directory. Reads files only; needs no model and asks no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import jinja2
import yaml

from coordexp.data.records import Record, read_records
from coordexp.data.staging import atomic_text
from coordexp.errors import CoordexpError, DataError
from coordexp.evaluate.predictions import Prediction, read_predictions
from coordexp.losses.objective import TERMS
from coordexp.runs import charts, tables
from coordexp.runs.logs import RunLog, read_log
from coordexp.runs.manifest import MANIFEST, read_json_object, read_manifest
from coordexp.runs.options import ReportOptions
from coordexp.runs.pictures import MANY_OBJECTS, make_pictures

T = TypeVar("T")

MIN_IMAGES: Final = 8
_STATUS: Final = {
    "complete": "The run finished.",
    "running": "The run has not finished, or was killed: numbers below may be missing.",
    "failed": "The run stopped with an error: numbers below may be missing.",
    "interrupted": "The run was interrupted: numbers below may be missing.",
}


def write_report(run_dir: Path, options: ReportOptions, *, out: Path | None = None) -> Path:
    """Write the report of a run to ``out`` (default: ``report.html`` of the run directory) and return its path.

    A part that is missing or cannot be read becomes a sentence in the report. At least 8 pictures are shown
    where the test set has them.

    Raises:
        DataError: ``run_dir`` is not a directory.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: expected a run directory, found none")
    target = out or run_dir / "report.html"
    with atomic_text(target) as file:
        file.write(_render(_content(run_dir, options)))
    return target


def _render(content: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coordexp.runs"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(content) + "\n"


class _Parts:
    """Loads the parts of a run; what cannot be loaded becomes a line in ``problems``."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.problems: list[str] = []

    def load(self, relative: str, reader: Callable[[Path], T], default: T, missing: str | None) -> T:
        """What ``reader`` makes of the file, or ``default`` with a problem noted (``missing`` for a file not there)."""
        path = self.run_dir / relative
        if not path.exists():
            if missing:
                self.problems.append(missing)
            return default
        try:
            return reader(path)
        except CoordexpError as error:
            self.problems.append(self.shorten(str(error)))
            return default

    def shorten(self, text: str) -> str:
        """A message without the folder of the run: the report may be shown elsewhere."""
        for prefix in (str(self.run_dir.resolve()), str(self.run_dir)):
            if prefix not in (".", ""):
                text = text.replace(prefix + "/", "")
        return text


def _content(run_dir: Path, options: ReportOptions) -> dict[str, Any]:
    parts = _Parts(run_dir)
    empty: dict[str, Any] = {}
    manifest = parts.load(MANIFEST, lambda p: read_manifest(p.parent), empty, "manifest.json is missing: no status, no provenance.")
    config_text = parts.load("config.yaml", _read_text, None, "config.yaml is missing.")
    log = parts.load("logging.jsonl", read_log, RunLog(None, [], []), None)
    results = parts.load("results.json", read_json_object, empty, None)
    unpredicted: dict[str, Prediction] = {}
    predictions = parts.load("predictions.jsonl", _predictions, unpredicted, "predictions.jsonl is missing: no predicted boxes are shown.")
    audit = parts.load("audit.json", read_json_object, empty, None)
    if audit and (run_dir / "logging.jsonl").is_file() and _older(run_dir / "audit.json", run_dir / "logging.jsonl"):
        parts.problems.append("audit.json is older than logging.jsonl: its findings may be out of date; coordexp audit writes it again.")
    config = _config(config_text, parts)
    count = max(options.images, MIN_IMAGES)
    none: list[Record] = []
    records = parts.load("data/test.jsonl", lambda p: _records(p, count), none, None)
    pictures, unopened = make_pictures(records, predictions)
    metrics = tables.Metrics(results)
    decode = config.get("decode")
    status = str(manifest.get("status", "unknown"))
    drawn = _charts(log, parts)
    dropped = sum(chart.dropped for group in drawn.values() for chart in group["charts"])
    if dropped:
        parts.problems.append(f"logging.jsonl: {dropped} values that are not finite are gaps in the charts.")
    notes = [*map(str, manifest.get("notes", [])), *log.notes, *parts.problems]
    if pictures:
        notes += [f"picture left out: {parts.shorten(line)}" for line in unopened]
    return {
        "title": options.title or manifest.get("name") or run_dir.resolve().name,
        "status": status,
        "status_text": _STATUS.get(status, "The state of the run is unknown."),
        "stage": manifest.get("stage"),
        "manifest": manifest,
        "setup": _setup(config),
        "tiles": tables.tiles(metrics),
        "has_results": bool(results),
        "counts": {k: v for k, v in (results.get("counts") or {}).items() if isinstance(v, (int, float))},
        "charts": drawn,
        "tables": tables.metric_tables(metrics, decode.get("readout") if isinstance(decode, dict) else None),
        "readouts": tables.readout_table(metrics),
        "every_metric": tables.every_metric(metrics),
        "pictures": pictures,
        "pictures_missing": _no_pictures(records, unopened),
        "many_objects": MANY_OBJECTS,
        "config": config_text,
        "provenance": _provenance(manifest, results, log),
        "stages": _stages(manifest),
        "audit": _audit(audit),
        "notes": list(dict.fromkeys(notes)),
    }


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def _config(text: str | None, parts: _Parts) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        parts.problems.append(f"config.yaml: not valid YAML: {str(error).splitlines()[0]}")
        return {}
    return content if isinstance(content, dict) else {}


def _records(path: Path, count: int) -> list[Record]:
    return list(read_records(path, on_invalid="skip", limit=count, check_images=False).records)


def _predictions(path: Path) -> dict[str, Prediction]:
    return {row.image_id: row for row in read_predictions(path)}


def _no_pictures(records: list[Record], unopened: list[str]) -> str:
    if not records:
        return "The run directory has no readable test records (data/test.jsonl), so no pictures are shown."
    sentence = "The image files of the test records are not there or cannot be opened, so no pictures are shown."
    return f"{sentence} The first: {unopened[0]}" if unopened else sentence


def _older(path: Path, than: Path) -> bool:
    return path.stat().st_mtime < than.stat().st_mtime


def _charts(log: RunLog, parts: _Parts) -> dict[str, dict[str, Any]]:
    drawn: dict[str, dict[str, Any]] = {}
    for name, panels in (("loss", charts.LOSS_PANELS), ("coord", charts.COORD_PANELS)):
        try:
            made, absent = charts.draw_panels(log, panels)
        except DataError as error:
            parts.problems.append(f"logging.jsonl: {error}")
            made, absent = [], list(panels)
        drawn[name] = {
            "charts": made,
            "absent": ", ".join(panel.title for panel in absent),
            "has_eval": any(chart.last_eval is not None for chart in made),
            "has_train": any(chart.last_train is not None for chart in made),
        }
    return drawn


def _setup(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run at a glance, from the sections of the configuration that are there."""
    rows = []
    for label, section, describe in (
        ("Model", "model", _model_line),
        ("Data", "data", _data_line),
        ("Objective", "objective", _objective_line),
        ("Training", "train", _train_line),
        ("Decoding", "decode", _decode_line),
    ):
        values = config.get(section)
        text = describe(values) if isinstance(values, dict) else ""
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
    parts = [f"{section['max_steps']} steps"] if "max_steps" in section else []
    if "per_device_batch_size" in section:
        parts.append(f"batch {section['per_device_batch_size']} × {section.get('gradient_accumulation_steps', 1)} accumulated")
    if "learning_rate" in section:
        parts.append(f"learning rate {section['learning_rate']:g}" + (f", {section['scheduler']}" if "scheduler" in section else ""))
    return "; ".join(parts)


def _decode_line(section: Mapping[str, Any]) -> str:
    return f"greedy, boxes read by {section['readout']}" if "readout" in section else ""


def _provenance(manifest: Mapping[str, Any], results: Mapping[str, Any], log: RunLog) -> list[tuple[str, str]]:
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


def _stages(manifest: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Stage, time as text, and share of all stages."""
    seconds = {k: float(v) for k, v in (manifest.get("stages") or {}).items() if isinstance(v, (int, float))}
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


def _audit(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Findings of ``audit.json`` and the number of rules with another outcome, or None without an audit."""
    rules = audit.get("rules")
    if not isinstance(rules, list):
        return None
    rows = [rule for rule in rules if isinstance(rule, dict)]
    shown = ("code", "title", "severity", "advice")
    found = [{key: str(rule.get(key) or "") for key in shown} for rule in rows if rule.get("outcome") == "finding"]
    return {
        "findings": found,
        "passed": sum(rule.get("outcome") == "passed" for rule in rows),
        "not_applicable": sum(rule.get("outcome") == "not_applicable" for rule in rows),
    }
