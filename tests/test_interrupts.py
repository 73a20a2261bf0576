"""Ctrl-C is answered within two seconds: in Python, inside a library's code, while a lock is waited for, in training's own way."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from coordexp import ab

# A command that hangs in one of several ways, run by the real entry point.
PROGRAM = """
import sys, time
import numpy as np
from coordexp.cli import main as cli

def hang(kind: str):
    print("begun", flush=True)
    if kind == "library": np.linalg.svd(np.random.rand(6000, 6000))
    if kind == "cleanup":
        try: time.sleep(60)
        finally: time.sleep(2)

cli.app.command("hang")(hang)
sys.argv = ["coordexp", "hang", sys.argv[1]]
cli.main()
"""


@pytest.mark.parametrize("kind", ["library", "cleanup"])
def test_ctrl_c_is_answered_within_two_seconds(kind):
    with subprocess.Popen([sys.executable, "-c", PROGRAM, kind], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"begun\n"
        time.sleep(0.3)
        begin = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert child.stderr.read(11) == b"interrupted"
        # Two seconds, and what a busy machine may add.
        assert time.monotonic() - begin < 3.5
        rest = child.stderr.read()
    assert child.returncode == 130
    assert b"Traceback" not in rest


def test_an_ab_that_waits_for_another_ones_warm_up_stops(tmp_path):
    begun = {"state": "waiting", "needs": None, "over": False, "seconds": 0.0}
    config = SimpleNamespace(train=SimpleNamespace(max_steps=1))
    task = SimpleNamespace(folder=tmp_path / "warm", arm=None, seed=0, label="warm-up", config=config, **begun)
    pool = ab._Pool([task], tmp_path, ("",), False, Console(quiet=True), lambda: None)
    (tmp_path / ".warm").mkdir()
    with (tmp_path / ".warm" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        from threading import Timer

        Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        with pytest.raises(ab.RunStopped):
            pool.run()
    assert time.monotonic() - begin < 4
    assert task.state == "stopped"
