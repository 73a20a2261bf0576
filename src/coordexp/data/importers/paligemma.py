"""PaliGemma JSONL: ``{"image": "a.jpg", "prefix": "detect cat ; dog", "suffix": "<loc0100><loc0200><loc0500><loc0600> cat ; ..."}``.

Convention: four tokens a box, y first (ymin, xmin, ymax, xmax), 0..1023 of each side. Segmentation tokens behind them are not read.
"""

from __future__ import annotations

import re
from typing import Any, Final

from coordexp.data.importers.base import Job, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import chat_splits
from coordexp.data.importers.files import Head

_LOC: Final = re.compile(r"<loc(\d{4})>")
_TOKEN: Final = re.compile(r"<(?:loc\d{4}|seg\d{3})>")


def looks(head: Head) -> bool:
    """Rows with ``prefix`` and ``suffix``, and no tokens of Florence-2."""
    text = head.row.get("suffix")
    return isinstance(text, str) and "prefix" in head.row and "<loc_" not in text


def read(job: Job) -> list[RawSplit]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`."""
    return chat_splits(job, _objects)


def _objects(row: dict[str, Any], where: str) -> tuple[list[RawObject | Unusable], dict[str, Any]]:
    text = row.get("suffix")
    if not isinstance(text, str):
        raise Unusable("no answer", f"{where}: suffix: expected text, got {brief(text)}")
    if text.strip() and not _LOC.search(text):
        raise Unusable("answer without boxes", f"{where}: suffix: expected <loc0000> tokens, got {brief(text)!r}", empty=True)
    found: list[RawObject | Unusable] = []
    for i, part in enumerate(filter(str.strip, text.split(";"))):
        place = f"{where}: suffix[{i}]"
        numbers = [int(value) for value in _LOC.findall(part)]
        if not numbers or len(numbers) % 4:
            found.append(Unusable("wrong count of numbers", f"{place}: expected four <loc> tokens, got {len(numbers)} in {brief(part)!r}"))
            continue
        name = _TOKEN.sub("", part).strip()
        found += [RawObject(place, numbers[at : at + 4], "yxyx", "norm1023", name) for at in range(0, len(numbers), 4)]
    return found, {}
