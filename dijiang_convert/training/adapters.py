"""Chooses the linear layers of a model that get LoRA adapters. The trainer adds the adapters."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from .logits import body_name


def lora_targets(model: nn.Module, which: str) -> list[str]:
    """The names of the linear layers that get adapters, GPT-2's `Conv1D` included.

    which: "attention" for those of converted attention modules, "all" for all but the output head.
    """
    attentions = [name.removesuffix("dijiang") for name, _ in model.named_modules() if name.endswith(".dijiang")]
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if which == "attention":
        return [name for name in linear if name.startswith(tuple(attentions))]
    body = body_name(model)
    return [name for name in linear if name.startswith(f"{body}." if body else "")]
