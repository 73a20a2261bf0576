"""Florence-2 JSONL: ``{"image": "a.jpg", "prefix": "<OD>", "suffix": "cat<loc_100><loc_200><loc_500><loc_600>dog<loc_...>"}``.

Convention: the label, then four tokens a box (x1, y1, x2, y2), each the lower one of 1000 steps of the side and read at its middle,
``(k + 1/2) / 1000``. A label can have several boxes. After ``<OCR_WITH_REGION>`` eight tokens are the corners of an outline.
"""

from __future__ import annotations

import re
from typing import Any, Final

from coordexp.data.importers.base import Job, Layout, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import chat_splits
from coordexp.data.importers.files import Head

_PART: Final = re.compile(r"([^<]*)((?:<loc_\d{1,3}>)+)")
_LOC: Final = re.compile(r"<loc_(\d{1,3})>")


def looks(head: Head) -> bool:
    """Rows with ``prefix`` and a ``suffix`` of Florence-2's tokens."""
    text = head.row.get("suffix")
    return isinstance(text, str) and "prefix" in head.row and "<loc_" in text


def read(job: Job) -> list[RawSplit]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`."""
    return chat_splits(job, _objects)


def _objects(row: dict[str, Any], where: str) -> tuple[list[RawObject | Unusable], dict[str, Any]]:
    text, prefix = row.get("suffix"), str(row.get("prefix", ""))
    if not isinstance(text, str):
        raise Unusable("no answer", f"{where}: suffix: expected text, got {brief(text)}")
    plain = text.replace("</s>", "").replace("<s>", "")
    if plain.strip() and not _LOC.search(plain):
        raise Unusable("answer without boxes", f"{where}: suffix: expected <loc_0> tokens, got {brief(text)!r}", empty=True)
    size, layout = (8, "outline") if "OCR_WITH_REGION" in prefix else (4, "xyxy")
    kind: Layout = "outline" if layout == "outline" else "xyxy"
    found: list[RawObject | Unusable] = []
    name: str | None = None
    for i, match in enumerate(_PART.finditer(plain)):
        place = f"{where}: suffix[{i}]"
        name = match[1].strip() or name
        numbers = [int(value) for value in _LOC.findall(match[2])]
        if len(numbers) % size:
            found.append(Unusable("wrong count of numbers", f"{place}: expected {size} <loc_> tokens, got {len(numbers)}"))
            continue
        found += [RawObject(place, numbers[at : at + size], kind, "floor1000", name) for at in range(0, len(numbers), size)]
    return found, {}
