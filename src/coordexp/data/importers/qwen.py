"""Conversations of Qwen-VL, LLaMA-Factory, InternVL and MiniCPM, and rows with a list of objects.

A row (JSONL, or a JSON list) names one ``image`` and has its objects either as a list ``objects`` (``annotations``), or in the answers of
its ``conversations`` (``from``, ``value``) or ``messages`` (``role``, ``content``), of all turns together:

- JSON, with or without a code fence, tags or words around it: objects with ``bbox_2d``, ``bbox``, ``box_2d`` (Gemini's, y first) or
``point_2d``, named by ``label``, ``text_content``, ``name`` and the like; keys that repeat begin a new object;
- ``<ref>cat</ref><box>[[x1, y1, x2, y2]]</box>`` (InternVL), ``<box>x1 y1 x2 y2</box>`` (MiniCPM);
- ``<|ref|>cat<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>`` (DeepSeek-VL2);
- ``<|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`` (Qwen2-VL).

An object without a name takes what the question asks for, where it is worded as in the models' own documentation, else ``--name``.
A row whose answers hold no box at all is left out.

Convention: ``--coords absolute``, ``norm1000`` (0..1000 of each side) or ``norm1``, always named by the user. Qwen2.5-VL answers are
absolute in the *resized* image that the model saw: rescale those to the file's pixels first. Qwen2-VL, Qwen3-VL, InternVL and MiniCPM use
0..1000.
"""

from __future__ import annotations

from typing import Any

from coordexp.data.importers.answers import objects_of_text, objects_of_value
from coordexp.data.importers.base import Job, RawObject, RawSplit, Unusable, brief
from coordexp.data.importers.chat import chat_splits, turns_of
from coordexp.data.importers.files import Head


def looks(head: Head) -> bool:
    """Rows with conversations, or with a list of objects."""
    row = head.row
    return bool(row.keys() & {"conversations", "messages", "response", "output"}) or any(
        isinstance(row.get(key), list) for key in ("objects", "annotations")
    )


def read(job: Job) -> list[RawSplit]:
    """Splits of the source: see :func:`coordexp.data.importers.chat.chat_splits`."""
    return chat_splits(job, _objects)


def _objects(row: dict[str, Any], where: str) -> tuple[list[RawObject | Unusable], dict[str, Any]]:
    stated = next((row[key] for key in ("objects", "annotations") if isinstance(row.get(key), list)), None)
    if stated is not None:
        return objects_of_value(stated, f"{where}: objects"), {}
    if isinstance(row.get("objects"), dict):
        raise Unusable("no objects", f"{where}: objects: expected a list, got an object: rows of ms-swift are imported as swift")
    turns = turns_of(row)
    if not any(role == "assistant" for role, _ in turns):
        raise Unusable(
            "no answer", f"{where}: expected objects, conversations or messages with an answer, got {brief(', '.join(map(str, row)))}"
        )
    found: list[RawObject | Unusable] = []
    answered = False
    question = ""
    for role, text in turns:
        if role != "assistant":
            question = text
            continue
        part = objects_of_text(text, where, question)
        if part is not None:
            answered = True
            found += part
    if not answered:
        raise Unusable("answer without boxes", f"{where}: expected an answer with boxes, got {brief(turns[-1][1])!r}", empty=True)
    return found, {}
