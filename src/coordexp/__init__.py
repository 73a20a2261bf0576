"""Train, decode, evaluate and audit vision-language models that point by writing coordinate tokens.

Names are loaded on first use, so that ``import coordexp`` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "CoordCodec": "coordexp.codec",
    "CoordObjective": "coordexp.losses.objective",
    "CoordTrainer": "coordexp.train.trainer",
    "CoordVocab": "coordexp.vocab.coord_vocab",
    "linear_coord_loss": "coordexp.losses.linear",
    "parse": "coordexp.grammar",
    "render": "coordexp.grammar",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'coordexp' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
