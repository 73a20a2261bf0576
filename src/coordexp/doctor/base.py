"""``Check``: one thing that was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["ok", "warning", "fail", "skipped"]


@dataclass(frozen=True)
class Check:
    """``code`` is stable, for scripts; ``seen`` is what was found; ``advice`` what to do, often nothing; ``values`` the numbers."""

    code: str
    name: str
    outcome: Outcome
    seen: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def failed(checks: list[Check]) -> bool:
    """Whether any check failed."""
    return any(check.outcome == "fail" for check in checks)
