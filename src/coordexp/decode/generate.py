"""Generation in batches: a loop of our own, because ``generate`` of transformers feeds one token a row and step.

A token that the grammar forces needs no distribution. It is fed in the same forward pass as the sampled token
before it, so an answer costs one pass per *choice*. Rows of a batch may force different numbers of tokens: each
step's block is padded on the left, the padding is masked out of the cache, and every token has the rope position
it would have alone. Without a grammar nothing is forced, and the tokens are those of ``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, Qwen3VLForConditionalGeneration

from coordexp.data.collate import collate_prompts
from coordexp.data.template import Prompt
from coordexp.decode.automaton import AnswerGrammar
from coordexp.decode.constraints import Follower, Masks, Stopped
from coordexp.vocab.coord_vocab import CoordVocab

# transformers 5.24 renamed the argument.
_CACHE: Final = "cache" if "cache" in inspect.signature(Qwen3VLForConditionalGeneration.forward).parameters else "past_key_values"
# Share of the cache that may be padding before it is squeezed out.
_WASTE: Final = 0.25


class CoordRecorder(LogitsProcessor):
    """Keeps, per step, the slice logits of the rows whose greedy token is a coordinate; changes nothing.

    Only those rows are kept: storing every step's slice would grow with the text around the boxes.
    For ``generate`` of transformers; put it before a ``GrammarProcessor`` to record the model's own distribution.
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
    """One answer.

    ``token_ids`` up to the end token; ``log_probs`` of each under the model's full vocabulary *before* any
    constraint, None for a forced one; ``coord_logits`` ``[M, K]``, one row per coordinate token in order, also
    before the order constraint: the row's highest bin may be one that the order did not allow.
    ``truncated`` when the token budget ended it; ``stopped`` says what other than the model ended the list.
    ``passes`` is the number of forward passes that it took.
    """

    token_ids: list[int]
    coord_logits: Tensor
    truncated: bool
    log_probs: list[float | None] = field(default_factory=list)
    stopped: Stopped | None = None
    passes: int = 0


