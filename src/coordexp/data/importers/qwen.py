"""Qwen grounding JSON to record files.

A row (JSONL, or a JSON list) names one ``image`` and has its objects either as a list ``objects``, or as the JSON that the last turn of
``conversations`` (``from``, ``value``) or ``messages`` (``role``, ``content``) answers, with or without a code fence around it:
``[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}, {"point_2d": [x, y], "label": "dog"}]``.

Convention: ``--coords absolute`` or ``norm1000`` (0..1000 of each side), always named by the user. Qwen2.5-VL answers are absolute in the
*resized* image that the model saw: rescale those to the file's pixels first. Qwen2-VL and Qwen3-VL use 0..1000.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any, Final

from coordexp.data.importers.base import Job, Split
from coordexp.data.importers.chat import chat_splits, stated_coords
from coordexp.errors import DataError

_FENCE: Final = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)
_ROLES: Final = ("gpt", "assistant")


def read_qwen(job: Job) -> list[Split]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`.

    Raises:
        ConfigError: ``--coords`` is missing.
    """
    coords = stated_coords(job, None, "the Qwen format")

    def objects(row: dict[str, Any], size: tuple[int, int], where: str) -> list[dict[str, Any]]:
        return job.collect(partial(_object, job, item, size, coords, f"{where}: objects[{i}]") for i, item in enumerate(_items(row, where)))

    return chat_splits(job, objects)


def _items(row: dict[str, Any], where: str) -> list[Any]:
    if "objects" in row:
        found = row["objects"]
    else:
        turns = row.get("conversations", row.get("messages"))
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
            raise DataError(f"{where}: expected objects, conversations or messages, got {', '.join(map(str, row))[:80]}")
        last = turns[-1]
        role, text = last.get("from", last.get("role")), last.get("value", last.get("content"))
        if role not in _ROLES or not isinstance(text, str):
            raise DataError(f"{where}: expected a last turn that is the model's answer as text, got one from {str(role)[:40]!r}")
        fenced = _FENCE.fullmatch(text)
        try:
            found = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected an answer in JSON, got one that fails with: {error}") from error
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise DataError(f"{where}: expected a list of objects, got {str(found)[:80]}")
    return found


def _object(job: Job, item: Any, size: tuple[int, int], coords: str, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object with bbox_2d or point_2d and label, got {str(item)[:80]}")
    if ("bbox_2d" in item) == ("point_2d" in item):
        raise DataError(f"{where}: expected one of bbox_2d and point_2d, got {', '.join(map(str, item))[:80] or 'none'}")
    geometry = "bbox_2d" if "bbox_2d" in item else "point_2d"
    values = item[geometry]
    if not isinstance(values, list) or len(values) != (4 if geometry == "bbox_2d" else 2):
        raise DataError(f"{where}: {geometry}: expected {4 if geometry == 'bbox_2d' else 2} numbers, got {str(values)[:80]}")
    pixels = job.to_pixels(values, size, coords, where)
    return {
        "desc": job.label(item.get("label"), where),
        geometry: job.geometry("bbox_2d" if geometry == "bbox_2d" else "point_2d", pixels, size, where),
    }
