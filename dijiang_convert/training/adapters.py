"""Which layers of a model get adapters."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from .logits import body_name


def lora_targets(model: nn.Module, which: str) -> list[str]:
    """Names of the linear layers that get adapters: of converted attention modules, or "all" but the output head."""
    attentions = [name.removesuffix("dijiang") for name, _ in model.named_modules() if name.endswith(".dijiang")]
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    if which == "attention":
        return [name for name in linear if name.startswith(tuple(attentions))]
    body = body_name(model)
    return [name for name in linear if name.startswith(f"{body}." if body else "")]
