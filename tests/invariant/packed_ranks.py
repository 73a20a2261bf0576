"""One rank of the two-process test of packing: ``torchrun packed_ranks.py WORKSPACE OUT``; rank 0 writes what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import tiny

if __name__ == "__main__":
    shared, out = Path(sys.argv[1]), Path(sys.argv[2])
    tiny.workspace = lambda: shared
    from test_packed import OBJECTIVE, make_trainer

    from packs import packed

    ranks = int(os.environ["WORLD_SIZE"])
    data = packed(tiny.records()[:10], batch=1, accumulate=16, ranks=ranks)
    held_out = packed(tiny.records("val"), batch=2, ranks=ranks, shuffle=False)
    trainer, watch = make_trainer(out, data, OBJECTIVE, accumulate=16, evaluation=held_out, eval_batch=2)
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save((len(data), watch.gradient, watch.logs), out / "rank0.pt")
    # Threads of the group that outlive the interpreter would abort it.
    dist.barrier()
    dist.destroy_process_group()
    # Everything is written; threads of torch can abort the interpreter's own teardown.
    os._exit(0)
