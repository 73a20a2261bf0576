"""Checks of this machine: packages, torch's build, GPU, triton, torchvision, image processor, folders, hub access."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coordexp import __version__
from coordexp.doctor.checks import Check

SHOWN: Final = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy")
_MADE_BY_DRIVER: Final = Path("/proc/driver/nvidia/version")
_TRUE: Final = ("1", "ON", "YES", "TRUE")


def check_environment() -> list[Check]:
    """All checks of the machine, under ``environment.``."""
    return [
        check_python(platform.python_version(), _declared_python()),
        check_packages(_requirements(), _installed()),
        *_torch_checks(),
        check_torchvision(),
        check_image_processor(),
        *(check_folder(name, path) for name, path in folders().items()),
        check_offline(os.environ),
    ]


def _requirements() -> list[Requirement] | None:
    """What the package asks for, its extras left out; None where it runs from a bare source tree."""
    try:
        declared = metadata.requires("coordexp") or []
    except metadata.PackageNotFoundError:
        return None
    parsed = [Requirement(text) for text in declared]
    return [item for item in parsed if item.marker is None or item.marker.evaluate({"extra": ""})]


def _declared_python() -> str | None:
    try:
        return metadata.metadata("coordexp")["Requires-Python"]
    except (metadata.PackageNotFoundError, KeyError):
        return None


def _installed() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), package.version)
    return found


def check_python(version: str, declared: str | None) -> Check:
    """``environment.python``."""
    seen = f"coordexp {__version__}, Python {version} ({sys.executable})"
    details = {"coordexp": __version__, "python": version, "declared": declared}
    if declared is None:
        return Check("environment.python", "ok", f"{seen}, run from source", details=details)
    if not SpecifierSet(declared).contains(version, prereleases=True):
        return Check("environment.python", "fail", f"{seen}, expected {declared}", f"use a Python {declared}", details)
    return Check("environment.python", "ok", seen, details=details)


def check_packages(declared: list[Requirement] | None, installed: dict[str, str]) -> Check:
    """``environment.packages``: installed versions against the ranges of the package's metadata."""
    shown = ", ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    details: dict[str, Any] = {"installed": {name: installed[name] for name in SHOWN if name in installed}, "problems": {}}
    if declared is None:
        advice = "install the package (pip install -e .) to have the supported ranges checked"
        return Check("environment.packages", "skipped", f"{shown}; no package metadata", advice, details)
    problems = {}
    for item in declared:
        version = installed.get(item.name.lower().replace("_", "-"))
        if version is None:
            problems[item.name] = f"{item.name} {item.specifier} is missing"
        elif not item.specifier.contains(version, prereleases=True):
            problems[item.name] = f"{item.name} {version} is outside {item.specifier}"
    details["problems"] = problems
    if problems:
        wanted = " ".join(f"'{item.name}{item.specifier}'" for item in declared if item.name in problems)
        return Check("environment.packages", "fail", "; ".join(problems.values()), f"pip install {wanted}", details)
    return Check("environment.packages", "ok", f"{shown}: all within the supported ranges", details=details)


def _torch_checks() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "reinstall torch for this machine"
        skipped = [Check(f"environment.{what}", "skipped", "torch cannot be imported") for what in ("gpu", "triton")]
        return [Check("environment.torch", "fail", f"torch cannot be imported: {reason}", advice), *skipped]
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    bf16 = bool(names) and torch.cuda.is_bf16_supported(including_emulation=False)
    has_triton = importlib.util.find_spec("triton") is not None
    return [
        Check("environment.torch", "ok", f"torch {torch.__version__}, build: {build}, {torch.get_num_threads()} CPU threads"),
        check_gpu(names, bf16=bf16, gpu_build=build != "CPU only", driver=_MADE_BY_DRIVER.exists()),
        check_triton(has_triton, gpu=bool(names)),
    ]


