"""What a rule is, what it looks at and what it answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np

from coordexp.losses.objective import COORD_TERMS
from coordexp.runs.columns import Columns, Series
from coordexp.runs.logs import EVAL_PREFIX, RunLog
from coordexp.runs.rules.statistics import Ratio, train_over_eval

Severity = Literal["info", "warning", "severe"]
State = Literal["finding", "passed", "not_applicable"]
DOCS: Final = "docs/audit-rules.md"
Value = float | int | str | None

_WORLD_SIZE: Final = ("world_size", "global_world_size")
_ACCUMULATION: Final = "gradient_accumulation_steps"


@dataclass(frozen=True)
class Evidence:
    """One row of evidence: ``what`` was seen, ``where`` (steps), how ``sure`` it is, and the numbers behind it."""

    what: str
    where: str = ""
    sure: str = ""
    values: Mapping[str, Value] = field(default_factory=dict)

    def row(self) -> dict[str, Value]:
        """As JSON; a number that is not finite becomes its name, so that the output is strict JSON."""
        texts = {key: text for key, text in (("what", self.what), ("where", self.where), ("sure", self.sure)) if text}
        return {**texts, **{key: _plain(value) for key, value in self.values.items()}}


def _plain(value: Value) -> Value:
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Verdict:
    """A rule's answer. ``severity`` is given where a finding is milder than the rule's own."""

    outcome: State
    evidence: tuple[Evidence, ...] = ()
    severity: Severity | None = None


def finding(*evidence: Evidence, severity: Severity | None = None) -> Verdict:
    """Something is wrong."""
    return Verdict("finding", evidence, severity)


def passed(what: str, **values: Value) -> Verdict:
    """Looked at, nothing wrong."""
    return Verdict("passed", (Evidence(what, values=values),))


def not_applicable(why: str) -> Verdict:
    """The log does not hold what the rule needs."""
    return Verdict("not_applicable", (Evidence(why),))


@dataclass(frozen=True)
class Subject:
    """What the rules look at: the log's columns, and what stands beside the log (each None where there is none).

    ``config`` is the resolved configuration of a run of ours, ``arguments`` the flat arguments of another
    trainer (the ``args.json`` of ms-swift, or what a log says about itself).
    """

    log: RunLog
    train: Columns
    eval: Columns
    config: Mapping[str, Any] | None = None
    manifest: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, log: RunLog, **beside: Any) -> Subject:
        """The subject of a log."""
        return cls(log, Columns(log.train), Columns(log.eval, EVAL_PREFIX), **beside)

    @cached_property
    def loss_ratio(self) -> Ratio | None:
        """Ratio of training to evaluation loss at every evaluation; None where there are too few."""
        return train_over_eval(self.train.series("loss"), self.eval.series("loss"))

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the configuration; empty where there is none."""
        found = (self.config or {}).get(name)
        return found if isinstance(found, Mapping) else {}

    def accumulation(self) -> int | None:
        """Micro-batches of an optimizer step: from the log's own rows, else the configuration, else the arguments."""
        logged = self.train.series("accum/grad_steps").finite()
        if len(logged):
            return _count(float(np.median(logged.values)))
        return _count(self.section("train").get(_ACCUMULATION)) or _count(self.arguments.get(_ACCUMULATION))

    def world_size(self) -> int | None:
        """Number of ranks, where anything says so."""
        for place in (self.arguments, self.log.header or {}, self.manifest or {}):
            for key in _WORLD_SIZE:
                if found := _count(place.get(key)):
                    return found
        return None

    def term_scale(self, term: str) -> float | None:
        """What a logged ``coord_softce_w1/<term>`` must be divided by to be the raw value; None where unknown.

        1 for logs of ours (they have ``contrib/*``). Elsewhere the parts may be weighted: if they add up to
        ``coord_softce_w1/loss`` the factor is the term's weight in the configuration, unknown without one.
        """
        if any(key.startswith("contrib/") for key in self.train.keys) or self.log.source == "run":
            return 1.0
        weight = self.section("objective").get(term)
        return float(weight) if isinstance(weight, (int, float)) and weight and self.parts_add_up() else None

    def parts_add_up(self) -> bool:
        """Whether the logged coordinate terms sum to ``coord_softce_w1/loss``: then they are contributions."""
        total = self.train.series("coord_softce_w1/loss").finite()
        parts = [s for term in COORD_TERMS if len(s := self.train.series(f"coord_softce_w1/{term}").finite()) == len(total)]
        if not len(total) or not parts:
            return False
        error = np.abs(np.sum([s.values for s in parts], axis=0) - total.values)
        return bool(np.median(error) <= 0.01 * np.median(np.abs(total.values)))

    def contribution(self, term: str) -> Series | None:
        """Weighted value of a coordinate term, as it enters the loss; None where the log does not tell."""
        own = self.train.raw(f"contrib/{term}")
        if own is not None:
            return own.finite()
        logged = self.train.raw(f"coord_softce_w1/{term}")
        return logged.finite() if logged is not None and self.parts_add_up() else None


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 1:
        return None
    return round(value)


Check = Callable[[Subject], Verdict]


@dataclass(frozen=True)
class Rule:
    """``reads``: the keys or files it needs. ``test``: what makes a finding, with the thresholds. ``advice``: what to change."""

    code: str
    title: str
    severity: Severity
    reads: str
    test: str
    advice: str
    check: Check

    @property
    def keys(self) -> tuple[str, ...]:
        """The log keys among what it reads, braces written out; files, options and patterns left out."""
        named = re.findall(r"`([^`]+)`", self.reads)
        return tuple(key for text in named for key in _written_out(text) if _LOG_KEY.fullmatch(key))

    @property
    def anchor(self) -> str:
        """Where the rule is explained."""
        return f"{DOCS}#{self.code.lower()}"


_LOG_KEY: Final = re.compile(r"[\w/]+/\w+|(eval_)?(loss|token_acc)|grad_norm|learning_rate|epoch")


def _written_out(text: str) -> list[str]:
    """``a/{b,c}`` as ``a/b`` and ``a/c``."""
    found = re.fullmatch(r"([^{}]*)\{([^{}]*)\}([^{}]*)", text)
    return [text] if found is None else [found[1] + middle + found[3] for middle in found[2].split(",")]


def rule(code: str, title: str, severity: Severity, *, reads: str, test: str, advice: str) -> Callable[[Check], Rule]:
    """Makes a rule of the function that checks it."""
    return lambda check: Rule(code, title, severity, reads, test, advice, check)
