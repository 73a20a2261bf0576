"""Errors that are the user's to solve. The command line prints their message as one line and exits with code 2."""

from __future__ import annotations


class CoordexpError(Exception):
    """Base of every error a user can act on: what is wrong, where, what to do."""


class ConfigError(CoordexpError):
    """A configuration that cannot work. ``problems`` holds every fault found, one line each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(CoordexpError):
    """A record, image or annotation that cannot be used. Names the file and, where there is one, the line."""


class VocabError(CoordexpError):
    """A tokenizer or checkpoint whose coordinate vocabulary is missing or unusable."""


class ComparisonError(CoordexpError):
    """Two runs or files that cannot be compared or evaluated against each other."""


class RunStopped(Exception):
    """A signal ended a run in good order: a checkpoint was saved. The command line exits with 128 + ``signum``."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(f"stopped by signal {signum}")
