"""Ctrl-C is answered within two seconds, wherever the main thread is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# Python runs a handler between two of its own instructions: inside a library's code it waits until that returns.
_PATIENCE: Final = 1.5


@contextmanager
def answered() -> Iterator[None]:
    """While the block runs, SIGINT is a KeyboardInterrupt; where the main thread cannot take it in time, the process ends with 130.

    A command that installs a handler of its own (training, which saves a checkpoint) is left alone. What was being written has a
    temporary name, and is removed by the next call.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken, over = threading.Event(), threading.Event()

    def handler(signum: int, frame: Any) -> None:
        taken.set()
        raise KeyboardInterrupt

    def watch() -> None:
        while (heard := os.read(read, 1)) != b"":
            if heard[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) is not handler:
                continue
            if not taken.wait(_PATIENCE):
                os.write(2, b"interrupted\n")
                os._exit(130)
            if not over.wait(_PATIENCE):
                os.write(2, b"interrupted: what was begun is being removed\n")
        os.close(read)

    read, write = os.pipe()
    os.set_blocking(write, False)
    before, fd_before = signal.signal(signal.SIGINT, handler), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(fd_before)
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, before)
        os.close(write)


def start() -> None:
    """The program: an interruption while it loads is no traceback either."""
    try:
        from coordexp.cli.main import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    main()
