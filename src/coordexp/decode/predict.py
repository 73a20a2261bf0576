"""Records in, ``predictions.jsonl`` out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coordexp import distribution
from coordexp.codec import CoordCodec
from coordexp.data.answers import ask
from coordexp.data.records import Record
from coordexp.data.template import ChatTemplate, Prompt
from coordexp.decode.automaton import AnswerGrammar
from coordexp.decode.distributions import write_distributions
from coordexp.decode.generate import Generated, Generator
from coordexp.decode.options import DecodeOptions
from coordexp.decode.output import Output, Workers
from coordexp.decode.scores import Calibration, calibrated, distribution_score, token_score
from coordexp.decode.tokens import token_bytes, token_spans
from coordexp.errors import ConfigError, DataError
from coordexp.evaluate.origin import RECORDS_KEY, records_sha256
from coordexp.grammar import COORD_TOKEN, Geometry, parse
from coordexp.vocab.coord_vocab import CoordVocab

# Called after each batch with images done, images in all, boxes found since the start.
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Predicted:
    """What all processes did: ``images``, ``boxes``, ``failed`` images and answers ``cut`` by the token budget of this call;
    ``resumed`` images were done before.

    ``finished``: the file was complete already, and nothing was done.
    """

    images: int
    boxes: int
    failed: int
    resumed: int
    seconds: float
    finished: bool = False
    cut: int = 0


def predict(
    model: Any,
    template: ChatTemplate,
    records: Sequence[Record],
    out: Path,
    *,
    vocab: CoordVocab,
    options: DecodeOptions,
    settings: dict[str, Any] | None = None,
    geometries: Sequence[Geometry] = ("bbox_2d",),
    calibration: Calibration | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Predicted:
    """Write one row a record, in order. Every finished batch is on disk; a killed prediction goes on where it stopped.

    Rows hold pixels: ``bbox_2d`` (or another of ``geometries``, what an answer's objects may be) by ``options.readout``, and every
    readout under ``readouts``. An image that cannot be used is a row with its ``error``. ``settings`` are what else the rows
    depend on (model, data, prompt): a file begun with others is refused.

    Raises:
        ConfigError: an ``out`` made with other settings, without ``overwrite``; a calibration of boxes for other geometries.
        DataError: a record without the phrase that the prompt asks for.
    """
    workers = workers or Workers()
    if calibration is not None and tuple(geometries) != ("bbox_2d",):
        raise ConfigError(f"--calibrate: the scores of boxes are calibrated, this model writes {', '.join(geometries)}")
    generator = _generator(model, template.tokenizer, vocab, options, geometries)
    job = _Job(template, options, calibration, token_bytes(template.tokenizer), generator, tuple(geometries))
    asked = {"geometries": list(geometries), "questions_sha256": questions_sha256(template, records)}
    output = Output(out, workers)
    with ExitStack() as held:
        fault = None
        if workers.rank == 0:
            try:
                output.prepare(settings_of(records, options, asked | (settings or {}), calibration, workers), overwrite=overwrite)
                held.enter_context(output.alone())
            except ConfigError as error:
                fault = str(error)
        workers.agree(fault)
        if out.exists():
            return Predicted(0, 0, 0, len(records), 0.0, finished=True)
        begin = time.perf_counter()
        done = _write(job, output, records, progress)
        workers.wait()
        seconds = time.perf_counter() - begin
        if workers.rank == 0:
            output.merge()
        images, boxes, failed, resumed, cut = workers.total(done)
    return Predicted(images, boxes, failed, resumed, seconds, cut=cut)


def _write(job: _Job, output: Output, records: Sequence[Record], progress: Progress | None) -> tuple[int, int, int, int, int]:
    """This process's part: images, boxes, failed, resumed, cut."""
    share = output.workers.share(len(records))
    mine = records[share.start : share.stop]
    size = job.options.batch_size
    resumed = done = output.resume(mine, size, start=share.start)
    boxes = failed = cut = 0
    while done < len(mine):
        batch = mine[done : done + size]
        rows, found = job.batch(batch)
        if job.options.save_distributions:
            write_distributions(output.distributions, share.start + done, found, num_bins=job.generator.vocab.num_bins)
        output.append(rows)
        done += len(batch)
        boxes += sum(len(row["objects"]) for row in rows)
        failed += sum(row["error"] is not None for row in rows)
        cut += sum(bool(row["truncated"]) for row in rows)
        if progress is not None:
            progress(done, len(mine), boxes)
    return len(mine) - resumed, boxes, failed, resumed, cut


def settings_of(
    records: Sequence[Record], options: DecodeOptions, given: dict[str, Any], calibration: Calibration | None, workers: Workers
) -> dict[str, Any]:
    """What the rows depend on. The batch size is not part of it: it may be lowered to go on."""
    decode = {name: value for name, value in asdict(options).items() if name != "batch_size"}
    fitted = None if calibration is None else asdict(calibration)
    made_for = {RECORDS_KEY: records_sha256(records), "images": len(records)}
    return {**given, **decode, "calibration": fitted, **made_for, "processes": workers.world}


def questions_sha256(template: ChatTemplate, records: Sequence[Record]) -> str:
    """Of what is asked about the records.

    Raises:
        DataError: a record without the phrase that the prompt asks for.
    """
    return _sha256(ask(template.prompt, record) for record in records)


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _generator(
    model: Any, tokenizer: Any, vocab: CoordVocab, options: DecodeOptions, geometries: Sequence[Geometry]
) -> Generator:  # fmt: skip
    return Generator(
        model=model,
        tokenizer=tokenizer,
        vocab=vocab,
        grammar=AnswerGrammar(tokenizer, vocab, geometries=geometries) if options.constrained else None,
        max_new_tokens=options.max_new_tokens,
        max_objects=options.max_objects,
        temperature=options.temperature,
    )


@dataclass(frozen=True)
class _Job:
    """Turns batches of records into rows and their distributions."""

    template: ChatTemplate
    options: DecodeOptions
    calibration: Calibration | None
    table: list[bytes]
    generator: Generator
    geometries: tuple[Geometry, ...]

    def batch(self, records: Sequence[Record]) -> tuple[list[dict[str, Any]], list[tuple[str, list[Tensor]]]]:
        prompts: list[Prompt] = []
        usable: list[Record] = []
        rows: dict[str, dict[str, Any]] = {}
        for record in records:
            try:
                prompts.append(self.template.encode_prompt(record))
                usable.append(record)
            except (DataError, ValueError) as error:  # ValueError: shapes the image processor refuses
                # A path that is no UTF-8 is shown with its bytes as escapes; the file itself stays UTF-8.
                text = str(error).encode(errors="backslashreplace").decode()
                rows[record.image_id] = _row(record, [], error=" ".join(text.split()))
        distributions: dict[str, list[Tensor]] = {record.image_id: [] for record in records}
        seeds = [_seed(self.options.seed, record.image_id) for record in usable]
        for record, answer in zip(usable, self.generator(prompts, seeds=seeds) if prompts else [], strict=True):
            row, distributions[record.image_id] = read_answer(
                record, answer, self.table, self.generator.vocab, self.template.codec, self.options, self.geometries
            )
            rows[record.image_id] = row if self.calibration is None else calibrated(row, self.calibration)
        return [rows[record.image_id] for record in records], list(distributions.items())


def _seed(seed: int, image_id: str) -> int:
    """Of an image, so that neither batches nor processes change a sampled answer."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{image_id}".encode()).digest()[:7], "big")


def _row(record: Record, objects: list[dict[str, Any]], *, error: str | None = None, **more: Any) -> dict[str, Any]:
    head = {"image_id": record.image_id, "width": record.width, "height": record.height, "objects": objects}
    empty: dict[str, Any] = {"score_source": None, "problems": {}, "num_tokens": None, "truncated": None, "stopped": None, "reverted": None}
    return head | empty | more | {"error": error}


def read_answer(
    record: Record, answer: Generated, table: Sequence[bytes], vocab: CoordVocab, codec: CoordCodec, options: DecodeOptions,
    geometries: Sequence[Geometry] = ("bbox_2d",),
) -> tuple[dict[str, Any], list[Tensor]]:  # fmt: skip
    """The JSON row of one answer, and the distributions ``[S, K]`` of its objects, S their values.

    Objects of other ``geometries``, and values spelled out in other tokens than the coordinates' own, are counted
    under ``problems`` and left out. Left out is also, in constrained decoding, the repeated object that ended the list.
    """
    text, spans = token_spans(answer.token_ids, table)
    parsed = parse(text, num_bins=codec.num_bins)
    problems = dict(parsed.problems)
    p = torch.softmax(answer.coord_logits.double(), dim=-1)
    places = [n for n, token in enumerate(answer.token_ids) if token in vocab.ids]
    # Character of each coordinate token -> its row in ``p``; a value's ordinal in the text -> its character.
    rows_at = {spans[n][0]: row for row, n in enumerate(places)}
    characters = [m.start() for m in COORD_TOKEN.finditer(text)]
    objects: list[dict[str, Any]] = []
    distributions: list[Tensor] = []
    reverted = 0
    count = len(parsed.instances) - (answer.stopped == "duplicate")
    for instance, where, written in list(zip(parsed.instances, parsed.coord_index, parsed.desc_spans, strict=True))[:count]:
        known = [rows_at[characters[n]] for n in where if characters[n] in rows_at]
        fault = "other_geometry" if instance.geometry not in geometries else "spelled_value" if len(known) < len(where) else None
        if fault is not None:
            problems[fault] = problems.get(fault, 0) + 1
            continue
        positions, back = read_values(p[known], instance.bins, ordered=options.constrained and instance.geometry == "bbox_2d")
        reverted += back[options.readout]
        item: dict[str, Any] = {"desc": instance.desc, instance.geometry: _pixels(positions[options.readout], record, codec)}
        if options.score != "none":
            desc = [v for v, span in zip(answer.log_probs, spans, strict=True) if v is not None and _overlaps(span, written)]
            coords = [v for row in known if (v := answer.log_probs[places[row]]) is not None]
            item["score"] = _score(options, desc, coords, p[known], positions[options.readout])
        objects.append(item | {"readouts": {name: _pixels(values, record, codec) for name, values in positions.items()}})
        distributions.append(p[known])
    return _row(
        record,
        objects,
        score_source=None if options.score == "none" else options.score,
        problems=problems,
        num_tokens=len(answer.token_ids),
        truncated=answer.truncated,
        stopped=answer.stopped,
        reverted=reverted,
    ), distributions


def read_values(p: Tensor, bins: Sequence[int], *, ordered: bool) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Positions ``[S]`` of one object by every readout, of distributions ``[S, K]``; ``argmax`` is the written bins.

    Each value is read from its own distribution, taken before any constraint, so refined edges of a box can cross. With
    ``ordered`` an axis whose edges do is given its written bins, which do not; the second dict counts such axes.
    """
    found = {name: read(p).tolist() for name, read in distribution.READOUTS.items()} | {"argmax": [float(k) for k in bins]}
    back = dict.fromkeys(found, 0)
    for name, values in found.items() if ordered else ():
        for low, high in ((0, 2), (1, 3)):
            if not values[high] > values[low]:
                values[low], values[high] = float(bins[low]), float(bins[high])
                back[name] += 1
    return found, back


def _score(options: DecodeOptions, desc: Sequence[float], coords: Sequence[float], p: Tensor, positions: Sequence[float]) -> float:
    if options.score == "constant":
        return 1.0
    if options.score == "token":
        return token_score(desc, coords)
    return distribution_score(desc, p, torch.tensor(positions, dtype=p.dtype))


def _overlaps(span: tuple[int, int], written: tuple[int, int]) -> bool:
    # An empty range is a token that begins a character of several tokens.
    return span[0] < written[1] and (span[1] > written[0] or span == (written[0], written[0]))


def _pixels(bins: Sequence[float], record: Record, codec: CoordCodec) -> list[float]:
    return [float(codec.to_pixel(b, (record.width, record.height)[j % 2])) for j, b in enumerate(bins)]
