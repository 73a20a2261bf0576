"""Greedy generation in batches, keeping the coordinate distributions the tokens came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from coordexp.data.collate import collate_prompts
from coordexp.data.template import Prompt
from coordexp.vocab.coord_vocab import CoordVocab


class CoordRecorder(LogitsProcessor):
    """Keeps, per step, the slice logits of the rows whose greedy token is a coordinate; changes nothing.

    Only those rows are kept: storing every step's slice would grow with the text around the boxes.
    """

    def __init__(self, vocab: CoordVocab) -> None:
        self.vocab = vocab
        self.steps: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Record one step; ``scores`` ``[B, V]`` pass through unchanged."""
        best = scores.argmax(dim=-1)
        rows = ((best >= self.vocab.start) & (best < self.vocab.start + self.vocab.num_bins)).nonzero().squeeze(-1)
        self.steps.append((rows.cpu(), scores[rows, self.vocab.start : self.vocab.start + self.vocab.num_bins].float().cpu()))
        return scores


@dataclass(frozen=True)
class Generated:
    """One answer: ``token_ids`` up to the end token; ``coord_logits`` ``[M, K]``, one row per coordinate token in
    order; ``truncated`` when the token budget ran out first."""

    token_ids: list[int]
    coord_logits: Tensor
    truncated: bool


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, vocab: CoordVocab, max_new_tokens: int) -> list[Generated]:
    """Greedy answers of a batch of prompts. The generated token is fed back, whatever readout is reported later."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = collate_prompts(prompts, pad_token_id=pad, image_token_id=model.config.image_token_id)
    batch = {k: v.to(model.device) for k, v in batch.items()}
    recorder = CoordRecorder(vocab)
    model.eval()
    sequences = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        # Checkpoints ship their own sampling settings; greedy must not inherit them.
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([recorder]),
    )
    new = sequences[:, batch["input_ids"].shape[1] :].cpu()
    return [_answer(new[b].tolist(), b, recorder, tokenizer.eos_token_id) for b in range(len(prompts))]


def _answer(ids: list[int], row: int, recorder: CoordRecorder, eos: int) -> Generated:
    ended = eos in ids
    kept = ids[: ids.index(eos)] if ended else ids
    logits = [values[rows == row] for rows, values in recorder.steps[: len(kept)]]
    stacked = torch.cat(logits) if logits else torch.zeros(0, recorder.vocab.num_bins)
    coordinates = sum(recorder.vocab.start <= i < recorder.vocab.start + recorder.vocab.num_bins for i in kept)
    if coordinates != stacked.shape[0]:
        raise RuntimeError(f"{coordinates} coordinate tokens but {stacked.shape[0]} recorded distributions: the scores were changed")
    return Generated(kept, stacked, truncated=not ended)
