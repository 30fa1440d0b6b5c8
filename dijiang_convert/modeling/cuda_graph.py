"""Decoding on a GPU without the host's work: a step of the model recorded as a CUDA graph, and replayed for each token.

A converted model's decode step can be recorded as it is, since all that its cache keeps stays where it is. That takes
no longer than a few steps, where compiling takes a minute; transformers' own compilation is there for who asks for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

WARM_UP = 2  # steps before the recording, so that libraries have allocated what they need


class GraphConfig(CompileConfig):
    """In the place of a `CompileConfig`: asks `get_compiled_call` for a `GraphedStep`."""


class GraphedStep:
    """Stands for ``model`` in a loop that decodes, as a compiled model would. For one loop: it keeps the cache.

    Inputs are copied to where the recording reads them, outputs from where it writes them. Other inputs than those
    recorded (another shape, another cache) start anew. What can't be recorded runs as it is, after one notice.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.inputs: dict[str, Any] | None = None
        self.replay: Callable[[], Any] | None = None
        self.steps, self.is_recordable = 0, True

    def __call__(self, **inputs: Any) -> Any:
        if self.inputs is None or not _alike(self.inputs, inputs):
            self.inputs, self.replay, self.steps = inputs, None, 0
        self.steps += 1
        if self.steps <= WARM_UP or not self.is_recordable:
            return self.model(**inputs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        with torch.cuda.device_of(next(iter(tensors.values()))):
            if self.replay is None:
                static = {**inputs, **{name: x.clone() for name, x in tensors.items()}}
                try:
                    self.replay, self.inputs = record(lambda: self.model(**static)), static
                except RuntimeError as error:
                    self.is_recordable = False
                    reason = str(error).strip().split("\n")[0]
                    logger.warning_once(f"this model's decode step can't be a CUDA graph, decoding is slower: {reason}")
                    return self.model(**inputs)
            for name, x in tensors.items():
                self.inputs[name].copy_(x)
            return _copied(self.replay())


def record(step: Callable[[], Any]) -> Callable[[], Any]:
    """A function that does again on the GPU what ``step`` does, and returns the same tensors each time."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device, and an error only for what this thread does: others may stream text.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def is_recording(x: Tensor) -> bool:
    """Whether what is done with x is being recorded: then nobody can ask for its values."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether a recording with inputs a serves inputs b."""
    return a.keys() == b.keys() and all(
        (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x is y or (isinstance(x, bool | int | float | str) and x == y)
        for x, y in ((a[name], b[name]) for name in a)
    )


def _copied(x: Any) -> Any:
    """An output, and all in it, in tensors of its own."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, tuple):
        return tuple(_copied(each) for each in x)
    return type(x)(**{name: _copied(each) for name, each in x.items()}) if isinstance(x, dict) else x
