"""Multimodal rotary positions by the model's own rule, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coordexp.errors import ConfigError


@dataclass(frozen=True)
class RopeIndex:
    """``get_rope_index`` of a model class under a configuration. Small and picklable: data loader workers carry it."""

    backbone_class: Any
    config: Any

    def __call__(self, input_ids: Tensor, mm_token_type_ids: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Temporal, height and width positions ``[3, B, L]`` of unpadded samples ``[B, L]``."""
        # The method reads the configuration only: an instance without layers answers like the whole model.
        shell: Any = self.backbone_class.__new__(self.backbone_class)
        torch.nn.Module.__init__(shell)
        shell.config = self.config
        positions: Tensor
        positions, _ = shell.get_rope_index(input_ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw)
        return positions

    @staticmethod
    def of(model: torch.nn.Module) -> RopeIndex:
        """The rule of ``model``, whatever it is wrapped in."""
        module: Any = backbone(model)
        return RopeIndex(type(module), module.config)


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The Qwen-VL model without its head, inside wrappers or not.

    Raises:
        ConfigError: another architecture.
    """
    from transformers import Qwen2_5_VLModel, Qwen3VLModel

    for module in model.modules():
        if isinstance(module, Qwen2_5_VLModel | Qwen3VLModel):
            return module
    raise ConfigError(
        f"data.packing.enabled: packing knows Qwen3-VL and Qwen2.5-VL, not {type(model).__name__}: set data.packing.enabled=false"
    )
