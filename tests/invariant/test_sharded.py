"""Under FSDP2 with bfloat16, as accelerate wraps the model, nothing that must stay exact is cast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapted import untied_folder
from tiny import workspace


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    out, here = tmp_path_factory.mktemp("sharded"), Path(__file__).parent
    untied_folder()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", here / "sharded_ranks.py"]
    done = subprocess.run(
        [*command, workspace(), out], check=False, timeout=300, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "rank0.pt")


@pytest.mark.parametrize("name", ["tied", "untied", "packs"])
def test_two_sharded_ranks_equal_one_process_with_the_same_casts(seen, name):
    """Bit for bit: two summands of a float32 sum have one order. With more ranks the order of a sum is the collective's."""
    sharded, expected = seen[name]
    assert torch.equal(sharded["loss"], expected["loss"])
    assert sharded["gradient"].keys() == expected["gradient"].keys()
    for parameter, gradient in expected["gradient"].items():
        assert torch.equal(sharded["gradient"][parameter], gradient), parameter
    # The last deepstack merger of two layers has nothing behind it.
    assert sum(bool(gradient.norm() > 0) for gradient in expected["gradient"].values()) > 0.9 * len(expected["gradient"])


def test_the_norm_of_sharded_gradients_is_that_of_all_of_them(seen):
    sharded, _ = seen["untied"]
    kind, norm = sharded["norm"]
    assert kind == "Tensor"
    assert norm.item() == pytest.approx(torch.cat([g.flatten().double() for g in sharded["gradient"].values()]).norm().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["tied", "untied", "packs"])
def test_centres_loss_and_sums_keep_their_precision_beside_a_bfloat16_model(seen, name):
    sharded, _ = seen[name]
    assert sharded["hidden"] == torch.bfloat16
    assert sharded["centers_equal"]
    assert sharded["loss"].dtype == torch.float32
    assert sharded["sums"] == torch.float64
    # Whole, and no DTensor, when the loss reads it.
    assert sharded["weight"] == ("Parameter", (workspace_rows(), 48), torch.bfloat16)


def workspace_rows():
    from tiny import fresh_model

    return fresh_model().get_output_embeddings().weight.shape[0]
