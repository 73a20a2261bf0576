"""Writing files and folders so that nothing half-written is ever left under the final name, and removing none but our own. stdlib only.

Temporary names are random and made exclusively: no file or link of another program is ever written through or removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

from coordexp.errors import ConfigError, DataError

# Marks a folder that is being filled; held locked by whoever fills it, so one without an owner may be deleted.
_MARKER: Final = ".coordexp-staging"
# Left in a finished folder: the names that were written there. Only such a folder is ever replaced.
OWN: Final = ".coordexp.json"


def temporary_beside(path: Path) -> Path:
    """A free name in the same folder that nobody can foresee; to be opened with mode ``x``, or made with ``mkdir``."""
    return path.with_name(f".{path.name[:60]}.{secrets.token_hex(8)}.tmp")


@contextmanager
def atomic_text(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that replaces ``path`` when the block ends, and vanishes when it raises.

    Half of a surrogate pair, which UTF-8 has no bytes for (a file name that is no UTF-8 holds some), is written as its escape
    ``\\udcff``, which JSON reads back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with temporary.open("x", encoding="utf-8", newline="\n", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def staged_folder(
    out: Path, *, kind: str | None = None, overwrite: bool = False, add: bool = False, known: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """A folder to fill; it is renamed to ``out`` when the block ends and removed when it raises.

    An existing ``out`` must be empty. With ``overwrite`` it may be a folder of the same ``kind`` that this function wrote, and to
    which nothing was added; it is then replaced as a whole. Without a ``kind`` the folder is not marked, and never replaced.
    ``known`` recognises folders of before there were marks. With ``add`` the new folder begins with what such a folder holds
    (links stay links, files are shared).

    Raises:
        ConfigError: ``out`` is in use.
    """
    out = Path(os.path.abspath(out))
    replaced = _check_target(out, kind, overwrite or add, known)
    _sweep(out)
    staging = temporary_beside(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        with (staging / _MARKER).open("xb") as marker:
            _lock(marker.fileno())
            if add and replaced:
                keep = shutil.ignore_patterns(OWN)
                shutil.copytree(out, staging, symlinks=True, ignore=keep, dirs_exist_ok=True, copy_function=_share)
            yield staging
            (staging / _MARKER).unlink()
            if kind is not None:
                _sign(staging, kind)
            if replaced:
                shutil.rmtree(out)
            elif out.exists():
                out.rmdir()
            os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _share(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sign(folder: Path, kind: str) -> None:
    names = sorted(entry.name for entry in folder.iterdir())
    with (folder / OWN).open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps({"schema": 1, "kind": kind, "entries": names}, indent=1, ensure_ascii=False) + "\n")


def _lock(handle: int) -> bool:
    """Whether the lock was free; False too on file systems that know no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(out: Path) -> None:
    """Remove what a killed call left beside ``out``."""
    for left in out.parent.glob(f".{_literal(out.name[:60])}.*.tmp") if out.parent.is_dir() else ():
        marker = left / _MARKER
        if left.is_symlink() or not marker.is_file():
            continue
        with marker.open("rb") as file:
            if _lock(file.fileno()):
                shutil.rmtree(left, ignore_errors=True)


def _literal(name: str) -> str:
    """``name`` in a pattern of ``glob``."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _check_target(out: Path, kind: str | None, overwrite: bool, known: Callable[[Path], bool] | None) -> bool:
    """Whether ``out`` holds a folder of ours that is to be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out}: expected a folder or nothing there, got a file or a link: choose another output folder")
    entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if entries and not overwrite:
        raise ConfigError(f"{out} is not empty: choose another output folder, or remove it (--overwrite, where the command has it)")
    if not entries or (known is not None and known(out)):
        return bool(entries)
    # A mistyped folder must not cost the user anything that this package did not write.
    own = _own_names(out, kind)
    if own is None:
        raise ConfigError(f"{out} is no {kind} that coordexp wrote ({OWN} says so): choose another output folder, or remove it yourself")
    foreign = [name for name in entries if name not in own]
    if foreign:
        raise ConfigError(f"{out} holds {foreign[0]!r}, which this command did not write: move it away, or choose another output folder")
    return True


def _own_names(folder: Path, kind: str | None) -> set[str] | None:
    """The names that were written to a folder of ours of this kind; None for another one."""
    content: Any = read_json(folder / OWN)
    names = content.get("entries") if isinstance(content, dict) and content.get("schema") == 1 and content.get("kind") == kind else None
    return {OWN, *names} if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def read_json(path: Path) -> Any:
    """The content of a small JSON file, None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def link_or_copy(image: Path, target: Path, *, copy: bool, command: str) -> None:
    """Put an image into a data set by a link, or as a copy.

    Raises:
        DataError: it cannot be; ``command`` has the option ``--copy``.
    """
    try:
        if copy:
            shutil.copyfile(image, target)
        else:
            os.symlink(image, target)
    except OSError as error:
        advice = "check the file" if copy else f"{command} with --copy where links are not possible"
        raise DataError(f"{image}: cannot be {'copied' if copy else 'linked'} to {target.name} ({error.strerror}): {advice}") from error
