"""What a person sees on a terminal. Names come from other people's files: they are text, never markup, emoji codes or control sequences."""

from __future__ import annotations

import re
from typing import Any, Final

from rich.console import Console

# Escape sequences, cursor movements, and marks that turn the order of what follows. Line breaks and tabs stay.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with control characters as escapes, ``\\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Terminal(Console):
    """A console whose strings are shown as they are; styles are given beside them."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)

    def print(self, *objects: Any, **how: Any) -> None:
        """As :meth:`rich.console.Console.print`, control characters in strings escaped."""
        super().print(*(plain(item) if isinstance(item, str) else item for item in objects), **how)
