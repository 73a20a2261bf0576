"""The machine: versions, torch build, GPU, triton, bfloat16, image processor, folders."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final

from coordexp.doctor.base import Check

LEAST_FREE_GB: Final = 5.0


def check_machine() -> list[Check]:
    """Everything that needs no file of the user."""
    return [*check_versions(), *check_torch(), check_triton(), check_image_processor(), *check_folders()]


def check_versions() -> list[Check]:
    """Every package that coordexp declares, against the range that it declares."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("coordexp") or []]
    except metadata.PackageNotFoundError:
        return [
            Check("M01", "versions", "warning", "coordexp runs from a source tree and is not installed", "pip install -e ."),
        ]
    wrong, found = [], {"python": platform.python_version(), "coordexp": metadata.version("coordexp")}
    for item in wanted:
        if item.marker is not None and not item.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(item.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        found[item.name] = version
        if not item.specifier.contains(version, prereleases=True):
            wrong.append(f"{item.name} {version} is not {item.specifier}")
    shown = ", ".join(f"{name} {found[name]}" for name in ("python", "coordexp", "torch", "transformers", "peft") if name in found)
    if wrong:
        return [Check("M01", "versions", "fail", f"{shown}; {'; '.join(wrong)}", "pip install the ranges of pyproject.toml", dict(found))]
    return [Check("M01", "versions", "ok", f"{shown}; all {len(found)} in their ranges", "", dict(found))]


def check_torch() -> list[Check]:
    """The build, the GPUs it sees, and whether bfloat16 computes."""
    import torch

    cuda = torch.version.cuda
    build = f"torch {torch.__version__}, {'CPU build' if cuda is None else f'CUDA {cuda}'}, {torch.get_num_threads()} threads"
    checks = [Check("M02", "torch build", "ok", build, "", {"version": torch.__version__, "cuda": cuda})]
    card = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{c.name} ({c.total_memory / 2**30:.0f} GiB, {c.major}.{c.minor})" for c in cards]
        checks.append(Check("M03", "GPU", "ok", ", ".join(names), "", {"cards": names}))
        bf16 = torch.cuda.is_bf16_supported()
        seen = "computed by the GPU" if bf16 else "not supported by this GPU"
        checks.append(
            Check("M04", "bfloat16", "ok" if bf16 else "warning", seen, "" if bf16 else "use train.bf16=false, model.dtype=float32")
        )
        return checks
    if card:
        why = "torch is a CPU build" if cuda is None else "torch cannot use it"
        checks.append(
            Check("M03", "GPU", "fail", f"this machine has an NVIDIA card, but {why}", "install a CUDA build of torch that fits the driver")
        )
    else:
        checks.append(Check("M03", "GPU", "skipped", "none here: training runs on the CPU, which is for tiny models only"))
    product = torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
    right = bool((product == 2).all())
    checks.append(
        Check("M04", "bfloat16", "ok" if right else "fail", "computed by the CPU, slowly" if right else "wrong products on the CPU")
    )
    return checks


def check_triton() -> Check:
    """Whether the GPU kernels can run."""
    import torch

    if importlib.util.find_spec("triton") is None:
        outcome, advice = ("warning", "pip install 'coordexp[triton]'") if torch.cuda.is_available() else ("skipped", "")
        return Check(
            "M05", "triton", "warning" if outcome == "warning" else "skipped", "not installed: the chunked torch path is used", advice
        )
    version = metadata.version("triton")
    if not torch.cuda.is_available():
        return Check("M05", "triton", "skipped", f"triton {version}; its kernels need a GPU, the chunked torch path is used")
    return Check("M05", "triton", "ok", f"triton {version}: kernels are used", "", {"version": version})


def check_image_processor() -> Check:
    """Which image processor reads pictures: coordexp takes the PIL one always, so that numbers agree between machines."""
    try:
        from transformers import Qwen2VLImageProcessorPil
    except ImportError as error:
        return Check(
            "M06",
            "image processor",
            "fail",
            f"transformers has no usable Qwen2VLImageProcessorPil: {error}",
            "pip install 'transformers>=5.19,<6'",
        )
    stock = importlib.util.find_spec("torchvision") is not None
    other = (
        "the stock AutoProcessor works beside it"
        if stock
        else "torchvision is missing, so the stock AutoProcessor would not load; nothing here needs it"
    )
    return Check("M06", "image processor", "ok", f"{Qwen2VLImageProcessorPil.__name__}; {other}", "", {"torchvision": stock})


def check_folders() -> list[Check]:
    """Can files be written where runs, caches and temporary files go, and is there room."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = (("M07", "runs", Path("runs")), ("M08", "cache", cache), ("M09", "temporary files", Path(tempfile.gettempdir())))
    return [_writable(code, name, path) for code, name, path in places]


def _writable(code: str, name: str, path: Path) -> Check:
    """Nothing is left behind; of a folder that is not there yet the nearest one above it is asked."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    label = f"folder for {name}"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(code, label, "fail", f"{path}: {str(error.strerror).lower()}", "work in another folder, or make this one writable")
    free = shutil.disk_usage(folder).free / 1e9
    if free < LEAST_FREE_GB:
        return Check(
            code,
            label,
            "warning",
            f"{path}: writable, {free:.1f} GB free",
            "checkpoints of a real model need tens of GB",
            {"free_gb": free},
        )
    return Check(code, label, "ok", f"{path}: writable, {free:.0f} GB free", "", {"free_gb": free})
