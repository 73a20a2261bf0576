"""Options of the ``vocab`` section. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Init = Literal["mean", "digits", "ordinal"]


@dataclass(frozen=True, kw_only=True)
class VocabOptions:
    """How ``run`` gives the model its coordinate tokens. With ``extend=False`` the model must have them."""

    extend: bool = True
    init: Init = "ordinal"
    seed: int = 0
