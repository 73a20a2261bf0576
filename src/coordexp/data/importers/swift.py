"""ms-swift grounding JSONL to record files.

A row is ``{"messages": [...], "images": ["a.jpg"], "objects": {"ref": ["cat"], "bbox": [[x1, y1, x2, y2]]}}``. There are as
many ``ref`` as ``bbox``, or one ``ref`` for all. A ``bbox`` of two numbers is a point. The messages are not read: the prompt is
a choice of the experiment.

Convention: ``bbox_type`` of ``objects`` says ``real`` (absolute pixels) or ``norm1`` (0..1). Rows without it are what ``--coords``
says: ``absolute`` or ``norm1000``; nothing is guessed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from coordexp.data.importers.base import Job, Split
from coordexp.data.importers.chat import chat_splits, stated_coords
from coordexp.errors import DataError

_TYPES: Final = {"real": "absolute", "norm1": "norm1"}


def read_swift(job: Job) -> list[Split]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`."""

    def objects(row: dict[str, Any], size: tuple[int, int], where: str) -> list[dict[str, Any]]:
        found = row.get("objects")
        if not isinstance(found, dict) or not isinstance(found.get("bbox"), list) or not isinstance(found.get("ref"), list):
            raise DataError(f"{where}: objects: expected lists ref and bbox, got {str(found)[:80]}")
        kind = found.get("bbox_type")
        if kind is not None and kind not in _TYPES:
            raise DataError(f"{where}: objects.bbox_type: expected one of {', '.join(_TYPES)}, got {str(kind)[:80]!r}")
        refs, boxes = found["ref"], found["bbox"]
        if len(refs) == 1:
            refs = refs * len(boxes)
        if len(refs) != len(boxes):
            raise DataError(f"{where}: objects.ref: expected one, or as many as the {len(boxes)} bbox, got {len(refs)}")
        coords = stated_coords(job, None if kind is None else _TYPES[kind], where)
        return job.collect(
            partial(_object, job, ref, box, size, coords, f"{where}: objects.bbox[{i}]")
            for i, (ref, box) in enumerate(zip(refs, boxes, strict=True))
        )

    return chat_splits(job, objects)


def _object(job: Job, ref: Any, box: Any, size: tuple[int, int], coords: str, where: str) -> dict[str, Any]:
    if not isinstance(box, list) or len(box) not in (2, 4):
        raise DataError(f"{where}: expected [x1, y1, x2, y2] or a point [x, y], got {str(box)[:80]}")
    geometry = "bbox_2d" if len(box) == 4 else "point_2d"
    values = job.to_pixels(box, size, coords, where)
    return {
        "desc": job.label(ref, where),
        geometry: job.geometry("bbox_2d" if len(box) == 4 else "point_2d", values, size, where),
    }
