"""The run directory and its ``manifest.json``: what ran, with which code and versions, and how far it came.

The manifest is written when the directory is made and again at every change, each time in full and
atomically. Its status says ``running`` until :meth:`RunDirectory.finish`, so that a directory whose run was
killed is never taken for a complete one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, get_args

from coordexp.data.staging import atomic_text
from coordexp.errors import ConfigError, DataError

Status = Literal["running", "complete", "failed", "interrupted"]
PACKAGES: Final = ("coordexp", "torch", "transformers", "tokenizers", "accelerate", "peft", "numpy")
MANIFEST: Final = "manifest.json"


class RunDirectory:
    """A run directory on disk and its manifest in memory.

    ``path`` is the directory; ``manifest`` the content of ``manifest.json``, changed through the methods only.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, writes: bool = True) -> None:
        self.path = path
        self.manifest = manifest
        self.writes = writes

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        name: str,
        config_yaml: str,
        command: list[str],
        convention: str = "norm999",
        overwrite: bool = False,
    ) -> RunDirectory:
        """Make the directory with ``config.yaml`` and a manifest of status ``running``.

        ``overwrite`` removes an older run directory first; only one with a manifest of ours, and without another run in it.

        Raises:
            ConfigError: the path is a file or a link, or a directory that is not empty (without ``overwrite``), or one
                that is not empty and no run directory (always).
        """
        root = Path(path)
        _make_room(root, overwrite)
        root.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {
            "schema": 1,
            "name": name,
            "status": "running",
            "stage": None,
            "started": _now(),
            "finished": None,
            "command": _as_typed(command),
            "config_sha256": hashlib.sha256(config_yaml.encode()).hexdigest(),
            "git": git_state(),
            "versions": versions(),
            "hardware": hardware(),
            "convention": convention,
            "files": {},
            "stages": {},
            "notes": [],
        }
        run = cls(root, manifest)
        with atomic_text(root / "config.yaml") as file:
            file.write(config_yaml)
        run._save()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writes: bool = True) -> RunDirectory:
        """The run directory at ``path`` as it stands. ``writes=False``: changes stay in memory (another process writes them).

        Raises:
            DataError: no manifest, or none of ours.
        """
        content = read_manifest(Path(path))
        if not is_ours(content):
            raise DataError(f"{Path(path) / MANIFEST}: expected the manifest of a run of coordexp, got another file of that name")
        return cls(Path(path), content, writes=writes)

    def resume(self, command: list[str]) -> None:
        """Set the status back to ``running``; the time, the command and where the run stood go to ``resumed``."""
        entry = {"at": _now(), "status": self.manifest["status"], "stage": self.manifest["stage"], "command": _as_typed(command)}
        self.manifest.setdefault("resumed", []).append(entry)
        now = {"git": git_state(), "versions": versions()}
        for name, value in now.items():
            if self.manifest[name] != value:
                self.manifest["notes"].append(
                    f"resumed with another {name}: {json.dumps(value)}, begun with {json.dumps(self.manifest[name])}"
                )
        self.manifest.update(status="running", finished=None)
        self._save()

    def remaining(self, stages: Sequence[str]) -> tuple[str, ...]:
        """The stages from the one the run stopped in; those before it are done."""
        stopped = self.manifest["stage"]
        first = next((i for i, name in enumerate(stages) if name == stopped or name not in self.manifest["stages"]), len(stages))
        return tuple(stages[first:])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record ``name`` as the running stage, and its seconds when it ends, however it ends.

        After an exception ``stage`` keeps the name: it says where the run stopped. A stage entered again adds up.
        """
        self.manifest["stage"] = name
        self._save()
        begin = time.monotonic()
        ended = False
        try:
            yield
            ended = True
        finally:
            seconds = self.manifest["stages"].get(name, 0.0) + time.monotonic() - begin
            self.manifest["stages"][name] = round(seconds, 3)
            if ended:
                self.manifest["stage"] = None
            # The accelerator is only known once a stage has loaded torch.
            self.manifest["hardware"] = hardware()
            self.manifest["peak_memory_mib"] = peak_memory()
            self._save()

    def finish(self, status: Status) -> None:
        """Set the final status and the time. ``failed`` and ``interrupted`` keep the stage they stopped in."""
        self.manifest["status"] = status
        self.manifest["finished"] = _now()
        if status == "complete":
            self.manifest["stage"] = None
        self._save()

    def note(self, text: str) -> None:
        """Append one line to the notes that the report shows."""
        self.manifest["notes"].append(text)
        self._save()

    def add_file(self, relative: str) -> str:
        """Record the SHA-256 of a file of this directory under ``files`` and return it.

        Raises:
            DataError: no such file.
        """
        target = self.path / relative
        if not target.is_file():
            raise DataError(f"{target}: expected a file to record in the manifest, found none")
        digest = file_sha256(target)
        self.manifest["files"][relative] = digest
        self._save()
        return digest

    def _save(self) -> None:
        if self.writes:
            with atomic_text(self.path / MANIFEST) as file:
                file.write(json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")


def _as_typed(command: list[str]) -> list[str]:
    """The shell may expand the program's own name to a path of this machine; the arguments stay as typed."""
    return [Path(word).name if i == 0 else word for i, word in enumerate(command)]


