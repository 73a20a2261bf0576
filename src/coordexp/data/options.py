"""Options of the ``data`` section. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal

DEFAULT_PROMPT: Final = "Locate every object."
AnswerGeometry = Literal["recorded", "bbox_2d", "point_2d"]
# In a prompt: the place where a record's ``metadata.phrase`` is asked for.
PHRASE_FIELD: Final = "{phrase}"


def unknown_field(prompt: str) -> str | None:
    """A ``{word}`` in the prompt that is not :data:`PHRASE_FIELD`."""
    return next((found for found in re.findall(r"\{\w+\}", prompt) if found != PHRASE_FIELD), None)


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    """Scenes of ``coordexp data synth``: square images of ``side`` pixels with min..max objects.

    Size ranges are shares of the side. Splits draw disjoint seeds, so held-out scenes are new scenes. ``task`` ``grounding``: every
    record asks for one object of its scene, by ``metadata.phrase``; no two objects of a scene have the same description.
    """

    train: int = 8000
    val: int = 100
    test: int = 200
    side: int = 96
    min_objects: int = 1
    max_objects: int = 3
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow")
    shapes: tuple[str, ...] = ("circle", "square", "triangle")
    sizes: tuple[str, ...] = ("small", "medium", "large")
    task: Literal["detection", "grounding"] = "detection"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_objects <= self.max_objects:
            raise ValueError(f"data.synth.max_objects: expected at least min_objects={self.min_objects}, got {self.max_objects}")
        if self.task == "grounding" and self.min_objects < 1:
            raise ValueError("data.synth.min_objects: expected at least 1 for task='grounding', got 0: there must be an object to ask for")
        if self.side < 32:
            raise ValueError(f"data.synth.side: expected at least 32 pixels, got {self.side}")
        if min(self.train, self.val, self.test) < 1:
            raise ValueError("data.synth.train/val/test: expected at least 1 scene each")


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """Several samples in one row of at most ``length`` tokens, in training and evaluation; a batch size then counts packs.

    ``on_overlong``: a sample longer than that is an error, or left out, counted and named; no sample is ever cut.
    ``tail``: the last incomplete step of an epoch is taken with the packs there are (``pad``) or left out (``drop``).
    """

    enabled: bool = False
    length: int = 4096
    on_overlong: Literal["error", "drop"] = "error"
    tail: Literal["drop", "pad"] = "pad"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"data.packing.length: expected at least 1 token, got {self.length}")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """``kind``: ``synth`` makes scenes; ``voc`` imports a Pascal VOC folder ``source`` (splits by its ImageSets);
    ``jsonl`` reads ``source``/{train,val,test}.jsonl.

    ``prompt`` may hold ``{phrase}``: there stands each record's ``metadata.phrase``. ``geometry``: how objects are written in answers;
    ``recorded`` as they stand in the records, ``bbox_2d`` as their bounding box, ``point_2d`` as the centre of that.
    """

    kind: Literal["synth", "voc", "jsonl"] = "jsonl"
    source: str | None = None
    synth: SynthOptions = field(default_factory=SynthOptions)
    prompt: str = DEFAULT_PROMPT
    geometry: AnswerGeometry = "recorded"
    order: Literal["sorted", "random"] = "sorted"
    max_train: int | None = None
    max_val: int | None = None
    max_test: int | None = None
    on_invalid: Literal["error", "skip"] = "error"
    packing: PackingOptions = field(default_factory=PackingOptions)

    def __post_init__(self) -> None:
        if (unknown := unknown_field(self.prompt)) is not None:
            raise ValueError(f"data.prompt: {unknown} is no field of it: expected {PHRASE_FIELD}, the phrase of a record, or plain text")
        if self.kind != "synth" and self.source is None:
            raise ValueError(f"data.source: expected a folder for kind={self.kind!r}, got none: pass --set data.source=FOLDER")
