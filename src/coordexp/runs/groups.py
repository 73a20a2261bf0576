"""Which runs are compared: the arms of an A/B folder, or run directories named one by one; and whether they may be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from coordexp.data.yaml_text import parse_yaml
from coordexp.errors import ComparisonError, DataError
from coordexp.runs.manifest import MANIFEST, file_sha256, read_json_object, read_manifest

AB_FILE: Final = "ab.json"
# Differ between runs of one arm, or say where things lie; what stands there is compared, see :func:`identity`.
_NOT_VARIABLES: Final = ("name", "question", "seed", "output_dir", "model.path", "model.tiny.seed", "vocab.seed", "data.source", "report")


@dataclass(frozen=True)
class Run:
    """A finished run: ``config`` as plain nested values, ``results`` and ``manifest`` as written, ``records`` its test set."""

    path: Path
    seed: int
    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]
    records: Path

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"


@dataclass(frozen=True)
class Group:
    """An arm: its runs. ``changed``: what it changes in the configuration of the baseline; ``differs``: what else is not the same,
    see :func:`identity`; ``left_out``: runs that are not complete."""

    name: str
    runs: tuple[Run, ...]
    changed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    utilisation: dict[str, float] = field(default_factory=dict)
    differs: tuple[str, ...] = ()

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def repeats(self) -> tuple[tuple[int, int], ...]:
        """Of each run its seed, and how many runs of that seed stand before it: runs of two arms are paired by both."""
        return tuple((seed, self.seeds[:i].count(seed)) for i, seed in enumerate(self.seeds))


@dataclass(frozen=True)
class Comparison:
    """What is to be compared: the arms, the baseline first. ``cautions``: what makes it another comparison than one of recipes."""

    name: str
    question: str | None
    groups: tuple[Group, ...]
    cautions: tuple[str, ...] = ()


def read_groups(paths: Sequence[Path], baseline: str | None = None) -> Comparison:
    """The arms that ``paths`` mean: one A/B folder, or several run directories or folders of run directories (one a seed).

    The baseline is the one named, else that of the A/B, else the first path.

    Raises:
        DataError: a path without complete runs.
        ComparisonError: fewer than two arms, no such baseline, or runs that differ in what must be the same.
    """
    if len(paths) == 1 and (paths[0] / AB_FILE).is_file():
        found = _from_ab(paths[0])
    else:
        if len(paths) < 2:
            raise ComparisonError(
                f"{paths[0]}: expected at least two run directories, or one folder of a coordexp ab (with {AB_FILE}): name another one"
            )
        found = Comparison(" / ".join(_names(paths)), None, tuple(_from_folder(p, n) for p, n in zip(paths, _names(paths), strict=True)))
    names = [group.name for group in found.groups]
    if len(names) < 2:
        raise ComparisonError(f"{paths[0]}: expected at least two arms with complete runs, found {', '.join(names) or 'none'}")
    first = baseline or names[0]
    if first not in names:
        raise ComparisonError(f"--baseline {first}: expected one of {', '.join(names)}")
    ordered = sorted(found.groups, key=lambda group: group.name != first)
    check_alike([run for group in ordered for run in group.runs])
    for group in ordered:
        _refuse_copies(group)
    if not any(group.changed for group in ordered):
        ordered = [_with_changes(group, ordered[0]) for group in ordered]
    differs = [_differing(group, ordered[0]) for group in ordered]
    cautions = [
        f"{group.name} has another {what} than {ordered[0].name} ({there} -> {here}): a difference is not one of the recipe alone"
        for group, found_ in zip(ordered, differs, strict=True)
        for what, (there, here) in found_.items()
        if what in _ANOTHER_COMPARISON
    ]
    ordered = [
        replace(group, differs=tuple(f"{what}: {there} -> {here}" for what, (there, here) in found_.items()))
        for group, found_ in zip(ordered, differs, strict=True)
    ]
    return Comparison(found.name, found.question, tuple(ordered), tuple(cautions))


def _refuse_copies(group: Group) -> None:
    """Runs of one seed with the same predictions are one run and its copies, and say nothing about the spread of training."""
    first: dict[tuple[int, str], Path] = {}
    for run in group.runs:
        made = (run.seed, str(run.results["provenance"]["predictions_sha256"]))
        if made in first:
            raise ComparisonError(
                f"{run.path}: has the seed and the predictions of {first[made]}: a copy is no second run, name one of them only"
            )
        first[made] = run.path


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ComparisonError(f"{paths[0]}: named twice: name two different runs")


def _from_ab(root: Path) -> Comparison:
    content = read_json_object(root / AB_FILE)
    try:
        if content["schema"] != 1:
            raise DataError(f"{root / AB_FILE}: schema {content['schema']}: this version reads schema 1")
        groups = []
        for name, arm in content["arms"].items():
            places = [root / relative for relative in arm["runs"].values()]
            whole = [place for place in places if _state(place) == "complete"]
            left_out = tuple(f"{place}: {_state(place)}" for place in places if place not in whole)
            runs = tuple(read_run(place) for place in whole)
            if runs:
                groups.append(Group(name, runs, tuple(arm["changed"]), left_out, dict(arm["device_utilisation"])))
        ordered = sorted(groups, key=lambda group: group.name != content["baseline"])
        if groups and ordered[0].name != content["baseline"]:
            raise ComparisonError(f"{root}: the baseline {content['baseline']} has no complete run: finish it with coordexp ab")
        return Comparison(content["name"], content["question"], tuple(ordered))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / AB_FILE}: expected the file that coordexp ab writes: {type(error).__name__} {error}") from error


def _from_folder(path: Path, name: str) -> Group:
    if (path / MANIFEST).is_file():
        return Group(name, (read_run(path),))
    places = sorted(child for child in path.iterdir() if (child / MANIFEST).is_file()) if path.is_dir() else []
    if not places:
        raise DataError(f"{path}: expected a run directory, or a folder of them: found no {MANIFEST}")
    return Group(name, tuple(read_run(place) for place in places))


def _state(path: Path) -> str:
    return str(read_manifest(path).get("status")) if (path / MANIFEST).is_file() else "not begun"


def read_run(path: Path) -> Run:
    """A complete run.

    Raises:
        DataError: a run that is not complete, or has no predictions or results.
    """
    manifest = read_manifest(path)
    if manifest.get("status") != "complete" or not (path / "results.json").is_file():
        raise DataError(f"{path}: a run with status {manifest.get('status')!r}: finish it first (coordexp run ... --resume)")
    try:
        config = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'config.yaml'}: cannot be read: {' '.join(str(error).split())}") from error
    results = read_json_object(path / "results.json")
    try:
        used = path / "test-used.jsonl"
        records = used if used.is_file() else path / "data" / "test.jsonl"
        wanted = results["provenance"]["records_sha256"], results["provenance"]["predictions_sha256"]
        for file, sha in zip((records, path / "predictions.jsonl"), wanted, strict=True):
            if not file.is_file() or file_sha256(file) != sha:
                raise DataError(f"{file}: is not the file that results.json was made of: evaluate the run again")
        return Run(path, int(config["seed"]), config, manifest, results, records)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected a run directory of coordexp run: {type(error).__name__} {error}") from error


def signature(run: Run) -> dict[str, str]:
    """What must be the same for a difference between two runs to be one of the recipe, each as text."""
    contract_file = run.path / "model" / "coordexp.json"
    contract = read_json_object(contract_file) if contract_file.is_file() else {}
    data = run.config.get("data", {})
    provenance = run.results["provenance"]
    options = {key: value for key, value in provenance["options"].items() if key != "expect"}
    return {
        "the training records": _split_hash(run, "train"),
        "the validation records": _split_hash(run, "val"),
        "the evaluation set": str(provenance["records_sha256"]),
        "how many records are used": str({key: data.get(key) for key in ("max_train", "max_val", "max_test")}),
        "the codec": str(contract.get("codec", provenance["convention"])),
        # Contracts from before there was a choice of geometries are of boxes.
        "the answer's grammar": str({"geometries": ["bbox_2d"], **contract.get("grammar", {"order": data.get("order")})}),
        "the prompt": str(data.get("prompt")),
        "the evaluation's options": str(options),
    }


def _split_hash(run: Run, split: str) -> str:
    recorded = run.manifest.get("files", {}).get(f"data/{split}.jsonl")
    if recorded is not None:
        return str(recorded)
    file = run.path / "data" / f"{split}.jsonl"
    return file_sha256(file) if file.is_file() else hashlib.sha256(b"").hexdigest()


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs whose difference would not be one of the recipe.

    Raises:
        ComparisonError: one line for each run and thing in which it differs from the first.
    """
    first, problems = signature(runs[0]), []
    for run in runs[1:]:
        problems += [
            f"{run.path}: {what} differs from that of {runs[0].path} ({_short(first[what])} there, {_short(value)} here): "
            "runs are compared on the same data, codec, grammar and evaluation set only"
            for what, value in signature(run).items()
            if value != first[what]
        ]
    if problems:
        raise ComparisonError("\n".join(problems))


