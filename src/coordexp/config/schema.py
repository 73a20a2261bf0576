"""``ExperimentConfig``: the sections of an experiment, each declared by its component."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordexp.data.options import DataOptions
from coordexp.decode.options import DecodeOptions
from coordexp.evaluate.options import EvaluateOptions
from coordexp.losses.objective import CoordObjective
from coordexp.modeling.options import ModelOptions
from coordexp.runs.options import ReportOptions
from coordexp.train.options import TokenTypeMetrics, TrainOptions
from coordexp.vocab.options import AdapterOptions, VocabOptions


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """An experiment: ``question`` is what it answers; runs go to ``output_dir``/``name``.

    Raises:
        ValueError: a name that is no name of a folder.
    """

    name: str
    question: str | None = None
    seed: int = 0
    output_dir: str = "runs"
    model: ModelOptions = field(default_factory=ModelOptions)
    vocab: VocabOptions = field(default_factory=VocabOptions)
    data: DataOptions
    objective: CoordObjective = field(default_factory=CoordObjective)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    token_type_metrics: TokenTypeMetrics = field(default_factory=TokenTypeMetrics)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    report: ReportOptions = field(default_factory=ReportOptions)

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"name: expected the name of a folder, without slashes, got {self.name!r}")
        if self.data.packing.enabled and self.train.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "data.packing.enabled: packs are composed by length already, and train.train_sampling_strategy would sort them again: "
                "set train.train_sampling_strategy=random"
            )
        if self.model.quantization is not None and self.adapter.kind == "none":
            raise ValueError(
                f"model.quantization: weights in {self.model.quantization} cannot be trained: set adapter.kind to lora, dora or rows, "
                "or remove it"
            )
        if self.train.lr_coord_rows is not None and not self.adapter.separate_rows:
            raise ValueError(
                "train.lr_coord_rows: the coordinate rows are part of the embedding table here, which has one learning rate: "
                "set adapter.kind to lora, dora or rows with adapter.new_rows=true, or remove it"
            )
        for part, rate in (("vision", self.train.lr_vision), ("aligner", self.train.lr_aligner)):
            if rate is not None and part in self.adapter.freeze:
                raise ValueError(f"train.lr_{part}: adapter.freeze names {part}: remove one of them")
