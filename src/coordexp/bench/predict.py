"""Boxes per second of constrained decoding against ``generate`` of transformers, same model, images and batches.

Interleaved rounds, the first of which warms up. Images are opened and the prompts made before the clock starts;
an answer's boxes are those that the parser reads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LogitsProcessorList

from coordexp.bench.measure import circumstances, spread
from coordexp.data.collate import collate_prompts
from coordexp.data.options import DEFAULT_PROMPT
from coordexp.data.records import read_records
from coordexp.data.template import ChatTemplate, Prompt
from coordexp.decode.automaton import AnswerGrammar
from coordexp.decode.generate import CoordRecorder, Generator
from coordexp.grammar import parse
from coordexp.modeling.load import choose_device, load_image_processor, load_model, load_tokenizer
from coordexp.vocab.coord_vocab import CoordVocab

# A call returns the answers' texts and its forward passes.
Call = Callable[[Sequence[Prompt]], tuple[list[str], int]]


@dataclass(frozen=True, kw_only=True)
class PredictBench:
    """What is measured; ``rounds`` are counted after one that warms up."""

    model: Path
    data: Path
    rounds: int = 7
    limit: int = 100
    batch_size: int = 50
    max_new_tokens: int = 150
    device: str = "cpu"


def variants(bench: PredictBench, model: Any, tokenizer: Any) -> dict[str, Call]:
    """``generate`` (keeping the coordinate distributions, as a prediction does), our loop without and with the grammar."""
    vocab = CoordVocab.from_tokenizer(tokenizer)

    def stock(prompts: Sequence[Prompt]) -> tuple[list[str], int]:
        batch = collate_prompts(prompts, pad_token_id=tokenizer.pad_token_id, image_token_id=model.config.image_token_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        recorder = CoordRecorder(vocab)
        ids = model.generate(
            **batch, max_new_tokens=bench.max_new_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, logits_processor=LogitsProcessorList([recorder]),
        )  # fmt: skip
        new = ids[:, batch["input_ids"].shape[1] :].tolist()
        cut = [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in new]
        return [tokenizer.decode(row) for row in cut], len(recorder.steps)

    def own(grammar: AnswerGrammar | None) -> Call:
        generator = Generator(
            model=model, tokenizer=tokenizer, vocab=vocab, grammar=grammar, max_new_tokens=bench.max_new_tokens
        )  # fmt: skip

        def call(prompts: Sequence[Prompt]) -> tuple[list[str], int]:
            answers = generator(prompts)
            return [tokenizer.decode(a.token_ids) for a in answers], max(a.passes for a in answers)

        return call

    return {"generate": stock, "unconstrained": own(None), "constrained": own(AnswerGrammar(tokenizer, vocab))}


def measure(bench: PredictBench, progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """One row a variant: boxes/s (p20, p50, p80 over rounds), forward passes, parse rate, and the circumstances."""
    tokenizer = load_tokenizer(bench.model)
    bench = replace(bench, device=choose_device(bench.device))
    model = load_model(bench.model).to(bench.device).eval()
    template = ChatTemplate(tokenizer, load_image_processor(bench.model), prompt=DEFAULT_PROMPT)
    records = read_records(bench.data, limit=bench.limit).records
    prompts = [template.encode_prompt(record) for record in records]
    batches = [prompts[i : i + bench.batch_size] for i in range(0, len(prompts), bench.batch_size)]
    calls = variants(bench, model, tokenizer)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    facts: dict[str, dict[str, Any]] = {}
    for number in range(bench.rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            done = [call(batch) for batch in batches]
            seconds = time.perf_counter() - begin
            answers = [parse(text) for texts, _ in done for text in texts]
            boxes = sum(len(answer.instances) for answer in answers)
            if number:
                rates[name].append(boxes / seconds)
            facts[name] = {
                "boxes": boxes,
                "passes": sum(passes for _, passes in done),
                "parse_rate": f"{sum(not answer.problems for answer in answers) / len(answers):.4f}",
            }
        if progress is not None:
            progress(number + 1, bench.rounds + 1)
    base = statistics.median(rates["generate"])
    return [_row(bench, name, values, base, len(records)) | facts[name] for name, values in rates.items()]


def _row(bench: PredictBench, name: str, values: Sequence[float], base: float, images: int) -> dict[str, Any]:
    p20, p50, p80 = spread(values)
    return {
        "variant": name, "images": images, "batch_size": bench.batch_size, "max_new_tokens": bench.max_new_tokens, "n": len(values),
        "p20_boxes_s": f"{p20:.2f}", "p50_boxes_s": f"{p50:.2f}", "p80_boxes_s": f"{p80:.2f}", "ratio_to_generate": f"{p50 / base:.3f}",
        **circumstances(bench.device, "transformers"),
    }  # fmt: skip
