"""Under DeepSpeed's ZeRO-2 and ZeRO-3 on its CPU accelerator the loss sees a whole head and exact targets. ``make test-deepspeed``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="make test-deepspeed installs it")

from adapted import untied_folder
from tiny import fresh_model, workspace

CASES = [(stage, tied) for stage in (2, 3) for tied in (True, False)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out, here = tmp_path_factory.mktemp("zero"), Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "invariant"), *sys.path]
    untied_folder()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", here / "deepspeed_ranks.py"]
    done = subprocess.run(
        [*command, workspace(), out], check=False, timeout=900, capture_output=True, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "rank0.pt")


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_loss_and_gradient_are_those_of_one_process_with_the_same_casts(seen, stage, tied):
    zero, expected = seen[stage, tied]
    assert torch.equal(zero["loss"], expected["loss"])
    assert zero["gradient"].keys() == expected["gradient"].keys()
    for name, gradient in expected["gradient"].items():
        # DeepSpeed averages gradients in bfloat16, whose unit roundoff is 2^-8.
        assert (zero["gradient"][name] - gradient).norm() <= 2**-8 * gradient.norm(), name


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_the_head_is_whole_and_the_targets_are_exact_when_the_loss_reads_them(seen, stage, tied):
    zero, _ = seen[stage, tied]
    assert zero["apart"] == (stage == 3)
    assert zero["weight"] == ("Parameter", tuple(fresh_model().get_output_embeddings().weight.shape), torch.bfloat16)
    assert zero["centers_equal"]
    assert (zero["loss"].dtype, zero["sums"]) == (torch.float32, torch.float64)
