"""Finds the module where numbers stop being finite. The trainer asks only after a loss or a gradient was not finite."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def find(model: nn.Module, rerun: Callable[[], Any]) -> str:
    """The name of the first module in a forward pass whose output is not finite.

    If all outputs are finite, it is the first module in the backward pass whose parameters' gradient is not, which is
    the last by order of definition; and "the loss" if these gradients are finite as well. All processes must call this.

    rerun: repeats the forward passes of the failed step.
    """
    names = [name for name in gather_object([_first_output(model, rerun)]) if name]
    if names:
        return plain_name(names[0])
    ordered = [name for name, _ in model.named_parameters()]
    bad = {name for names in gather_object([_gradients(model)]) for name in names}
    last = max((ordered.index(name) for name in bad), default=-1)
    return plain_name(ordered[last].rpartition(".")[0]) if last >= 0 else "the loss"


def _first_output(model: nn.Module, rerun: Callable[[], Any]) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _gradients(model: nn.Module) -> list[str]:
    """The names of parameters whose gradient is not finite in the shard of this process."""
    found = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient is not None and not gradient.isfinite().all():
            found.append(name)
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))


def plain_name(name: str) -> str:
    """A module's name in the checkpoint, without the names of the wrappers of DDP and peft."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    for wrapper in (".modules_to_save.default", ".base_layer", ".lora_A.default", ".lora_B.default"):
        name = name.replace(wrapper, "")
    return name
