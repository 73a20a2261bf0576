"""Writing files and folders so that nothing half-written is ever left under the final name. stdlib only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from coordexp.errors import ConfigError

# Marks a staging folder as ours: only such a folder, left by an interrupted call, may be deleted.
_MARKER = ".coordexp-staging"


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that replaces ``path`` when the block ends, and vanishes when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder ``<out>.tmp`` to fill; it is renamed to ``out`` when the block ends and removed when it raises.

    An existing ``out`` must be empty. With ``overwrite=True`` it may be a data folder, i.e. hold nothing
    but ``*.jsonl`` files, ``import.json`` and ``images``, which is then replaced as a whole.

    Raises:
        ConfigError: ``out`` is in use, or ``<out>.tmp`` exists and is not ours.
    """
    out = Path(os.path.abspath(out))
    replaced = _check_target(out, overwrite)
    staging = out.with_name(out.name + ".tmp")
    if staging.exists():
        if not (staging / _MARKER).is_file():
            raise ConfigError(f"{staging} exists and is needed for writing {out.name}: move it away or choose another output folder")
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    try:
        (staging / _MARKER).touch()
        yield staging
        (staging / _MARKER).unlink()
        if replaced:
            shutil.rmtree(out)
        elif out.exists():
            out.rmdir()
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_target(out: Path, overwrite: bool) -> bool:
    """Whether ``out`` holds an old data folder that is to be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out}: expected a folder or nothing there, got a file or a link: choose another output folder")
    entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if entries and not overwrite:
        raise ConfigError(f"{out} is not empty: choose another output folder, or remove it (--overwrite, where the command has it)")
    # A mistyped folder must not cost the user anything that is not a data set.
    foreign = [name for name in entries if name not in ("images", "import.json") and not name.endswith(".jsonl")]
    if foreign:
        raise ConfigError(f"{out} holds {foreign[0]!r}, which is not part of a data set: choose another output folder")
    return bool(entries)
