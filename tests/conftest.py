"""Runs before anything imports the libraries: no hub, no thread fights between workers."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if shutil.which("nvidia-smi") is None:
    # Read when triton is first imported, by whichever test of this worker comes first.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# A busy machine is no fault of the code: speed is measured in benchmarks.
settings.register_profile("coordexp", deadline=None)
settings.load_profile("coordexp")