def is_ours(content: dict[str, Any]) -> bool:
    """Whether this is the content of a manifest that :meth:`RunDirectory.create` writes; other programs use the file name too."""
    kinds = {"schema": int, "status": str, "config_sha256": str, "command": list, "versions": dict, "stages": dict}
    return all(isinstance(content.get(key), kind) for key, kind in kinds.items()) and content["status"] in get_args(Status)


def _make_room(root: Path, overwrite: bool) -> None:
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root}: expected a directory for the run, found a file: choose another output_dir")
    if not root.is_dir() or not any(root.iterdir()):
        return
    if not (root / MANIFEST).is_file():
        raise ConfigError(f"{root}: not empty and has no {MANIFEST}, so it is no run directory: choose another output_dir")
    try:
        found = read_manifest(root)
    except DataError as error:
        raise ConfigError(f"{error}: it is left as it is, remove it yourself or choose another output_dir") from error
    if not is_ours(found):
        raise ConfigError(f"{root}: its {MANIFEST} is not that of a run, so it is left as it is: choose another output_dir")
    if not overwrite:
        state = f"a run with status {found['status']!r}" + (f" in stage {found['stage']!r}" if found.get("stage") else "")
        raise ConfigError(f"{root}: already holds {state}: choose another output_dir, continue it with --resume, or pass --overwrite")
    within = sorted(child.name for child in root.iterdir() if (child / MANIFEST).is_file())
    if root.is_symlink() or within:
        what = "is a link" if root.is_symlink() else f"holds another run, {within[0]}"
        raise ConfigError(f"{root}: {what}, and is not removed: choose another output_dir, or remove it yourself")
    shutil.rmtree(root)


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Content of ``manifest.json``.

    Raises:
        DataError: the file is missing or is not a JSON object.
    """
    path = run_dir / MANIFEST
    if not path.is_file():
        raise DataError(f"{run_dir}: no {MANIFEST}: expected a run directory")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def git_state(source: Path | None = None) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the repository that tracks ``source`` (this package), or None.

    A package installed inside some other repository is not tracked there: that repository's commit would say
    nothing about this code. ``dirty``: a tracked file differs from the commit.
    """
    where = source or Path(__file__).resolve()
    if _git(where.parent, "ls-files", "--error-unmatch", where.name) is None:
        return None
    commit = _git(where.parent, "rev-parse", "HEAD")
    changes = _git(where.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git is missing, hangs or fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """System, processor, cores, memory in GiB and CUDA devices; torch is asked only if something else loaded it."""
    found: dict[str, Any] = {"system": platform.system(), "machine": platform.machine(), "cpu_count": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            found["processor"] = names[0]
    names_of_sysconf = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    if "SC_PHYS_PAGES" in names_of_sysconf and "SC_PAGE_SIZE" in names_of_sysconf:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["cuda"] = [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 1)} for d in devices]
    return found


def peak_memory() -> dict[str, float]:
    """The most memory this process has held, in MiB: ``host`` (resident), and ``device`` (allocated on GPUs) if torch is loaded."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, KiB elsewhere
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    return {name: round(value, 1) for name, value in found.items()}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
