"""One rank of the two-process test: ``torchrun plain_ranks.py WORKSPACE OUT``; rank 0 writes what it saw."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tiny
from coordexp.decode.options import DecodeOptions
from coordexp.losses.objective import TERMS, CoordObjective
from coordexp.losses.sums import Normalizer
from coordexp.modeling.load import load_model
from coordexp.predicting import probe
from coordexp.train.forward import bind_coord_loss, coord_loss


def sharded_gradient(batches, rank):
    """Gradient of two batches under FSDP2, one on each rank, as one whole vector, and that of one process on both."""
    from test_ranks import OBJECTIVE, counted

    text, coord = counted(batches)
    whole = tiny.gradients(accumulated(batches, OBJECTIVE, Normalizer(text, coord)))
    model = tiny.fresh_model().train()
    bind_coord_loss(model, vocab=tiny.vocab(), objective=OBJECTIVE)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.language_model.layers, *model.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = coord_loss(model, divided(batches[rank], Normalizer(text, coord))).loss * 2
    loss.backward()
    parts = [p.grad.full_tensor().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts), whole


def term_gradients(samples, rank):
    """Per term and normalisation: the gradient of 2 ranks x (2 x 2) under DDP, and that of one process on all eight at once."""
    from test_ranks import counted

    def batch(a, b):
        return tiny.collator()([tiny.template().encode(r) for r in samples[a:b]])

    whole, mine = batch(0, 8), [batch(4 * rank + i, 4 * rank + i + 2) for i in (0, 2)]
    normalizer = Normalizer(*counted([whole]))
    found = {}
    for name, normalization in itertools.product(TERMS, ("group", "token")):
        weights = dict.fromkeys(TERMS, 0.0) | {name: 1.0}
        objective = CoordObjective(**weights, sigma=4.0, temperature=0.8, normalization=normalization)
        expected = tiny.gradients(accumulated([whole], objective, normalizer))
        model = tiny.fresh_model().train()
        bind_coord_loss(model, vocab=tiny.vocab(), objective=objective)
        wrapped = DistributedDataParallel(model)
        for i, part in enumerate(mine):
            with contextlib.nullcontext() if i else wrapped.no_sync():
                (coord_loss(wrapped, divided(part, normalizer)).loss * 2).backward()
        found[f"{name}, {normalization}"] = (tiny.gradients(model), expected)
    return found


def divided(batch, normalizer):
    """The batch under other counts than its own."""
    return {**batch, "targets": batch["targets"].divided_by(normalizer)}


def accumulated(batches, objective, normalizer):
    """A fresh model with the gradient of all batches."""
    model = tiny.fresh_model().train()
    bind_coord_loss(model, vocab=tiny.vocab(), objective=objective)
    for batch in batches:
        coord_loss(model, divided(batch, normalizer)).loss.backward()
    return model


def probe_values(**how):
    """The generation probe on three images, one rank or two."""
    chosen = list(tiny.records("val")[:3])
    return probe(load_model(tiny.workspace() / "fitted"), tiny.template(), chosen, DecodeOptions(max_new_tokens=80, batch_size=2), **how)


if __name__ == "__main__":
    shared, out = Path(sys.argv[1]), Path(sys.argv[2])
    tiny.workspace = lambda: shared
    from test_ranks import make_trainer, mixed_records

    seen = {}
    for name, samples in (("mixed", mixed_records()), ("ragged", tiny.records()[:5])):
        trainer, watch = make_trainer(out / name, samples, size=2, accumulate=2)
        if name == "ragged":
            watch.stop_signal = trainer.stop  # the last run: SIGTERM arrives on the second rank only
        trainer.train()
        seen[name] = (watch.gradient, watch.logs, trainer.stopped_by)
    seen["files"] = sorted(str(p.relative_to(out)) for p in (out / "mixed").rglob("*") if p.is_file())
    rank = int(os.environ["RANK"])
    halves = [tiny.collator()([tiny.template().encode(r) for r in tiny.records()[i : i + 3]]) for i in (0, 3)]
    seen["sharded"], seen["whole"] = sharded_gradient(halves, rank)
    seen["terms"] = term_gradients(mixed_records(), rank)
    seen["probe"] = probe_values(share=(rank, 2), gather=gather_object)
    if rank == 0:
        torch.save(seen, out / "rank0.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Everything is written; threads of torch can abort the interpreter's own teardown.
    os._exit(0)
