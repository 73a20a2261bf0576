"""From a row of ms-swift's grounding format to what the objective needs at every token. Imports neither torch nor ms-swift.

The row's ``objects.bbox`` holds the ground truth in the order in which the answers write their coordinate tokens: four numbers
a box, two a point or a polygon's vertex. So continuous centres and extents travel through ms-swift's own data path, and every
token can be checked against its number: an answer in another convention, or another order, is found at its first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from coordexp.boxes import bounding_box
from coordexp.codec import CoordCodec
from coordexp.data.images import image_size, orientation
from coordexp.errors import DataError
from coordexp.grammar import COORD_TOKEN, ROLE_CODES, Geometry, Span, parse, token_roles

Slot = tuple[int, int]


@dataclass(frozen=True)
class AnswerTargets:
    """Of the C coordinate tokens of an answer, in order: real bin positions, extents in bins, (object, index in it).

    ``geometries`` are those of the objects that could be read.
    """

    centers: tuple[float, ...]
    extents: tuple[float, ...]
    slots: tuple[Slot, ...]
    spans: tuple[Span, ...]
    geometries: frozenset[Geometry] = frozenset()


@dataclass(frozen=True)
class TokenTargets:
    """``roles`` are ``grammar.ROLE_CODES``; all lists run over the L tokens of the chat, nothing shifted; see ``template.Example``."""

    roles: list[int]
    centers: list[float]
    extents: list[float]
    slots: list[int]


@dataclass(frozen=True)
class _Number:
    """One ground-truth number: in units of which ``side`` is the image's side, from entry ``entry`` of ``objects.bbox``."""

    value: float
    side: float
    entry: int


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """The texts of the assistant, in order.

    Raises:
        DataError: an answer that is not text.
    """
    texts = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"messages: expected the assistant's answer as text, got {type(text).__name__}")
    return texts


def name_of(row: Mapping[str, Any], number: str) -> str:
    """What a row is called in messages: its first image, because ms-swift shuffles the rows; its number where it has none."""
    images = row.get("images") or []
    first = images[0] if images else None
    path = first.get("path") if isinstance(first, Mapping) else first
    return path if isinstance(path, str) and path else number


def row_targets(row: Mapping[str, Any], codec: CoordCodec) -> list[AnswerTargets]:
    """Targets of all answers of a row. Without ``objects`` a token's own bin is its centre and extents are NaN.

    Raises:
        DataError: numbers that do not fit the tokens, one by one.
    """
    answers = answers_of(row)
    numbers = _numbers(row)
    count = sum(len(COORD_TOKEN.findall(answer)) for answer in answers)
    if numbers is not None and len(numbers) != count:
        raise DataError(
            f"objects.bbox: expected as many numbers as the answer has coordinate tokens ({count}), in their order, got {len(numbers)}: "
            "write the data with `coordexp data export swift`"
        )
    made, start = [], 0
    for answer in answers:
        tokens = [int(match[1]) for match in COORD_TOKEN.finditer(answer)]
        own = None if numbers is None else numbers[start : start + len(tokens)]
        made.append(_answer(answer, tokens, own, codec))
        start += len(tokens)
    return made


def _answer(answer: str, tokens: list[int], numbers: list[_Number] | None, codec: CoordCodec) -> AnswerTargets:
    if any(k >= codec.num_bins for k in tokens):
        raise DataError(f"answer: expected coordinate tokens below {codec.num_bins}, got <|coord_{max(tokens)}|>")
    parsed = parse(answer, num_bins=codec.num_bins)
    groups = [list(index) for index in parsed.coord_index] if not parsed.problems else _by_entry(numbers or [])
    slots: list[Slot] = [(-1, -1)] * len(tokens)
    centers = [float(k) for k in tokens]
    extents = [float("nan")] * len(tokens)
    for i, group in enumerate(groups):
        for j, place in enumerate(group):
            slots[place] = (i, j)
        if numbers is not None:
            own = [numbers[place] for place in group]
            _check_bins([tokens[place] for place in group], own, codec)
            x1, y1, x2, y2 = bounding_box([n.value for n in own])
            spans = (codec.to_bin(x2 - x1, own[0].side), codec.to_bin(y2 - y1, own[1].side))
            for j, place in enumerate(group):
                centers[place] = float(codec.to_bin(own[j].value, own[j].side))
                extents[place] = spans[j % 2]
    spots = [Span(m.start(), m.end(), "coord", slot) for m, slot in zip(COORD_TOKEN.finditer(answer), slots, strict=True)]
    spots += [Span(start, end, "desc") for start, end in parsed.desc_spans]
    kinds = frozenset(instance.geometry for instance in parsed.instances)
    return AnswerTargets(tuple(centers), tuple(extents), tuple(slots), tuple(sorted(spots, key=lambda s: s.start)), kinds)


def _by_entry(numbers: list[_Number]) -> list[list[int]]:
    """Places of the tokens, grouped by the entry of ``objects.bbox`` they belong to: for answers in another format."""
    groups: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        groups.setdefault(number.entry, []).append(place)
    return list(groups.values())


