"""Options of the ``report`` section."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """``images``: how many pictures with true and predicted boxes the report shows."""

    title: str | None = None
    images: int = 12
