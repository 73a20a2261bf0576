"""The audit: reads a log and what stands beside it, applies every rule, and writes the answer down."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordexp.data.staging import atomic_text
from coordexp.data.yaml_text import parse_yaml
from coordexp.errors import DataError
from coordexp.runs.logs import find_log, read_log
from coordexp.runs.manifest import MANIFEST, read_json_object, read_manifest
from coordexp.runs.pages import render_page
from coordexp.runs.rules.base import DOCS, Rule, Subject, Value, Verdict
from coordexp.runs.rules.registry import RULES

AUDIT: Final = "audit.json"
_SHOWN_KEYS: Final = 8
_RANK: Final = {"severe": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class Judged:
    """A rule and its verdict."""

    rule: Rule
    verdict: Verdict

    @property
    def severity(self) -> str:
        """The finding's severity, or the rule's own."""
        return self.verdict.severity or self.rule.severity

    def row(self) -> dict[str, Any]:
        """One entry of ``rules``."""
        return {
            "code": self.rule.code,
            "title": self.rule.title,
            "outcome": self.verdict.outcome,
            "severity": self.severity,
            "evidence": [item.row() for item in self.verdict.evidence],
            "advice": self.rule.advice,
        }


@dataclass(frozen=True)
class Audit:
    """``source`` is the kind of log; ``rows`` counts training and evaluation rows; ``notes`` are the reader's, ``keys`` the log's."""

    name: str
    source: str
    rows: tuple[int, int]
    notes: tuple[str, ...]
    judged: tuple[Judged, ...]
    keys: frozenset[str] = frozenset()

    def of(self, outcome: str) -> list[Judged]:
        """The rules with an outcome, findings with the worst first."""
        found = [j for j in self.judged if j.verdict.outcome == outcome]
        return sorted(found, key=lambda j: _RANK[j.severity]) if outcome == "finding" else found

    def missing(self) -> str:
        """One line: how many rules could not apply, and which keys of theirs the log lacks, the most wanted first."""
        unused = self.of("not_applicable")
        wanted = Counter(key for j in unused for key in j.rule.keys if key not in self.keys)
        names = [key for key, _ in wanted.most_common(_SHOWN_KEYS)]
        more = f" and {len(wanted) - len(names)} more" if len(wanted) > len(names) else ""
        advice = f"; to let them judge, log {', '.join(names)}{more}" if names else ""
        return f"{len(unused)} of {len(self.judged)} rules could not apply{advice}: {DOCS}"

    @property
    def severe(self) -> bool:
        """Whether any finding is severe."""
        return any(j.severity == "severe" for j in self.of("finding"))

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """``{"rules": [{code, title, outcome, severity, evidence, advice}]}``, strict JSON."""
        return {"rules": [j.row() for j in self.judged]}

    def text(self) -> str:
        """:meth:`as_json` as text."""
        return json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def audit(path: Path, rules: Iterable[Rule] = RULES) -> Audit:
    """Audit a log, or the log of a folder, with the configuration, manifest, results and arguments beside it.

    Raises:
        DataError: no log, or a file that cannot be read, with its place.
    """
    subject = load(path)
    if not subject.train.rows and not subject.eval.rows:
        raise DataError(f"{find_log(path)}: no training or evaluation rows to audit")
    log = subject.log
    keys = frozenset([*subject.train.keys, *subject.eval.keys])
    return Audit(path.resolve().name, log.source, (len(log.train), len(log.eval)), log.notes, judge(subject, rules), keys)


def judge(subject: Subject, rules: Iterable[Rule] = RULES) -> tuple[Judged, ...]:
    """Every rule's verdict. Any log is legal input: absurd values overflow to infinity, which no rule takes for sound."""
    with np.errstate(all="ignore"):
        return tuple(Judged(rule, rule.check(subject)) for rule in rules)


def load(path: Path) -> Subject:
    """The log of ``path`` and the files beside it.

    Raises:
        DataError: as for :func:`audit`.
    """
    log = read_log(path)
    found = find_log(path)
    # TensorBoard files lie in a folder of their own; only a log or a folder given as such has neighbours.
    folder = path if path.is_dir() else found.parent
    arguments = dict(log.settings)
    if (folder / "args.json").is_file():
        arguments.update(read_json_object(folder / "args.json"))
    return Subject.of(
        log,
        config=_beside(folder / "config.yaml", _read_yaml),
        manifest=_beside(folder / MANIFEST, lambda p: read_manifest(p.parent)),
        results=_beside(folder / "results.json", read_json_object),
        arguments=arguments,
    )


def _beside(path: Path, reader: Callable[[Path], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return reader(path) if path.is_file() else None


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run directory of ours."""
    return (path / MANIFEST).is_file()


def audit_run(run_dir: Path) -> Audit:
    """Audit a run directory and write its ``audit.json``.

    Raises:
        DataError: as for :func:`audit`.
    """
    result = audit(run_dir)
    with atomic_text(run_dir / AUDIT) as file:
        file.write(result.text())
    return result


def write_page(result: Audit, out: Path) -> Path:
    """Write the audit as one self-contained HTML page; every text from the log is escaped."""
    with atomic_text(out) as file:
        file.write(render_page("audit.html.j2", audit=result, figures=figures))
    return out


def figures(values: Mapping[str, Value]) -> str:
    """The numbers of an evidence row in one line."""
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
