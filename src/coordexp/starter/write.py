"""Write an experiment to start from into a user's folder. Standard library only."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError

Kind = Literal["demo", "detection"]
KINDS: Final[tuple[Kind, ...]] = ("demo", "detection")


def starter_files(kind: Kind) -> dict[str, str]:
    """Text by file name: ``KIND.yaml`` and ``README.md``, from the package's own data."""
    folder = files("coordexp.starter") / kind
    return {name: (folder / name).read_text(encoding="utf-8") for name in (f"{kind}.yaml", "README.md")}


def write_starter(out: Path, kind: Kind) -> list[Path]:
    """Write the files of ``kind`` into the folder ``out``, which is made where it is missing; returns their paths.

    Raises:
        ConfigError: ``out`` is a file, or one of the files is there already; nothing is written then.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: expected a folder or nothing there, got a file: choose another name")
    content = starter_files(kind)
    for name in content:
        if (out / name).exists() or (out / name).is_symlink():
            raise ConfigError(f"{out / name} exists and is left as it is: choose another folder, or move it away")
    for name, text in content.items():
        with atomic_text(out / name) as file:
            file.write(text)
    return [out / name for name in content]
