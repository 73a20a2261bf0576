"""From a record to token ids: one set of messages, one tokenisation, for training, prediction and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coordexp.codec import CoordCodec
from coordexp.data.answers import ask, record_instances
from coordexp.data.options import DEFAULT_PROMPT, AnswerGeometry
from coordexp.data.records import Record, open_image
from coordexp.errors import ConfigError, DataError
from coordexp.grammar import ROLE_CODES, Instance, render, token_roles
from coordexp.vocab.coord_vocab import CoordVocab

IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True)
class Prompt:
    """Token ids of the prompt and the image's patches ``[P, C]`` with their grid ``[1, 3]``."""

    input_ids: list[int]
    pixel_values: Tensor
    image_grid_thw: Tensor


@dataclass(frozen=True)
class Example:
    """A tokenised sample, nothing shifted: lists run over the L tokens of the chat.

    ``roles`` are ``grammar.ROLE_CODES`` (0 where unsupervised); ``centers`` and ``extents`` are NaN except
    at coordinate tokens; ``slots`` is the index of the value within its object (0..3 for x1, y1, x2, y2)
    or -1.
    """

    input_ids: list[int]
    roles: list[int]
    centers: list[float]
    extents: list[float]
    slots: list[int]
    pixel_values: Tensor
    image_grid_thw: Tensor
    image_id: str
    adjusted_boxes: int = 0


def build_messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    """Chat messages: image first, then text; with ``answer``, the assistant's turn too."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return [user] if answer is None else [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@dataclass(frozen=True)
class ChatTemplate:
    """Renders and tokenises. ``order='random'`` is a pure function of ``seed``, epoch and image id.

    ``prompt`` and ``geometry``: see :class:`coordexp.data.options.DataOptions`.
    """

    tokenizer: Any
    image_processor: Any
    codec: CoordCodec = field(default_factory=CoordCodec)
    prompt: str = DEFAULT_PROMPT
    order: str = "sorted"
    seed: int = 0
    geometry: AnswerGeometry = "recorded"

    def instances(self, record: Record, epoch: int = 0) -> tuple[list[Instance], int]:
        """The record's objects as bins, in answer order, and how many boxes had to be reopened."""
        return record_instances(record, self.codec, geometry=self.geometry, order=self.order, seed=self.seed, epoch=epoch)

    def encode_prompt(self, record: Record) -> Prompt:
        """The record's image and question, up to and including the assistant's header; its objects are not looked at."""
        features = self.image_processor(images=[open_image(record)], return_tensors="pt")
        text = self._expand(self._chat(build_messages(ask(self.prompt, record)), generate=True), features["image_grid_thw"])
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(ids, features["pixel_values"], features["image_grid_thw"])

    def encode(self, record: Record, epoch: int = 0) -> Example:
        """The whole chat of a record, tokenised once, with roles from the character offsets."""
        instances, adjusted = self.instances(record, epoch)
        features = self.image_processor(images=[open_image(record)], return_tensors="pt")
        grid = features["image_grid_thw"]
        tokens = self.encode_answer(ask(self.prompt, record), instances, grid)
        self._check_roles(tokens, record)
        return Example(
            **tokens,
            pixel_values=features["pixel_values"],
            image_grid_thw=grid,
            image_id=record.image_id,
            adjusted_boxes=adjusted,
        )

    @cached_property
    def _coord_ids(self) -> range:
        return CoordVocab.from_tokenizer(self.tokenizer, self.codec.num_bins).ids

    def _check_roles(self, tokens: dict[str, Any], record: Record) -> None:
        """Roles come from the rendering, coordinate labels from token ids: where the two differ nothing can be trusted.

        Raises:
            DataError: such a token, with the record.
        """
        for token, role in zip(tokens["input_ids"], tokens["roles"], strict=True):
            if role != ROLE_CODES["none"] and (token in self._coord_ids) != (role == ROLE_CODES["coord"]):
                raise DataError(
                    f"{record.source}: token {self.tokenizer.decode([token])!r} is "
                    f"{'a coordinate inside other text' if token in self._coord_ids else 'no coordinate where one was written'}: "
                    "change the description, or check that the tokenizer keeps coordinate tokens whole"
                )

    def encode_answer(self, question: str, instances: list[Instance], grid: Tensor) -> dict[str, Any]:
        """``input_ids``, ``roles``, ``centers``, ``extents`` and ``slots`` of question and answer.

        Raises:
            ConfigError: a chat template whose full text does not start with its prompt, or a tokenizer
                that joins the two.
        """
        rendered = render(instances)
        prompt = self._expand(self._chat(build_messages(question), generate=True), grid)
        whole = self._expand(self._chat(build_messages(question, rendered.text), generate=False), grid)
        end_of_turn = self.tokenizer.eos_token
        expected = prompt + rendered.text + end_of_turn
        if not whole.startswith(expected):
            raise ConfigError("the chat template changes the answer or its prompt: expected prompt + answer + end-of-turn token")
        encoded = self.tokenizer(expected, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        first = next(i for i, (start, _) in enumerate(offsets) if start >= len(prompt))
        if offsets[first][0] != len(prompt):
            raise ConfigError("the tokenizer joins prompt and answer into one token: supervision would start inside it")
        inner = [(start - len(prompt), end - len(prompt)) for start, end in offsets[first:]]
        roles, slots = token_roles(inner, rendered.spans)
        pad = [float("nan")] * first
        return {
            "input_ids": encoded["input_ids"],
            "roles": [ROLE_CODES["none"]] * first + roles,
            "centers": pad + [float("nan") if s is None else instances[s[0]].centers[s[1]] for s in slots],
            "extents": pad + [float("nan") if s is None else instances[s[0]].extents[s[1]] for s in slots],
            "slots": [-1] * first + [-1 if s is None else s[1] for s in slots],
        }

    def _chat(self, messages: list[dict[str, Any]], *, generate: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        if text.count(IMAGE_TOKEN) != 1:
            raise ConfigError(f"the chat template must place one {IMAGE_TOKEN} for one image, it placed {text.count(IMAGE_TOKEN)}")
        return text

    def _expand(self, text: str, grid: Tensor) -> str:
        count = int(torch.as_tensor(grid).prod()) // int(self.image_processor.merge_size) ** 2
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * count)
