"""The safetensors files of a model folder, read and written one tensor at a time.

A folder is written anew file by file: every tensor stays in the file, at the place and in the type it has, and one that
nothing changes is copied byte for byte. So memory is that of one tensor, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coordexp.errors import ConfigError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

# Types by their names in safetensors. Weights are of the first four; counters and masks may lie beside them.
DTYPES: Final = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. ``make`` computes what is written, of this ``dtype`` and ``shape``; None copies the stored bytes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Shards:
    """The weight files of ``folder`` by name, their entries in the order of their bytes, and the metadata of each file."""

    folder: Path
    files: dict[str, tuple[Entry, ...]]
    metadata: dict[str, dict[str, str] | None]
    index: dict[str, Any] | None

    @property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by its key."""
        return {entry.key: entry for entries in self.files.values() for entry in entries}

    def file_of(self, key: str) -> str:
        """The file that holds ``key``."""
        return next(name for name, entries in self.files.items() if any(entry.key == key for entry in entries))

    def read(self, key: str) -> Tensor:
        """The stored tensor. It is mapped from its file: pages of it take memory as they are touched."""
        return _read(self.folder / self.file_of(key), key)


def _read(file: Path, key: str) -> Tensor:
    # Opened for one tensor only: what else was read would stay mapped as long as the file is open.
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def open_shards(folder: Path) -> Shards:
    """Look at the headers of the folder's weights; no tensor is read.

    Raises:
        ConfigError: no weights, a file that is missing, cut short or of another save than the index, or weights of a type
            that is no plain float.
    """
    files, index = _named_files(folder)
    found: dict[str, tuple[Entry, ...]] = {}
    metadata: dict[str, dict[str, str] | None] = {}
    owner: dict[str, str] = {}
    for name in files:
        found[name], metadata[name] = _header(folder / name)
        for entry in found[name]:
            if owner.setdefault(entry.key, name) != name:
                raise ConfigError(f"{folder}: {entry.key} is in {owner[entry.key]} and in {name}: files of two models are mixed here")
    if index is not None:
        for key, name in index["weight_map"].items():
            if owner.get(key) != name:
                raise ConfigError(f"{folder}/{INDEX}: {key} is not in {name}, as it says: files of two models are mixed here")
        stray = next((key for key in owner if key not in index["weight_map"]), None)
        if stray is not None:
            raise ConfigError(f"{folder}/{owner[stray]}: it holds {stray}, which {INDEX} does not name: files of two models are mixed here")
    return Shards(folder, found, metadata, index)


def _named_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """The files that make up the weights, and the index if there is one."""
    path = folder / INDEX
    if not path.is_file():
        files = [SINGLE] if (folder / SINGLE).is_file() else []
        if not files:
            raise ConfigError(f"{folder}: no {SINGLE} and no {INDEX}: no *.safetensors weights in this folder")
        return files, None
    if (folder / SINGLE).is_file():
        raise ConfigError(f"{folder}: {SINGLE} and {INDEX} are both there: two saves are mixed: remove the one that is not meant")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected an index of weights ({type(error).__name__}: {error})") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{path}: it names {missing[0]}, which is not in the folder ({len(missing)} of {len(names)} files are missing)")
    return names, index


def _header(file: Path) -> tuple[tuple[Entry, ...], dict[str, str] | None]:
    entries = []
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.offset_keys():
                part = opened.get_slice(key)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ConfigError(
                        f"{file}: {key} is of type {part.get_dtype()}: quantised weights cannot be extended, merged or compared: "
                        "start from the bfloat16 checkpoint"
                    )
                entries.append(Entry(key, dtype, tuple(part.get_shape())))
            metadata = opened.metadata()
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file}: its weights cannot be read ({' '.join(str(error).split())[:200]}): copy the file again") from None
    return tuple(entries), metadata


def as_dtype(shards: Shards, dtype: torch.dtype) -> Shards:
    """The same tensors, those that are floats converted to ``dtype``."""

    def converted(entry: Entry) -> Entry:
        if entry.dtype == dtype or not entry.dtype.is_floating_point:
            return entry
        return replace(entry, dtype=dtype, make=lambda: shards.read(entry.key).to(dtype))

    return replace(shards, files={name: tuple(converted(entry) for entry in entries) for name, entries in shards.files.items()})


def with_entries(shards: Shards, entries: dict[str, Entry]) -> Shards:
    """``shards`` with the entries of these keys replaced."""
    files = {name: tuple(entries.get(old.key, old) for old in held) for name, held in shards.files.items()}
    return replace(shards, files=files)


def beside(shards: Shards, key: str, entry: Entry) -> Shards:
    """``shards`` with a new entry at the end of the file that holds ``key``."""
    name = shards.file_of(key)
    return replace(shards, files=shards.files | {name: (*shards.files[name], entry)})


def write_shards(shards: Shards, out: Path, step: Callable[[], None] = lambda: None) -> None:
    """Write every file, and the index if there was one, into the folder ``out``. One tensor is in memory at a time.

    ``step`` is called after each file.

    Raises:
        ConfigError: no room, or a tensor that was made with values that are not finite.
    """
    try:
        for name, entries in shards.files.items():
            if all(entry.make is None for entry in entries):
                shutil.copyfile(shards.folder / name, out / name)
            else:
                _write_file(shards, name, out / name)
            step()
        if shards.index is not None:
            (out / INDEX).write_text(json.dumps(_index(shards), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        size = sum(entry.nbytes for entry in shards.entries.values()) / 1e9
        raise ConfigError(f"{out.parent}: {size:.1f} GB of weights cannot be written ({error.strerror}): choose another disk") from None


def _index(shards: Shards) -> dict[str, Any]:
    old = shards.index or {}
    sizes = {
        "total_parameters": sum(torch.Size(entry.shape).numel() for entry in shards.entries.values()),
        "total_size": sum(entry.nbytes for entry in shards.entries.values()),
    }
    metadata = old.get("metadata") or {}
    return old | {
        "metadata": metadata | {key: size for key, size in sizes.items() if key in metadata},
        "weight_map": {entry.key: name for name, entries in shards.files.items() for entry in entries},
    }


def _write_file(shards: Shards, name: str, out: Path) -> None:
    """One file in the format of safetensors: eight bytes of length, a header in JSON, the tensors one after the other."""
    header: dict[str, Any] = {} if shards.metadata[name] is None else {"__metadata__": shards.metadata[name]}
    end = 0
    for entry in shards.files[name]:
        start, end = end, end + entry.nbytes
        header[entry.key] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shards.files[name]:
            file.write(_bytes(_tensor(shards, name, entry)))


def _tensor(shards: Shards, name: str, entry: Entry) -> Tensor:
    if entry.make is None:
        return _read(shards.folder / name, entry.key)
    tensor = entry.make()
    if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
        raise RuntimeError(f"{entry.key}: {tuple(tensor.shape)} of {tensor.dtype} was made, {entry} was announced")
    if not all(bool(torch.isfinite(part).all()) for part in _parts(tensor)):
        raise ConfigError(f"{shards.folder}: {entry.key} has values that are not finite: the weights or the adapter are damaged")
    return tensor


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    # A check of a whole table would take as much memory again.
    return iter(torch.split(tensor.reshape(-1), 1 << 24))


def _bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