def _check_bins(bins: list[int], numbers: list[_Number], codec: CoordCodec) -> None:
    """Every token must be the bin of its number: what was exported under another convention is not trained on."""
    values, sides = [n.value for n in numbers], [n.side for n in numbers]
    where = f"objects.bbox[{numbers[0].entry}]"
    try:
        if len({n.entry for n in numbers}) == 1 and len(values) == 4:
            expected = list(codec.quantize_box(values, sides[0], sides[1])[0])
        else:
            expected = [int(codec.quantize(value, side)) for value, side in zip(values, sides, strict=True)]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if expected != bins:
        raise DataError(
            f"{where}: {values} of an image of {sides[0]:g}x{sides[1]:g} are bins {expected} under {codec.convention!r}, the answer has "
            f"{bins}: another convention or another order: set swift.convention, or export the data again"
        )


def _numbers(row: Mapping[str, Any]) -> list[_Number] | None:
    """The ground-truth numbers in order, or None where the row has none.

    Raises:
        DataError: objects of another shape, or an image whose size cannot be known.
    """
    objects = row.get("objects")
    if not objects or objects.get("bbox") is None:
        return None
    boxes, kind, images = objects["bbox"], objects.get("bbox_type") or "real", row.get("images") or []
    if kind not in ("real", "norm1"):
        raise DataError(f"objects.bbox_type: expected real or norm1, got {kind!r}")
    # As ms-swift fills it up.
    which = list(objects.get("image_id") or [])
    which += [0] * (len(boxes) - len(which))
    if len(which) != len(boxes) or any(not 0 <= number < len(images) for number in which):
        raise DataError(f"objects.image_id: expected one of the {len(images)} images for each of the {len(boxes)} boxes, got {which}")
    sizes = {number: (1.0, 1.0) if kind == "norm1" else _size(images[number]) for number in set(which)}
    found = []
    for i, (box, number) in enumerate(zip(boxes, which, strict=True)):
        if len(box) not in (2, 4) or not all(isinstance(value, int | float) and abs(value) < 1e300 for value in box):
            raise DataError(f"objects.bbox[{i}]: expected 4 finite numbers, or 2 of a point, got {box}")
        found += [_Number(float(value), sizes[number][j % 2], i) for j, value in enumerate(box)]
    return found


def _size(image: Any) -> tuple[float, float]:
    """Size of an image as ms-swift sees it: the stored pixels, without an EXIF rotation."""
    content = image.get("bytes") if isinstance(image, Mapping) else None
    path = image.get("path") if isinstance(image, Mapping) else image
    if content:
        with Image.open(BytesIO(content)) as opened:
            return float(opened.width), float(opened.height)
    if not isinstance(path, str) or not Path(path).is_file():
        raise DataError(
            f"images: expected a file, to know the size that bbox_type real refers to, got {path!r}: use absolute paths, or bbox_type norm1"
        )
    if orientation(Path(path)) != 1:
        raise DataError(f"images: {path} has an EXIF rotation, which ms-swift ignores: write the data with `coordexp data export swift`")
    width, height = image_size(Path(path))
    return float(width), float(height)


def token_targets(labels: Sequence[int], answers: Sequence[str], targets: Sequence[AnswerTargets], tokenizer: Any) -> TokenTargets:
    """Targets of an encoded row: ``labels`` ``[L]`` are its own (-100: unsupervised), ``answers`` its texts.

    Each answer must be tokenised as it stands and supervised whole; what ms-swift supervises beside it (the end of the turn) is
    ``format``.

    Raises:
        DataError: labels that do not hold the answers, or a coordinate token outside a coordinate's place.
    """
    n = len(labels)
    nan = float("nan")
    made = TokenTargets([ROLE_CODES["none"]] * n, [nan] * n, [nan] * n, [-1] * n)
    for place, label in enumerate(labels):
        if label != -100:
            made.roles[place] = ROLE_CODES["format"]
    runs = _runs(labels)
    if len(runs) != len(answers):
        raise DataError(
            f"messages: expected one supervised stretch for each of the {len(answers)} answers, got {len(runs)}: see --loss_scale"
        )
    for (start, end), answer, target in zip(runs, answers, targets, strict=True):
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        if list(labels[start : min(end, start + len(ids))]) != ids:
            raise DataError(f"answer: ms-swift does not supervise it as it stands: {answer[:80]!r}: check --loss_scale and the template")
        roles, slots = token_roles([tuple(offset) for offset in encoded["offset_mapping"]], target.spans)
        order = iter(range(len(target.centers)))
        for place, (role, slot) in enumerate(zip(roles, slots, strict=True), start=start):
            made.roles[place] = role
            if role == ROLE_CODES["coord"] and slot is not None:
                k = next(order)
                made.centers[place], made.extents[place], made.slots[place] = target.centers[k], target.extents[k], slot[1]
    return made


def _runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    """``[start, end)`` of the stretches of supervised tokens."""
    edges = [0, *(int(label != -100) for label in labels), 0]
    starts = [i for i in range(len(labels)) if edges[i] < edges[i + 1]]
    ends = [i for i in range(1, len(labels) + 1) if edges[i] > edges[i + 1]]
    return list(zip(starts, ends, strict=True))
