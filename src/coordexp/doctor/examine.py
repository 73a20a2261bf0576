"""All checks that were asked for, in a fixed order."""

from __future__ import annotations

from pathlib import Path

from coordexp.doctor.checks import Check
from coordexp.errors import ConfigError


def examine(checkpoint: Path | None = None, data: Path | None = None, predictions: Path | None = None) -> list[Check]:
    """The machine's checks, then those of whatever is given.

    Raises:
        ConfigError: predictions without data, or a folder that is not there.
        DataError, ComparisonError: a data or predictions file that cannot be read, or two that hold different images.
    """
    if predictions is not None and data is None:
        raise ConfigError("--predictions: expected the records they were made for as well: pass --data FILE")
    checks: list[Check] = []
    # What is given may be mistaken, which is found in a moment; torch takes seconds.
    if data is not None:
        from coordexp.doctor.data import check_data

        checks += check_data(data)
    if predictions is not None and data is not None:
        from coordexp.doctor.predictions import check_predictions

        checks += check_predictions(predictions, data)
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise ConfigError(f"{checkpoint}: no such folder: expected a model, a checkpoint or a run directory")
        from coordexp.doctor.checkpoint import check_checkpoint

        checks = check_checkpoint(checkpoint) + checks
    from coordexp.doctor.environment import check_environment

    return check_environment() + checks
