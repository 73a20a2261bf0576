"""The tests of this folder run ms-swift itself, in the environment of ``make test-swift``; elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("swift") is not None:
        return
    skip = pytest.mark.skip(reason="ms-swift is not installed here (its dependencies fight ours): run `make test-swift`")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(skip)
