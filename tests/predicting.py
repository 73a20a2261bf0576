"""A small model that knows two answers, and predictions with it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

from coordexp.decode.options import DecodeOptions
from coordexp.decode.predict import predict
from tiny import fitted_model, records, template, vocab, workspace

OPTIONS = DecodeOptions(batch_size=2, max_new_tokens=130)
TRAIN = workspace() / "data" / "train.jsonl"


@lru_cache
def model():
    return fitted_model()


def run(out, options=OPTIONS, count=5, **more):
    return predict(model(), template(), records("train")[:count], out, vocab=vocab(), options=options, **more)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@lru_cache
def whole():
    """An uninterrupted prediction with saved distributions, and its bytes."""
    out = workspace() / "whole" / "p.jsonl"
    run(out, replace(OPTIONS, save_distributions=True))
    return out, out.read_bytes()
