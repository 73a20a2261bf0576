"""The machine code of both triton kernels, compiled for GPUs ahead of time: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100, 120)
CASES = [(arch, "bfloat16", 1.0) for arch in ARCHITECTURES] + [(90, "float16", 0.9)]
REGISTERS = 65_536  # of a multiprocessor, on all of these


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    words = [",".join(map(str, case)) for case in CASES]
    script = Path(__file__).with_name("cubins.py")
    done = subprocess.run([sys.executable, "-W", "error", script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_loss_compiles_each_kernel_once_whatever_its_chunks_hold(kernels):
    found = Counter((k["arch"], k["dtype"], k["tau"], k["kernel"]) for k in kernels)
    assert found == {(*case, name): 1 for case in CASES for name in ("_rest_kernel", "_slice_kernel")}


def test_nothing_is_spilled_and_a_program_fits_a_multiprocessor(kernels):
    for k in kernels:
        assert (k["STACK"], k["LOCAL"]) == (0, 0), k
        assert not [name for name in k["all"] if name.startswith(("LDL", "STL"))]
        assert k["REG"] * k["warps"] * 32 <= REGISTERS


def test_the_row_kernel_moves_sixteen_bytes_at_a_time_without_barriers(kernels):
    for k in kernels:
        if k["kernel"] != "_rest_kernel":
            continue
        assert len(k["loops"]) == 2, "a pass to sum, a pass to write"
        for loop, kinds in zip(k["loops"], ({"LDG"}, {"LDG", "STG"}), strict=True):
            moves = [name for name in loop if name.startswith(("LDG", "STG", "LD.", "ST."))]
            assert {name.split(".")[0] for name in moves} == kinds
            assert all("128" in name for name in moves), moves
            assert not [name for name in loop if name.startswith(("BAR", "SHFL", "LDS", "STS"))]
        outside = [name for name in k["all"] if name.startswith(("LDG", "STG"))]
        assert not [name for name in outside if "U16" in name or "U8" in name]
        if k["tau"] == 1.0:
            # Two programs would not fit: one row at a time, whose second reading the cache then serves (decision 16).
            assert 2 * k["REG"] * k["warps"] * 32 > REGISTERS


def test_the_slice_kernel_reads_and_writes_its_bins_sixteen_bytes_at_a_time(kernels):
    for k in kernels:
        if k["kernel"] == "_slice_kernel":
            names = Counter(name.split(".")[0] + (".128" if "128" in name else "") for name in k["all"])
            assert names["LDG.128"] == 4, "logits and targets of 1,000 bins in 128 threads"
            assert names["STG.128"] == 2
            assert names["LDG"] == 8, "bin, centre and six scales"
            assert names["STG"] == 7, "seven values"
