"""What is refused before a run writes or trains: settings, a checkpoint's contract, records that could not be evaluated.

Beside ``experiment``, which calls it; heavy imports are inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.config.schema import ExperimentConfig
from coordexp.data.answers import PHRASE, PHRASE_FIELD, answer_geometries, ask
from coordexp.data.records import Record
from coordexp.errors import ConfigError, DataError


def preflight(config: ExperimentConfig) -> None:
    """Refuse what cannot work before anything is written."""
    if config.model.path is not None:
        from coordexp.modeling.load import check_model_folder

        check_model_folder(Path(config.model.path))
        check_source(config, Path(config.model.path))
    if config.train.save_best is not None:
        from coordexp.train.best import check_best

        check_best(
            config.train.save_best, probe_steps=config.train.probe_steps, eval_steps=config.train.eval_steps,
            points=config.data.geometry == "point_2d",
        )  # fmt: skip
    if config.data.source is not None and not Path(config.data.source).is_dir():
        raise ConfigError(f"data.source: expected a folder, {config.data.source} is none: pass --set data.source=FOLDER")
    if config.adapter.kind in ("lora", "dora"):
        from coordexp.modeling.load import skeleton
        from coordexp.modeling.tiny import tiny_skeleton
        from coordexp.vocab.adapters import target_layers

        model = config.model
        target_layers(tiny_skeleton(model.tiny) if model.path is None else skeleton(Path(model.path)), config.adapter)
    config.train.check_length()


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
