"""Records in, ``predictions.jsonl`` out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from coordexp import distribution
from coordexp.codec import CoordCodec
from coordexp.data.records import Record, open_image
from coordexp.data.template import ChatTemplate
from coordexp.decode.generate import Generated, generate
from coordexp.decode.options import DecodeOptions
from coordexp.grammar import parse
from coordexp.vocab.coord_vocab import CoordVocab


def predict(
    model: Any,
    template: ChatTemplate,
    records: Sequence[Record],
    out: Path,
    *,
    vocab: CoordVocab,
    options: DecodeOptions,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write one row a record, in order, to ``out`` (a ``.tmp`` beside it until complete). Returns the number of boxes.

    Rows hold pixels: ``bbox_2d`` by ``options.readout``, and every readout under ``readouts``.
    """
    staging = out.with_name(out.name + ".tmp")
    boxes = done = 0
    with staging.open("w", encoding="utf-8") as file:
        for batch in _batches(records, options.batch_size):
            prompts = [template.encode_prompt(open_image(record)) for record in batch]
            answers = generate(model, template.tokenizer, prompts, vocab=vocab, max_new_tokens=options.max_new_tokens)
            for record, answer in zip(batch, answers, strict=True):
                row = prediction_row(record, answer, template.tokenizer, template.codec, options)
                boxes += len(row["objects"])
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            done += len(batch)
            if progress is not None:
                progress(done, len(records))
    staging.replace(out)
    return boxes


def _batches(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def prediction_row(record: Record, answer: Generated, tokenizer: Any, codec: CoordCodec, options: DecodeOptions) -> dict[str, Any]:
    """The JSON row of one answer. Boxes that are not ``bbox_2d`` are counted under ``problems`` and left out."""
    text = tokenizer.decode(answer.token_ids, skip_special_tokens=False)
    parsed = parse(text, num_bins=codec.num_bins)
    problems = dict(parsed.problems)
    positions = read_positions(answer.coord_logits) if answer.coord_logits.shape[0] else {}
    objects = []
    for instance, where in zip(parsed.instances, parsed.coord_index, strict=True):
        if instance.geometry != "bbox_2d":
            problems["not_a_box"] = problems.get("not_a_box", 0) + 1
            continue
        readouts = {name: _pixels(values[list(where)].tolist(), record, codec) for name, values in positions.items()}
        objects.append({"desc": instance.desc, "bbox_2d": readouts[options.readout], "readouts": readouts})
    return {
        "image_id": record.image_id,
        "width": record.width,
        "height": record.height,
        "objects": objects,
        "score_source": None,
        "problems": problems,
        "error": None,
        "num_tokens": len(answer.token_ids),
        "truncated": answer.truncated,
    }


def read_positions(coord_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Bin positions ``[M]`` by every readout, at temperature 1, of slice logits ``[M, K]``."""
    p = torch.softmax(coord_logits.double(), dim=-1)
    return {name: read(p) for name, read in distribution.READOUTS.items()}


def _pixels(bins: list[float], record: Record, codec: CoordCodec) -> list[float]:
    sides = (record.width, record.height, record.width, record.height)
    return [float(codec.to_pixel(b, side)) for b, side in zip(bins, sides, strict=True)]