@dataclass
class _Answer:
    """One row while it is written. ``position`` is the rope position of the next token."""

    follower: Follower | None
    position: int
    ids: list[int] = field(default_factory=list)
    log_probs: list[float | None] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    passes: int = 0
    ended: bool = False

    def force(self) -> list[int]:
        """Take every token that has no alternative; return them."""
        taken: list[int] = []
        while self.follower is not None and (token := self.follower.forced()) is not None:
            self.take(token, None)
            taken.append(token)
        return taken

    def take(self, token: int, log_prob: float | None) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if self.follower is not None:
            self.follower.advance(token)


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Writes answers. ``grammar=None``: unconstrained. ``temperature=0``: greedy; otherwise each row samples with a
    generator of its own, so its answer does not depend on the rest of the batch.

    The chosen token is fed back, whatever readout is reported later.
    """

    model: Any
    tokenizer: Any
    vocab: CoordVocab
    grammar: AnswerGrammar | None = None
    max_new_tokens: int = 256
    max_objects: int = 100
    temperature: float = 0.0
    _masks: list[Masks] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.grammar is not None:
            # Limits that no answer fits into are refused here, before anything is written.
            Follower(self.grammar, max_objects=self.max_objects, max_tokens=self.max_new_tokens)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], *, seeds: Sequence[int] | None = None) -> list[Generated]:
        """Answers of a batch of prompts, in order. ``seeds``: one a row, needed with a temperature."""
        if self.grammar is not None and not self._masks:
            self._masks.append(Masks(self.grammar))
        if self.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("sampling needs one seed a prompt")
        answers = [self._start(prompt) for prompt in prompts]
        randoms = [torch.Generator().manual_seed(seed) for seed in seeds] if seeds is not None and self.temperature > 0 else []
        # What the grammar forces at the head of an answer is fed with the prompt.
        prompts = [replace(p, input_ids=p.input_ids + a.force()) for p, a in zip(prompts, answers, strict=True)]
        # Where only an empty answer has room, nothing is left to choose.
        rows = [i for i, answer in enumerate(answers) if answer.follower is None or not answer.follower.done]
        if not rows:
            return [self._finish(answer) for answer in answers]
        self.model.eval()
        state = _State.prefill(self.model, [prompts[i] for i in rows], self._pad())
        for answer in answers:
            answer.position += len(answer.ids)
        while True:
            feeds = self._choose([answers[i] for i in rows], state.logits, [randoms[i] for i in rows] if randoms else [])
            keep = [n for n, i in enumerate(rows) if not answers[i].ended]
            if not keep:
                break
            rows = [rows[n] for n in keep]
            state.select(keep)
            state.step(self.model, [feeds[n] for n in keep], [answers[i].position for i in rows], self._pad())
            for n, i in zip(keep, rows, strict=True):
                answers[i].position += len(feeds[n])
        return [self._finish(answer) for answer in answers]

    def _pad(self) -> int:
        return int(self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id)

    def _start(self, prompt: Prompt) -> _Answer:
        follower = None
        if self.grammar is not None:
            follower = Follower(self.grammar, max_objects=self.max_objects, max_tokens=self.max_new_tokens)
        config = self.model.config
        images = sum(i == config.image_token_id for i in prompt.input_ids)
        # An image advances the rope by the longer side of its merged grid (Qwen3VLModel.get_rope_index).
        side = int(prompt.image_grid_thw[0, 1:].max()) // config.vision_config.spatial_merge_size
        return _Answer(follower, len(prompt.input_ids) - images + side)

    def _choose(self, answers: Sequence[_Answer], logits: Tensor, randoms: Sequence[torch.Generator]) -> list[list[int]]:
        """Pick a token for every row, record what it was picked from, and return it with the forced tokens after it."""
        raw = logits.float()
        scores = raw
        if self.grammar is not None:
            followers = [a.follower for a in answers if a.follower is not None]
            scores = raw.masked_fill(~self._masks[0](followers, raw), -torch.inf)
        if self.temperature > 0:
            p = torch.softmax(scores / self.temperature, dim=-1).cpu()
            chosen = torch.stack([torch.multinomial(row, 1, generator=random) for row, random in zip(p, randoms, strict=True)])
            chosen = chosen.to(raw.device)
        else:
            chosen = scores.argmax(dim=-1, keepdim=True)
        log_probs = (raw.gather(1, chosen) - raw.logsumexp(dim=-1, keepdim=True)).squeeze(1).tolist()
        tokens = chosen.squeeze(1).tolist()
        first, last = self.vocab.start, self.vocab.start + self.vocab.num_bins
        where = [n for n, token in enumerate(tokens) if first <= token < last]
        # One copy per step, of these rows only.
        slices = dict(zip(where, raw[where, first:last].cpu(), strict=True)) if where else {}
        feeds = []
        for n, (answer, token, log_prob) in enumerate(zip(answers, tokens, log_probs, strict=True)):
            answer.passes += 1
            answer.take(token, log_prob)
            if n in slices:
                answer.logits.append(slices[n])
            feeds.append([token, *answer.force()])
            answer.ended = self._ended(answer)
        return feeds

    def _ended(self, answer: _Answer) -> bool:
        if answer.follower is not None:
            return answer.follower.done
        return answer.ids[-1] == self.tokenizer.eos_token_id or len(answer.ids) >= self.max_new_tokens

    def _finish(self, answer: _Answer) -> Generated:
        complete = answer.ids[-1] == self.tokenizer.eos_token_id
        kept = len(answer.ids) - complete
        stopped = answer.follower.stopped if answer.follower is not None else None
        return Generated(
            token_ids=answer.ids[:kept],
            coord_logits=torch.stack(answer.logits) if answer.logits else torch.zeros(0, self.vocab.num_bins),
            truncated=not complete or stopped == "budget",
            log_probs=answer.log_probs[:kept],
            stopped="budget" if not complete else stopped,
            passes=answer.passes,
        )


@dataclass
class _State:
    """Cache, mask ``[B, cache length]`` of its real entries, and the last logits ``[B, V]``."""

    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    @classmethod
    def prefill(cls, model: Any, prompts: Sequence[Prompt], pad: int) -> _State:
        """The prompts' forward pass."""
        batch = collate_prompts(prompts, pad_token_id=pad, image_token_id=model.config.image_token_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        cache = DynamicCache(config=model.config.get_text_config())
        output = model(**batch, **{_CACHE: cache}, use_cache=True, logits_to_keep=1)
        return cls(cache, batch["attention_mask"], output.logits[:, -1])

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; drop padding from the cache where it has become much."""
        if len(rows) == self.mask.shape[0] and not self._wasteful():
            return
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        longest = int(mask.sum(dim=1).max())
        if longest == mask.shape[1]:
            self._move(lambda x: x[index])
            self.mask = mask
            return
        # Real entries to the right, in their order; keys carry their positions already.
        order = mask.argsort(dim=1, stable=True)[:, -longest:]
        self._move(lambda x: x[index].gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])))
        self.mask = mask.gather(1, order)

    def _wasteful(self) -> bool:
        length = self.mask.shape[1]
        return length - int(self.mask.sum(dim=1).max()) > _WASTE * length

    def _move(self, change: Any) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    def step(self, model: Any, feeds: Sequence[Sequence[int]], positions: Sequence[int], pad: int) -> None:
        """Feed each row's tokens, padded on the left to one block; ``positions`` are their first rope positions."""
        width = max(len(feed) for feed in feeds)
        ids = torch.tensor([[pad] * (width - len(feed)) + list(feed) for feed in feeds])
        here = torch.tensor([[0] * (width - len(feed)) + [1] * len(feed) for feed in feeds])
        place = torch.tensor([[0] * (width - len(f)) + list(range(p, p + len(f))) for f, p in zip(feeds, positions, strict=True)])
        device = self.mask.device
        self.mask = torch.cat([self.mask, here.to(device)], dim=1)
        output = model(
            input_ids=ids.to(device), attention_mask=self.mask, position_ids=place.to(device)[None].expand(3, -1, -1),
            **{_CACHE: self.cache}, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.logits = output.logits[:, -1]


def generate(model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, vocab: CoordVocab, max_new_tokens: int) -> list[Generated]:
    """Greedy unconstrained answers of a batch of prompts."""
    return Generator(model=model, tokenizer=tokenizer, vocab=vocab, max_new_tokens=max_new_tokens)(prompts)
