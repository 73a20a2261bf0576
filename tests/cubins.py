"""Compiles what one call of the loss launches, for GPUs that are not here, and prints what the machine code looks like.

``python tests/cubins.py ARCH,TYPE,TAU ...``, without ``TRITON_INTERPRET``. A driver that only names its target stands in for CUDA,
and a launch compiles instead of running: types, hints and constants are those of the launch itself. Prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from coordexp.losses import chunked, linear
from coordexp.losses.objective import CoordObjective
from coordexp.losses.triton import row_kernel, slice_kernel

VOCABULARY, BINS = 152_670, 1000  # of Qwen3-VL with coordinates: no multiple of 16
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Driver:
    """All that compiling asks of a driver; the architecture is the number of the device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def compiled(arch: int, dtype: torch.dtype, tau: float):
    """Kernels that a loss over three chunks, of which one has both kinds of row and one a single coordinate, would launch."""
    kernels = {}
    launch = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        kernel = launch(self, *args, warmup=True, **kwargs)
        kernels[kernel.hash] = kernel

    driver.set_active(Driver(arch))
    # The types of a GPU, and its kernels, on tensors of the host; their values are never written, so the results mean nothing.
    chunked._FLOAT32_IS_FASTER = frozenset()
    linear.implementation = lambda *_: lambda x: chunked.fused_loss(
        x, row_pass=row_kernel.rest_pass, slice_pass=slice_kernel.slice_pass
    )
    JITFunction.run = compile_only
    try:
        hidden = torch.zeros(7, 8, dtype=dtype, requires_grad=True)
        labels = torch.tensor([5, 151_680, 151_690, 3, 152_669, 151_700, 9])
        budget = 3.5 * (VOCABULARY + 34) * 2 / 2**20
        linear.linear_coord_loss(
            hidden, torch.zeros(VOCABULARY, 8, dtype=dtype), labels, coord_start=VOCABULARY - BINS, num_bins=BINS, logits_budget_mb=budget,
            objective=CoordObjective(temperature=tau), top5=tau != 1,
        )  # fmt: skip
    finally:
        JITFunction.run = launch
    return kernels.values()


def read(kernel, folder: Path):
    """Registers, stack and local memory as ``cuobjdump`` counts them; the instructions of the loops and of the rest."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([TOOLS / "cuobjdump", "-sass", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = [(int(address, 16), words) for address, words in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;/]+);", text)]
    loops = [
        (int(target, 16), address)
        for address, words in code
        for target in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", words)
        if int(target, 16) < address
    ]
    names = [(address, re.sub(r"^@!?U?P\w+ +", "", words).split()[0]) for address, words in code]
    return {
        "kernel": kernel.metadata.name, "warps": kernel.metadata.num_warps, **usage,
        "loops": [[name for address, name in names if first <= address <= last] for first, last in loops],
        "all": [name for _, name in names],
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for words in sys.argv[1:]:
            arch, dtype, tau = words.split(",")
            for kernel in compiled(int(arch), getattr(torch, dtype), float(tau)):
                print(json.dumps({"arch": int(arch), "dtype": dtype, "tau": float(tau), **read(kernel, Path(folder))}))


if __name__ == "__main__":
    main()