def check_gpu(names: list[str], *, bf16: bool, gpu_build: bool, driver: bool) -> Check:
    """``environment.gpu`` from the devices torch sees, whether they compute in bf16, torch's build, and a driver's presence."""
    details = {"devices": names, "bf16": bf16}
    if names:
        seen = f"{len(names)} GPU{'s' * (len(names) > 1)} ({', '.join(sorted(set(names)))}), bf16 {'yes' if bf16 else 'no'}"
        if not bf16:
            return Check("environment.gpu", "warning", seen, "leave model.dtype at float32: this GPU has no bfloat16", details)
        return Check("environment.gpu", "ok", seen, details=details)
    if driver:
        why = "torch's build has no CUDA" if not gpu_build else "torch does not see the GPU"
        advice = (
            "install a CUDA build of torch" if not gpu_build else "compare nvidia-smi's CUDA version with torch's, and CUDA_VISIBLE_DEVICES"
        )
        return Check("environment.gpu", "warning", f"an NVIDIA driver is loaded, but {why}", advice, details)
    return Check("environment.gpu", "ok", "none: everything runs on the CPU, slowly for real models", details=details)


def check_triton(importable: bool, *, gpu: bool) -> Check:
    """``environment.triton``."""
    if importable:
        return Check("environment.triton", "ok", "importable" + ("" if gpu else ": used on a GPU only, the plain torch loss runs here"))
    if gpu:
        advice = "pip install 'coordexp[triton]': without it the loss takes the plain torch path, which is slower"
        return Check("environment.triton", "warning", "not importable", advice)
    return Check("environment.triton", "ok", "not installed, not needed without a GPU")


def check_torchvision() -> Check:
    """``environment.torchvision``: absent is fine, a broken one breaks other packages. Imported in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return Check("environment.torchvision", "ok", "not installed, not needed")
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Check("environment.torchvision", "ok", "importable")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    advice = "uninstall it, or install the build for this torch: peft and Trainer import it where it is there"
    return Check("environment.torchvision", "fail", f"installed, but its import fails: {last}", advice)


def check_image_processor() -> Check:
    """``environment.image_processor``: which of transformers' classes reads pictures here (see ``modeling/load.py``)."""
    try:
        from transformers import Qwen2VLImageProcessorPil
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        return Check("environment.image_processor", "fail", f"Qwen2VLImageProcessorPil cannot be imported: {reason}", "check transformers")
    stock = "importable" if importlib.util.find_spec("torchvision") else "not usable here (no torchvision)"
    seen = f"{Qwen2VLImageProcessorPil.__name__}, read directly from preprocessor_config.json; the stock AutoProcessor is {stock}"
    return Check("environment.image_processor", "ok", seen, details={"class": Qwen2VLImageProcessorPil.__name__})


def folders() -> dict[str, Path]:
    """Folders that commands write to: runs here, temporary files, and the hub's cache."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    return {"runs": Path.cwd() / "runs", "temp": Path(tempfile.gettempdir()), "cache": cache}


def check_folder(name: str, path: Path) -> Check:
    """``environment.folder_<name>``: a file is written and removed in the folder, or in the nearest one above that exists."""
    check, place = f"environment.folder_{name}", path
    while not place.exists() and place != place.parent:
        place = place.parent
    note = "" if place == path else f" (to be made in {place})"
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        advice = "choose another folder, or free it" if name != "cache" else "set HF_HOME to a folder that can be written"
        # Nothing is fetched from a hub unless the user asks for it.
        outcome = "warning" if name == "cache" else "fail"
        return Check(check, outcome, f"{path}{note} cannot be written: {error.strerror}", advice)  # type: ignore[arg-type]
    return Check(check, "ok", f"{path} can be written{note}")


def check_offline(environment: os._Environ[str] | dict[str, str]) -> Check:
    """``environment.offline``."""
    on = environment.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    return Check("environment.offline", "ok", f"HF_HUB_OFFLINE is {'on' if on else 'off'}; models are read from local folders either way")
