"""Extending and exporting with the whole model in memory: the plain way, slow, and the reference of the one that reads tensor by tensor."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from coordexp.vocab.extend import add_coord_tokens, initial_rows, padded_rows


@torch.no_grad()
def extend_whole(model, tokenizer, options):
    """The tokens added, the tables resized by transformers, the new rows set, in place."""
    before, tokens = model.get_input_embeddings().weight.shape[0], len(tokenizer)
    vocab = add_coord_tokens(tokenizer)
    model.resize_token_embeddings(padded_rows(len(tokenizer), before), mean_resizing=False)
    digits = [tokenizer.encode(str(k), add_special_tokens=False) for k in range(vocab.num_bins)]
    old = min(before, tokens)
    # A dictionary by storage: a tied table is written once.
    for weight in {w.data_ptr(): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}.values():
        rows = initial_rows(weight[:old], vocab, options.init, digits, options.seed)
        weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
        weight[vocab.start : vocab.start + vocab.num_bins] = rows.to(weight.dtype)
    return vocab


def merge_whole(base, adapter):
    """The model of the folder ``base`` in float32 with the adapter merged by PEFT."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()
