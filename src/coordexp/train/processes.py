"""The processes of one training run, as torchrun or accelerate started them; a single process is a group of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``count`` processes. With one, nothing here communicates."""

    rank: int
    count: int

    @staticmethod
    def join() -> Processes:
        """The group that the launcher's environment describes, connected."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return Processes(0, 1)
        import torch
        from accelerate import PartialState

        # One rank makes the data while the others wait.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
        return Processes(int(state.process_index), int(state.num_processes))

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def share(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box)
        return box[0]

    def leave(self) -> None:
        """Disconnect."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()
