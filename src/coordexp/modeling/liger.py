"""Liger's kernels in the model: norms, rotary positions, SwiGLU. Its losses would take the place of the objective, and stay out."""

from __future__ import annotations

from typing import Any

import torch

from coordexp.errors import ConfigError


def use_liger(model: Any) -> None:
    """Put the kernels into ``model`` that Liger has for its kind. Rotary positions are exchanged for the whole process.

    Raises:
        ConfigError: no GPU, or a version of Liger that does not fit that of transformers.
    """
    if not torch.cuda.is_available():
        raise ConfigError("model.liger: its kernels run on a GPU, and there is none here: remove it")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    except ImportError as error:
        raise ConfigError(f"model.liger: this liger-kernel does not fit the installed transformers ({error}): remove it") from error
