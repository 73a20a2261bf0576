"""What is refused before a run writes or trains: settings, a checkpoint's contract, records that could not be evaluated.

Beside ``experiment``, which calls it; heavy imports are inside the functions.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.config.schema import ExperimentConfig
from coordexp.data.answers import PHRASE, answer_geometries, ask
from coordexp.data.options import PHRASE_FIELD
from coordexp.data.records import Record
from coordexp.errors import ConfigError, DataError
from coordexp.train.options import OPTIMIZERS, REPORTERS


def preflight(config: ExperimentConfig, *, here: bool = True) -> None:
    """Refuse what cannot work before anything is written; without ``here`` packages of this machine are not asked for."""
    if config.model.path is not None:
        from coordexp.modeling.load import check_model_folder

        check_model_folder(Path(config.model.path))
        check_source(config, Path(config.model.path))
    if config.train.save_best is not None:
        from coordexp.train.best import check_best

        check_best(config.train, points=config.data.geometry == "point_2d")
    if config.data.source is not None and not Path(config.data.source).is_dir():
        raise ConfigError(f"data.source: expected a folder, {config.data.source} is none: pass --set data.source=FOLDER")
    if config.adapter.kind in ("lora", "dora"):
        from coordexp.vocab.adapters import target_layers

        target_layers(_skeleton(config), config.adapter)
    if here:
        check_packages(config)
    config.train.check_length()


def check_packages(config: ExperimentConfig) -> None:
    """Refuse what asks for a package that is not installed.

    Raises:
        ConfigError: a line for each, with the command that installs it.
    """
    train, problems = config.train, []
    wanted = [("train.optim", train.optim, OPTIMIZERS[train.optim])]
    wanted += [("train.report_to", name, REPORTERS[name]) for name in train.report_to]
    if train.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        wanted.append(("train.deepspeed", "a DeepSpeed set-up", ("'coordexp[deepspeed]'", "deepspeed")))
    if config.model.attn_implementation == "flash_attention_2":
        wanted.append(("model.attn_implementation", "flash_attention_2", ("flash-attn --no-build-isolation", "flash_attn")))
    if config.model.quantization is not None:
        wanted.append(("model.quantization", config.model.quantization, ("'coordexp[quantization]'", "bitsandbytes")))
    if config.model.liger:
        wanted.append(("model.liger", "true", ("'coordexp[liger]'", "liger_kernel")))
    for key, value, package in wanted:
        if package is not None and importlib.util.find_spec(package[1]) is None:
            problems.append(f"{key}: {value} needs a package that is not installed: pip install {package[0]}")
    if problems:
        raise ConfigError(problems)


def check_training(config: ExperimentConfig) -> None:
    """Refuse what transformers, its optimizers or its schedules would refuse later; nothing is written.

    Apart from :func:`preflight`, because it takes the processes of a launcher as they are: they must have met.

    Raises:
        ConfigError: in one line, with the library's own words where it has some.
    """
    from coordexp.train.arguments import sharding, try_arguments

    if config.model.quantization is not None and sharding(config.train):
        raise ConfigError("model.quantization: every GPU holds the whole quantised model: start with torchrun, without FSDP and DeepSpeed")
    if config.model.quantization == "nf4":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "model.quantization: nf4 is trained on a GPU only: on a CPU bitsandbytes repacks the weights at the first evaluation, and "
                "no gradient passes them any more: set it to int8, or remove it"
            )
    if config.model.liger:
        from coordexp.modeling.liger import use_liger

        use_liger(_skeleton(config))
    try_arguments(config.train)


def _skeleton(config: ExperimentConfig) -> Any:
    """The model that will be trained, without its weights."""
    from coordexp.modeling.load import skeleton
    from coordexp.modeling.tiny import tiny_skeleton

    return tiny_skeleton(config.model.tiny) if config.model.path is None else skeleton(Path(config.model.path))


def check_source(config: ExperimentConfig, folder: Path) -> None:
    """As :func:`check_folder` for the folder that training starts from: without ``model.keep_contract`` only the convention counts."""
    from coordexp.codec import CoordCodec
    from coordexp.modeling.manifest import check_contract

    if not config.model.keep_contract:
        check_contract(folder, convention=CoordCodec().convention)
        return
    try:
        check_folder(config, folder)
    except ConfigError as error:
        hint = ", or model.keep_contract to false to teach it another"
        raise ConfigError([text if text.startswith("codec.") else text + hint for text in error.problems]) from None


def check_folder(config: ExperimentConfig, folder: Path) -> None:
    """Refuse a checkpoint that was trained with another convention, prompt or image size."""
    from coordexp.codec import CoordCodec
    from coordexp.modeling.manifest import check_contract

    check_contract(
        folder,
        prompt=config.data.prompt,
        convention=CoordCodec().convention,
        min_pixels=config.model.min_pixels,
        max_pixels=config.model.max_pixels,
    )


def check_records(config: ExperimentConfig, splits: Mapping[str, Sequence[Record]], *, evaluated: bool) -> list[str]:
    """Refuse records that training, the probe or the evaluation would stop at later; returns what is worth saying.

    Raises:
        DataError: no phrase where the prompt asks for one; with ``evaluated``, or for the probe, points as the truth.
    """
    data = config.data
    for records in splits.values():
        for record in records:
            ask(data.prompt, record)
    looked_at = [name for name, wanted in (("val", config.train.probe_steps is not None), ("test", evaluated)) if wanted]
    for record in (record for name in looked_at for record in splits[name]):
        if any(item.geometry == "point_2d" for item in record.objects):
            raise DataError(
                f"{record.source}: objects: holds a point_2d, and answers are evaluated against regions: give bbox_2d or poly, and "
                "data.geometry: point_2d for a model that points"
            )
    notes = []
    phrases = sum(PHRASE in record.metadata for record in splits["train"])
    if phrases and PHRASE_FIELD not in data.prompt:
        notes.append(f"note: {phrases} training records have metadata.phrase, and data.prompt has no {PHRASE_FIELD}: it is not asked for")
    kinds = {name: set(answer_geometries(records, data.geometry)) for name, records in splits.items()}
    unseen = sorted(kinds["test"] - kinds["train"])
    if unseen:
        notes.append(f"note: the test records hold {', '.join(unseen)}, the training records do not: the model cannot write them")
    return notes