def _short(text: str) -> str:
    return text[:12] if len(text) == 64 and text.isalnum() else text if len(text) < 100 else text[:97] + "..."


# What of :func:`identity` makes a comparison another one than that of recipes.
_ANOTHER_COMPARISON: Final = ("base model", "tokenizer")


def identity(run: Run) -> dict[str, str]:
    """What a run was made of that no key of its configuration says: the model it began with and its tokenizer, files and versions."""
    found = {"base model": _model_text(run.path / "model" / "config.json")}
    tokenizer = run.path / "model" / "tokenizer.json"
    found["tokenizer"] = file_sha256(tokenizer)[:12] if tokenizer.is_file() else ""
    found["starting point"] = str(run.config.get("model", {}).get("path") or "")
    found |= {f"version of {name}": str(version) for name, version in (run.manifest.get("versions") or {}).items()}
    commit = run.manifest.get("git") or {}
    return found | {"commit": str(commit.get("commit", ""))[:12] + (" with changes" if commit.get("dirty") else "")}


def _model_text(path: Path) -> str:
    """Type and size of a model by its ``config.json``; empty without one."""
    if not path.is_file():
        return ""
    config = read_json_object(path)
    text = config.get("text_config", config)
    text = text if isinstance(text, dict) else {}
    sizes = [f"{name} {text[key]}" for key, name in (("hidden_size", "width"), ("num_hidden_layers", "layers")) if key in text]
    rest = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path", "dtype", "torch_dtype")}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:8]
    return ", ".join([str(config.get("model_type")), *sizes, digest])


def _differing(group: Group, baseline: Group) -> dict[str, tuple[str, str]]:
    """What of :func:`identity` is not the same in runs of the same seed (in any runs, where none is shared): there and here."""
    before = dict(zip(baseline.repeats, map(identity, baseline.runs), strict=True))
    now = dict(zip(group.repeats, map(identity, group.runs), strict=True))
    pairs = [(before[run], now[run]) for run in before if run in now] or [(a, b) for a in before.values() for b in now.values()]
    found: dict[str, tuple[str, str]] = {}
    for there, here in pairs:
        for what in there.keys() | here.keys():
            a, b = there.get(what, ""), here.get(what, "")
            if a != b and what not in found:
                found[what] = a or "not recorded", b or "not recorded"
    return dict(sorted(found.items()))


def _with_changes(group: Group, baseline: Group) -> Group:
    a, b = _flat(baseline.runs[0].config), _flat(group.runs[0].config)
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and not key.startswith(_NOT_VARIABLES))
    return Group(
        group.name, group.runs, tuple(f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in keys), group.left_out, group.utilisation
    )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
