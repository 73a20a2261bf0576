"""What a cheap command may load."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "triton", "pydantic", "matplotlib")


def _loaded(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) if done.stdout.strip() else set()


def test_import_coordexp_loads_no_heavy_library():
    assert _loaded("import coordexp; coordexp.__version__") == set()


def test_help_loads_no_heavy_library():
    code = "import coordexp.cli.main as m, sys\ntry:\n    m.app(['--help'])\nexcept SystemExit:\n    pass"
    assert _loaded(code) == set()


@pytest.mark.parametrize("module", ["coordexp.losses.objective", "coordexp.config.schema", "coordexp.evaluate.result", "coordexp.grammar"])
def test_options_configuration_and_evaluation_load_no_torch(module):
    assert _loaded(f"import {module}") & {"torch", "transformers", "triton"} == set()


def test_every_exported_name_resolves_and_an_unknown_one_does_not():
    import coordexp

    for name in coordexp.__all__:
        assert getattr(coordexp, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = coordexp.nothing
