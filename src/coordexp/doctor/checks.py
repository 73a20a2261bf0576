"""One check's outcome, and how checks become JSON. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Outcome = Literal["ok", "warning", "fail", "skipped"]
SCHEMA: Final = 1


@dataclass(frozen=True)
class Check:
    """``name`` is stable (``group.what``), ``seen`` is what was found, ``advice`` what to do (empty where nothing is).

    ``details`` are the numbers behind it, for ``--json``.
    """

    name: str
    outcome: Outcome
    seen: str
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def failed(checks: Sequence[Check]) -> bool:
    """Whether any check fails."""
    return any(check.outcome == "fail" for check in checks)


def to_json(checks: Sequence[Check]) -> str:
    """``{"schema": 1, "counts": {outcome: n}, "checks": [{name, outcome, seen, advice, details}]}``."""
    counts = {outcome: sum(check.outcome == outcome for check in checks) for outcome in ("ok", "warning", "fail", "skipped")}
    content = {"schema": SCHEMA, "counts": counts, "checks": [asdict(check) for check in checks]}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
