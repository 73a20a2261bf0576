"""One rank of the two-process test under FSDP2: ``torchrun sharded_ranks.py WORKSPACE OUT``; rank 0 writes what it saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only

import tiny
from coordexp.losses.objective import CoordObjective
from coordexp.losses.sums import Normalizer
from coordexp.modeling.load import load_model
from coordexp.train import forward
from coordexp.train.exact import whole
from coordexp.train.meters import step_sums
from coordexp.train.options import TokenTypeMetrics
from packs import pack_collator, packed

LAYERS = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]


def prepared(model):
    """The model as accelerate shards it for ``mixed_precision: bf16``, by its own code."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16, cast_forward_inputs=True
    )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=LAYERS, reshard_after_forward=True,
        cpu_ram_efficient_loading=False, mixed_precision_policy=policy,
    )  # fmt: skip
    # What that code reads of an Accelerator, which itself turns FSDP off on a CPU.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16", is_main_process=False, device=torch.device("cpu"),
        torch_device_mesh=None,
    )  # fmt: skip
    return fsdp2_prepare_model(accelerator, model)


def bound(*, tied):
    """A model with the objective, gradient checkpointing on; with a head of its own unless ``tied``."""
    model = tiny.fresh_model() if tied else load_model(tiny.workspace() / "untied")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    forward.bind_coord_loss(model, vocab=tiny.vocab(), objective=CoordObjective(sigma=2.0, w1=0.05))
    return model


def spied(model, batch, normalizer):
    """The loss's output, and the centres and the head's weight that it was computed from."""
    seen = {}
    stock = forward.linear_coord_loss

    def spy(hidden, weight, labels, **options):
        seen.update(centers=options["centers"], weight=(type(weight).__name__, tuple(weight.shape), weight.dtype), hidden=hidden.dtype)
        return stock(hidden, weight, labels, **options)

    forward.linear_coord_loss = spy
    try:
        output = forward.coord_loss(model, {**batch, "targets": batch["targets"].divided_by(normalizer)})
    finally:
        forward.linear_coord_loss = stock
    return output, seen


def sharded(batches, rank, *, tied):
    """Loss, sums, what the loss saw, and the gathered gradient of two batches, one on each rank."""
    normalizer = normalizer_of(batches)
    model = prepared(bound(tied=tied))
    output, seen = spied(model, batches[rank], normalizer)
    (output.loss * 2).backward()
    gradient = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    sums = step_sums(output, batches[rank]["targets"], TokenTypeMetrics())
    same = torch.equal(seen["centers"].nan_to_num(-1), batches[rank]["targets"].centers.flatten().nan_to_num(-1))
    return {
        "loss": output.loss.detach(), "gradient": gradient, "centers_equal": same and seen["centers"].dtype == torch.float32,
        "norm": (type(norm).__name__, norm), "weight": seen["weight"], "sums": sums.vector.dtype, "hidden": seen["hidden"],
    }  # fmt: skip


def with_the_same_casts(batches, rank, *, tied, layers=True):
    """One process: float32 weights cast to bfloat16 for each batch, the gradients added in float32; and the loss of ``rank``'s batch.

    ``layers``: what goes into each layer is cast too, as FSDP2 does.
    """
    normalizer, total, loss = normalizer_of(batches), {}, None
    for i, batch in enumerate(batches):
        model = bound(tied=tied)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        for module in model.modules():
            if layers and (module is model or type(module).__name__ in LAYERS):
                module.register_forward_pre_hook(_cast, with_kwargs=True)
        output, _ = spied(model, batch, normalizer)
        output.loss.backward()
        loss = output.loss.detach() if i == rank else loss
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0.0) + parameter.grad.float()
    return {"loss": loss, "gradient": total}


def _cast(module, args, kwargs):
    """What FSDP2 does to the arguments of a module that it wraps."""
    return tree_map_only(torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, (args, kwargs))


def normalizer_of(batches):
    counts = torch.tensor([batch["targets"].counts(tiny.vocab()) for batch in batches]).sum(dim=0)
    return Normalizer(counts[0], counts[1])


if __name__ == "__main__":
    shared, out = Path(sys.argv[1]), Path(sys.argv[2])
    tiny.workspace = lambda: shared
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    halves = [tiny.collator()([tiny.template().encode(r) for r in tiny.records()[i : i + 3]]) for i in (0, 3)]
    data = packed(tiny.records())
    collate = pack_collator(tiny.fresh_model())
    sets = {"plain": halves, "packed": [collate([data[0]]), collate([data[1]])]}
    seen = {}
    for name, tied, batches in (("tied", True, "plain"), ("untied", False, "plain"), ("packs", True, "packed")):
        seen[name] = (sharded(sets[batches], rank, tied=tied), with_the_same_casts(sets[batches], rank, tied=tied))
    if rank == 0:
        torch.save(seen, out / "rank0.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Everything is written; threads of torch can abort the interpreter's own teardown.
    os._exit(0)
