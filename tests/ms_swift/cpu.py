"""What ``swift sft`` needs on a machine without torchvision, for a tiny vocabulary. A second ``--external_plugins`` file, tests only.

torchvision has no CPU build beside the torch tested here. ms-swift needs it in two places: ``qwen_vl_utils`` imports it for
videos, and the stock processor of Qwen3-VL asks for it before it builds its video part. Images need neither.
"""

from __future__ import annotations

import os
import sys
import types

import torch
import transformers
from swift.callbacks import callbacks_map
from swift.template.templates.qwen import Qwen2VLTemplate
from transformers import Qwen3VLProcessor, TrainerCallback


def _import_qwen_vl_utils() -> None:
    """Import the real package with an empty torchvision beside it, which is taken away again: transformers must not find it."""
    names = ("torchvision", "torchvision.io", "torchvision.transforms")
    modules = {name: types.ModuleType(name) for name in names}
    modules["torchvision"].io, modules["torchvision"].transforms = modules["torchvision.io"], modules["torchvision.transforms"]
    modules["torchvision"].__version__ = "0.0"
    modules["torchvision.transforms"].InterpolationMode = object
    sys.modules.update(modules)
    try:
        import qwen_vl_utils.vision_process  # noqa: F401
    finally:
        for name in names:
            del sys.modules[name]


class ImageProcessor(Qwen3VLProcessor):
    """The stock processor without its video part."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


_import_qwen_vl_utils()
transformers.AutoProcessor = ImageProcessor
# In Qwen's own vocabulary it is 151655, written into the template; the tests' vocabulary has it elsewhere.
Qwen2VLTemplate.image_token_id = int(os.environ["IMAGE_TOKEN_ID"])


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step in the file that ``GRADIENT_OUT`` names, if any."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        path = os.environ.get("GRADIENT_OUT")
        if path and state.global_step == 0 and state.is_world_process_zero:
            torch.save({name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, path)


callbacks_map["first_gradient"] = lambda args, trainer: FirstGradient()
