"""Renaming predicted descriptions to those of the records by similarity of meaning. The text model is handed in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from coordexp.evaluate.samples import FloatArray, normalise

Embed = Callable[[Sequence[str]], FloatArray]


def nearest_names(predicted: Iterable[str], true: Iterable[str], embed: Embed, *, similarity: float) -> dict[str, str]:
    """For normalised predicted descriptions that no record has: the most similar true one, where similar enough.

    ``embed`` gives one vector a text, ``[N, D]``; similarity is the cosine. Of equally similar names the first in the alphabet.

    Raises:
        ValueError: vectors that are not finite, or of length 0.
    """
    names = sorted({normalise(text) for text in true})
    unknown = sorted({normalise(text) for text in predicted} - set(names))
    if not names or not unknown:
        return {}
    vectors = np.asarray(embed([*names, *unknown]), dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("expected finite vectors of the text model, other than 0")
    unit = vectors / lengths
    cosine = unit[len(names) :] @ unit[: len(names)].T
    best = cosine.argmax(axis=1)
    return {text: names[k] for text, k, row in zip(unknown, best.tolist(), cosine, strict=True) if row[k] >= similarity}
