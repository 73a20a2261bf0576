"""TensorBoard event files as rows. Uses TensorBoard's own record reader; needs neither torch nor tensorflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from coordexp.errors import DataError
from coordexp.runs.logs import EVAL_PREFIX, EVENTS, SUMMARY_KEYS, RowCollector, RunLog
from coordexp.runs.names import kept_name

_TRAIN: Final = "train/"
# Trainer writes its arguments as one text.
_ARGUMENTS: Final = "args/text_summary"
# Tags that would be read as a row's own fields.
_NOT_METRICS: Final = frozenset({"step", "kind", "log_history", "global_step", "global_step/max_steps"})


def read_events(path: Path) -> RunLog:
    """An event file, or all of a folder in the order of their names (a resumed run adds one).

    ``train/KEY`` is a training value ``KEY``, ``eval/KEY`` (``val/KEY``, ``val_KEY``) an ``eval_KEY``; other tags keep their name.
    TensorBoard keeps 32-bit floats. Of two values of one tag at one step in one file the later counts.

    Raises:
        DataError: no such file, or no scalar in it.
    """
    files = sorted(p for p in path.glob(EVENTS) if p.is_file()) if path.is_dir() else [path]
    collector = RowCollector(path.name)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: cannot be read: no such file")
        rows: dict[tuple[bool, int], dict[str, Any]] = {}
        for step, tag, value in _scalars(file, collector):
            key = tag.removeprefix(_TRAIN)
            if key in _NOT_METRICS:
                continue
            # Trainer's own summary comes as train/train_loss; a plain train_loss is another program's loss.
            if key in SUMMARY_KEYS and (key != "train_loss" or tag.startswith(_TRAIN)):
                collector.summary[key] = value
                continue
            key = kept_name(key)
            rows.setdefault((key.startswith(EVAL_PREFIX), step), {"step": step})[key] = value
        for _, row in sorted(rows.items(), key=lambda item: item[0][1]):
            collector.add(row, f"{file}: step {row['step']}")
    if not any(collector.rows.values()):
        raise DataError(f"{path}: no scalar values: expected TensorBoard event files of a training run")
    return collector.finish("tensorboard")


def _scalars(file: Path, collector: RowCollector) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of every scalar; the trainer's arguments go to the collector's settings."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util import tensor_util

    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield event.step, value.tag, value.simple_value
            elif kind == "tensor" and (value.tag == _ARGUMENTS or value.metadata.plugin_data.plugin_name == "scalars"):
                try:
                    item = tensor_util.make_ndarray(value.tensor).item()
                    number = None if value.tag == _ARGUMENTS else float(item)
                except (ValueError, TypeError, LookupError):
                    collector.notes.append(f"{file.name}: step {event.step}: {value.tag[:80]!r} holds no single value and was left out")
                    continue
                if number is None:
                    collector.settings.update(_arguments(item))
                else:
                    yield event.step, value.tag, number


def _arguments(text: object) -> dict[str, Any]:
    try:
        content = json.loads(text) if isinstance(text, str | bytes) else None
    except (ValueError, RecursionError):
        # Some other program's text under the same tag.
        return {}
    return content if isinstance(content, dict) else {}
