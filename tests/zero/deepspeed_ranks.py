"""One rank of the two-process test under DeepSpeed: ``torchrun deepspeed_ranks.py WORKSPACE OUT``; rank 0 writes what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from sharded_ranks import bound, normalizer_of, spied, with_the_same_casts

import tiny
from coordexp.train.meters import step_sums
from coordexp.train.options import TokenTypeMetrics


def under_zero(batches, rank, *, stage, tied):
    """Loss, what the loss saw, and the gathered gradient of two batches, one on each rank, by DeepSpeed's own engine."""
    model = bound(tied=tied)
    config = {
        "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True,
        # Nothing is too small to be taken apart.
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    apart = model.get_output_embeddings().weight.numel() == 0
    output, seen = spied(engine, batches[rank], normalizer_of(batches))
    engine.backward(output.loss * 2)
    gradient = {name: safe_get_full_grad(p).float() for name, p in engine.module.named_parameters()}
    centers = batches[rank]["targets"].centers.flatten()
    return {
        "loss": output.loss.detach(), "gradient": gradient, "apart": apart, "weight": seen["weight"],
        "centers_equal": torch.equal(seen["centers"].nan_to_num(-1), centers.nan_to_num(-1)) and seen["centers"].dtype == torch.float32,
        "sums": step_sums(output, batches[rank]["targets"], TokenTypeMetrics()).vector.dtype,
    }  # fmt: skip


if __name__ == "__main__":
    shared, out = Path(sys.argv[1]), Path(sys.argv[2])
    tiny.workspace = lambda: shared
    deepspeed.init_distributed(dist_backend="gloo")
    rank = int(os.environ["RANK"])
    halves = [tiny.collator()([tiny.template().encode(r) for r in tiny.records()[i : i + 3]]) for i in (0, 3)]
    seen = {}
    for stage in (2, 3):
        for tied in (True, False):
            seen[stage, tied] = (
                under_zero(halves, rank, stage=stage, tied=tied), with_the_same_casts(halves, rank, tied=tied, layers=False)
            )  # fmt: skip
    if rank == 0:
        torch.save(seen, out / "rank0.pt")
    dist.barrier()
    os._exit(0)
