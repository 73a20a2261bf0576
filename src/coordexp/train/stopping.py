"""SIGTERM and Ctrl-C: finish the step, save, leave."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The signal that asked this process to stop, or none yet."""

    def __init__(self) -> None:
        self.signum = 0

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within the block the first signal is noted and the step goes on; a second Ctrl-C interrupts at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signum and signum == signal.SIGINT:
                raise KeyboardInterrupt
            if not self.signum:
                say(f"{signal.Signals(signum).name}: saving after this step, then leaving (Ctrl-C once more: at once, without saving)")
            self.signum = signum

        before = {signum: signal.signal(signum, note) for signum in STOP_SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
