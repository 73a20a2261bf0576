"""Vectors of short texts from a local text model, for semantic matching of descriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError

_BATCH = 64


def text_embedder(folder: Path) -> Callable[[Sequence[str]], NDArray[np.float64]]:
    """A function from texts to vectors ``[N, D]``: the mean of the model's last hidden states over a text's tokens.

    Any encoder that ``transformers.AutoModel`` loads from a local folder with its tokenizer; nothing is downloaded.

    Raises:
        ConfigError: a folder that holds no such model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: expected the folder of a text model (config.json, weights, tokenizer), found none")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder}: expected a text model that transformers can load, got: {reason}") from error
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"{folder}: expected a tokenizer with a padding token, got none: choose a text encoder")

    def embed(texts: Sequence[str]) -> NDArray[np.float64]:
        parts = []
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state.double()
            mask = batch["attention_mask"].unsqueeze(-1).double()
            parts.append(((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)).numpy())
        return np.concatenate(parts)

    return embed
