"""Calls the real command line in this process."""

from __future__ import annotations

import sys

import pytest

from coordexp.cli import main as cli


def call(monkeypatch, capsys, *words):
    """Exit code, stdout and stderr of ``coordexp WORDS``."""
    monkeypatch.setattr(sys, "argv", ["coordexp", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err
