"""From an experiment to its memory, steps and epochs, and to the changes that help."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from coordexp.config.schema import ExperimentConfig
from coordexp.data.records import Record
from coordexp.errors import ConfigError
from coordexp.modeling.dry import DryMode, DryModel, DryStep, dry
from coordexp.modeling.load import pixel_budget
from coordexp.modeling.positions import backbone
from coordexp.plan.memory import (
    OPTIMIZERS,
    STRATEGIES,
    Shapes,
    Strategy,
    held,
    loss_bytes,
    prepared,
    step_bytes,
    strategy_of,
    switch_on_checkpointing,
)
from coordexp.plan.workload import MOST_RECORDS, Lengths, Reader, Workload, image_processor, measure, workload

GB: Final = 1e9
# Records whose length the line at the start of a run looks at.
BRIEF_RECORDS: Final = 300
# Kept free of the memory there is: what an allocator cannot use again in one piece.
RESERVE: Final = 0.08
# What kernels, data loading and logging add to a process on a CPU once it trains (measured on small models), in bytes.
CPU_WORKSPACE: Final = 0.05 * GB
# A CUDA context and the workspaces of its libraries: assumed, not measured.
CUDA_PROCESS: Final = 0.8 * GB


@dataclass(frozen=True)
class Device:
    """``kind`` ``cpu`` or ``cuda``, its memory in bytes, and what of it a process takes before there is a model."""

    kind: str
    memory: float
    process: float

    @staticmethod
    def of(gpu_memory: float | None) -> Device:
        """A GPU of so many GB; None: what this machine trains on."""
        if gpu_memory is not None:
            return Device("cuda", gpu_memory * GB, CUDA_PROCESS)
        if torch.cuda.is_available():
            return Device("cuda", float(torch.cuda.get_device_properties(0).total_memory), CUDA_PROCESS)
        import coordexp.train.launch  # noqa: F401  what a training process has loaded

        total, resident = _proc("/proc/meminfo", "MemTotal"), _proc("/proc/self/status", "VmRSS")
        return Device("cpu", total, resident + CPU_WORKSPACE)


def _proc(path: str, key: str) -> float:
    for line in Path(path).read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return float(value.split()[0]) * 1024
    raise KeyError(f"{path} has no {key}")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by what they are for, at the ``moment`` of a step when most is alive."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Lever:
    """A single change of the experiment, and the bytes a process then needs."""

    setting: str
    total: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What :meth:`Planner.plan` found. ``memory`` by strategy, of which ``asked`` is the experiment's; ``activations`` kept for the
    backward pass, by gradient checkpointing; ``window`` rows (``unit``: samples or packs) make a step."""

    device: Device
    ranks: int
    asked: Strategy
    memory: dict[Strategy, Memory]
    activations: dict[str, float]
    trained: int
    numbers: int
    longest: int
    image_tokens: int
    window: int
    unit: str
    tokens_a_step: float
    steps: int
    steps_an_epoch: int
    levers: tuple[Lever, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def need(self) -> float:
        """Bytes of a process as the experiment asks for it."""
        return self.memory[self.asked].total

    @property
    def usable(self) -> float:
        """Memory of the device without the reserve."""
        return self.device.memory * (1 - RESERVE)

    @property
    def fits(self) -> bool:
        """Whether a process fits into what is usable; on a CPU the ranks share it."""
        return self.need * (self.ranks if self.device.kind == "cpu" else 1) <= self.usable

    @property
    def epochs(self) -> float:
        """Passes over the training data."""
        return self.steps / self.steps_an_epoch

    def line(self) -> str:
        """The verdict in one line."""
        verdict = "fits" if self.fits else "DOES NOT FIT: `coordexp plan` says what helps"
        return (
            f"memory: {self.need / GB:.1f} of {self.device.memory / GB:.1f} GB {self.device.kind.upper()} a process, most in "
            f"{self.memory[self.asked].moment} ({self.asked}; longest row {self.longest} tokens): {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes."""
        memory = {name: {"moment": one.moment, "total": one.total, **one.parts} for name, one in self.memory.items()}
        more = {"need": self.need, "usable": self.usable, "fits": self.fits, "epochs": self.epochs}
        return {**dataclasses.asdict(self), "memory": memory, **more}


@dataclass
class Planner:
    """Plans of one experiment and of changes to it; what they share is made once. ``folder`` is the model's, None: the tiny one's."""

    config: ExperimentConfig
    folder: Path | None
    reader: Reader
    lengths: Lengths
    device: Device
    ranks: int = 1
    _made: dict[Any, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        config: ExperimentConfig, folder: Path | None, device: Device, ranks: int = 1,
        records: tuple[Sequence[Record], Sequence[Record]] | None = None, most: int = MOST_RECORDS,
    ) -> Planner:  # fmt: skip
        """With the lengths of at most ``most`` of the ``records`` (training and validation), by default the configuration's."""
        reader = Reader.of(config, folder)
        return Planner(config, folder, reader, measure(config, reader, records, most), device, ranks)

    def plan(self, *, brief: bool = False, progress: Callable[[int, int], None] | None = None) -> Plan:
        """The plan; ``brief``: of the experiment's own strategy and checkpointing alone, without levers. ``progress(done, total)`` counts
        the changes that are tried."""
        config, train = self.config, self.config.train
        asked, work = strategy_of(config), self._workload(config)
        window, an_epoch, steps = schedule(config, work.units, self.ranks)
        shown = (asked,) if brief or self.ranks == 1 else STRATEGIES
        checkpointing = (train.gradient_checkpointing,) if brief else (False, True)
        shapes, _ = self._dry(config, asked)
        notes = list(self.lengths.notes)
        if train.optim not in OPTIMIZERS:
            notes.append(f"train.optim={train.optim} is not known here: its states are counted like AdamW's")
        if self.device.kind == "cuda":
            notes.append("the figures of GPUs are computed, not measured; 0.8 GB is assumed for the CUDA context")
        found = Plan(
            device=self.device, ranks=self.ranks, asked=asked, memory={name: self._memory(config, name) for name in shown},
            activations={
                "with" if on else "without": float(self._dry(_changed(config, train={"gradient_checkpointing": on}), asked)[1].kept)
                for on in checkpointing
            },
            trained=shapes.trained, numbers=shapes.numbers, longest=work.train.longest,
            image_tokens=max(sample.image for row in work.train.rows for sample in row), window=window,
            unit="packs" if config.data.packing.enabled else "samples", tokens_a_step=window * work.tokens,
            steps=steps, steps_an_epoch=an_epoch, notes=tuple(notes),
        )  # fmt: skip
        return found if brief else replace(found, levers=self._levers(found, progress))

    def _levers(self, plan: Plan, progress: Callable[[int, int], None] | None) -> tuple[Lever, ...]:
        """Single changes after which less is needed, best first."""
        tried, changes = [], list(self._changes(plan))
        for number, (setting, config, strategy) in enumerate(changes, 1):
            other = replace(plan, asked=strategy, memory={strategy: self._memory(config, strategy)})
            tried.append(Lever(setting, other.need, other.fits))
            if progress is not None:
                progress(number, len(changes))
        return tuple(sorted((lever for lever in tried if lever.total < 0.99 * plan.need), key=lambda lever: lever.total))

    def _changes(self, plan: Plan) -> Iterator[tuple[str, ExperimentConfig, Strategy]]:
        config, train, model, asked = self.config, self.config.train, self.config.model, plan.asked
        batch, accumulate = train.per_device_train_batch_size, train.gradient_accumulation_steps
        adapted = config.adapter.kind != "none"
        offers: list[tuple[bool, str, dict[str, Any]]] = [
            (not train.gradient_checkpointing, "", {"train": {"gradient_checkpointing": True}}),
            (batch > 1, "", {"train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": batch * accumulate}}),
            (train.per_device_eval_batch_size > 1, "", {"train": {"per_device_eval_batch_size": 1}}),
            (not adapted, "", {"adapter": {"kind": "lora"}}),
            (not adapted and "adamw_torch" in train.optim, " (bitsandbytes)", {"train": {"optim": "adamw_8bit"}}),
            (adapted and model.dtype == "float32", "", {"model": {"dtype": "bfloat16"}}),
            (adapted and model.quantization is None, " (bitsandbytes)", {"model": {"quantization": "nf4"}}),
        ]
        processor = image_processor(config, self.folder)
        patches = max(sample.patches for row in self._workload(config).train.rows for sample in row)
        pixels = patches * int(processor.patch_size) ** 2 // 2
        offers.append((pixels >= pixel_budget(processor)[0], "", {"model": {"max_pixels": pixels, "keep_contract": False}}))
        for offered, remark, change in offers:
            if offered:
                (section, values), *_ = change.items()
                words = ", ".join(f"{key}={str(value).lower()}" for key, value in values.items() if key != "keep_contract")
                yield f"{section}: {words}{remark}", _changed(config, **change), asked
        if self.ranks > 1 and asked == "ddp":
            yield "sharding over the ranks (fsdp2)", config, "fsdp2"

    def _memory(self, config: ExperimentConfig, strategy: Strategy) -> Memory:
        shapes, step = self._dry(config, strategy)
        work, kept = self._workload(config), held(shapes, config, strategy, self.ranks)
        loss = loss_bytes(shapes, config, work.train.supervised, self.device.kind, positions=work.train.positions)
        scored = loss_bytes(shapes, config, work.evaluation.supervised, self.device.kind, gradient=False)
        evaluates = config.train.eval_strategy != "no"
        accumulates, gradients = config.train.gradient_accumulation_steps > 1, kept["gradients"]
        # Gradients take the place of what the backward pass frees, unless they are there already.
        growing = step.backward - gradients if strategy == "ddp" and not accumulates else step.backward_alone
        before = gradients if accumulates else 0.0
        moments = {
            "the forward pass": (before, step.forward, 0.0),
            "the loss": (before, step.kept, loss.forward),
            "the start of the backward pass": (before, step.kept, loss.backward),
            "the backward pass": (gradients, max(0.0, growing), loss.head),
            "the optimizer's step": (gradients, 0.0, 0.0),
            # Files are mapped: of weights that are converted both are there.
            "loading": (0.0, shapes.stored if self.device.kind == "cpu" else 0.0, 0.0),
            "evaluation": (0.0, self._evaluation(config, strategy) if evaluates else 0, scored.forward if evaluates else 0.0),
        }
        parts = {
            moment: {
                "weights": kept["weights"], "gradients": grown, "optimizer states": kept["states"], "activations": activations,
                "loss buffers": buffers, "the process itself": self.device.process,
                "gathering and reducing": kept["buffers"] + (step_bytes(shapes, config) if moment == "the optimizer's step" else 0.0),
            }
            for moment, (grown, activations, buffers) in moments.items()
        }  # fmt: skip
        most = max(parts, key=lambda moment: sum(parts[moment].values()))
        return Memory(most, parts[most])

    def _dry(self, config: ExperimentConfig, strategy: Strategy) -> tuple[Shapes, DryStep]:
        """Shapes of the model, and its step without numbers on the largest batch."""
        batch = self._workload(config).train

        def make() -> tuple[Shapes, DryStep]:
            model, shapes = self._model(config, strategy)
            return shapes, model.step(batch.rows)

        return self._once((self._key(config, strategy), config.train.gradient_checkpointing, batch), make)

    def _evaluation(self, config: ExperimentConfig, strategy: Strategy) -> int:
        batch = self._workload(config).evaluation
        return self._once((self._key(config, strategy), batch), lambda: self._model(config, strategy)[0].evaluation(batch.rows))

    def _key(self, config: ExperimentConfig, strategy: Strategy) -> tuple[Any, ...]:
        model, half = config.model, config.train.bf16
        return half, half and strategy != "ddp", model.dtype, model.quantization, repr(config.adapter)

    def _model(self, config: ExperimentConfig, strategy: Strategy) -> tuple[DryModel, Shapes]:
        model, shapes = prepared(config, self.folder, self.reader)
        if config.train.bf16 and strategy != "ddp":
            # A sharded model is cast as it is gathered; a replica is cast layer by layer, under autocast.
            model.to(torch.bfloat16)
        if config.train.gradient_checkpointing:
            switch_on_checkpointing(model)
        mode = DryMode()
        dry(model.train(), mode)
        autocast: Callable[[], Any] = (lambda: torch.autocast("cpu", torch.bfloat16)) if config.train.bf16 else nullcontext
        return DryModel(model, backbone(model), mode, autocast, "flash" not in config.model.attn_implementation), shapes

    def _workload(self, config: ExperimentConfig) -> Workload:
        train, model = config.train, config.model
        key = (model.min_pixels, model.max_pixels, train.per_device_train_batch_size, train.per_device_eval_batch_size)
        return self._once(key, lambda: workload(config, self.lengths, image_processor(config, self.folder)))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def schedule(config: ExperimentConfig, units: int, ranks: int) -> tuple[int, int, int]:
    """Rows of a step, steps of an epoch of so many ``units``, and steps of the training, as ``transformers.Trainer`` counts them."""
    train = config.train
    batches = math.ceil(units / (train.per_device_train_batch_size * ranks))
    an_epoch = max(1, math.ceil(batches / train.gradient_accumulation_steps))
    steps = math.ceil((train.num_train_epochs or 0.0) * an_epoch) if train.max_steps is None else train.max_steps
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks, an_epoch, steps


def memory_line(config: ExperimentConfig, folder: Path, records: tuple[Sequence[Record], Sequence[Record]]) -> str:
    """The plan of a run in one line, for the processes that were started."""
    try:
        planner = Planner.of(config, folder, Device.of(None), int(os.environ.get("WORLD_SIZE", "1")), records, most=BRIEF_RECORDS)
        return planner.plan(brief=True).line()
    except ConfigError as error:
        return f"memory: {error}"


def _changed(config: ExperimentConfig, **sections: dict[str, Any]) -> ExperimentConfig:
    """The configuration with other values in these sections."""
    return replace(config, **{name: replace(vars(config)[name], **values) for name, values in sections.items()})
