"""`dijiang bench --against fla`: the attention of one layer alone, beside SDPA and flash-linear-attention's kernel.

All get the queries, keys and values that the first converted layer gets. Ours is the whole of the layer's own part:
features, far part, window. fla's `chunk_simple_gla` is a product of queries and keys with a decay a head: it has no
features to make and no denominator. It is timed on the same queries and keys ("fla"), and on as many numbers as our
features have ("fla, features").
"""

import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .errors import DijiangError
from .modeling.attention import DiJiangAttention
from .progress import count_bar
from .timing import random_ids, seconds

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class AttentionRow:
    """``model`` is "dijiang", "softmax" (SDPA), "fla" or "fla, features". Medians, for the whole batch."""

    model: str
    batch_size: int
    length: int
    seconds: float
    tokens_per_second: float


def fla_kernel(device: torch.device) -> Kernel:
    """flash-linear-attention's chunked kernel. Raises DijiangError where it can't run."""
    if device.type != "cuda":
        raise DijiangError(f"--against fla needs a CUDA device, and this is {device}: its kernels are Triton's")
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise DijiangError("--against fla needs flash-linear-attention: pip install flash-linear-attention") from error
    return chunk_simple_gla


@torch.inference_mode()
def time_attention(
    model: PreTrainedModel, cells: list[tuple[int, int]], repeats: int, kernel: Kernel
) -> list[AttentionRow]:
    """A row for each form and cell (batch size, length). The first turn warms up; lengths and forms take turns.

    kernel: takes q, k [B, N, H, K], v [B, N, H, V], g [B, N, H], the logs of decays, and scale, as fla's do.
    Raises DijiangError for a model without converted layers, and for one that attends to both sides.
    """
    times: dict[tuple[str, int, int], list[float]] = {}
    with count_bar("timing attention", len(cells) * (repeats + 1)) as advance:
        for turn in range(repeats + 1):
            for batch_size, length in cells:
                for name, form in forms(model, random_ids(model, batch_size, length), kernel).items():
                    taken = seconds(model.device, form)
                    if turn > 0:
                        times.setdefault((name, batch_size, length), []).append(taken)
                advance(1)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    return [AttentionRow(name, b, n, taken, b * n / taken) for (name, b, n), taken in medians.items()]


def forms(model: PreTrainedModel, ids: Tensor, kernel: Kernel) -> dict[str, Callable[[], Any]]:
    """Attention over a prompt [B, N] by each, ready to be called: shapes are as each wants them."""
    layer, arguments = layer_call(model, ids)
    q, k, v, _, call = arguments
    if not call.causal:
        raise DijiangError("--against fla: its kernels are causal, and this model attends to both sides")
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    width = layer.kept.features or q.shape[-1]
    features = [torch.randn(*x.shape[:-1], width, device=x.device).softmax(-1).to(x.dtype) for x in by_token[:2]]
    decay = torch.full(by_token[0].shape[:3], -1 / 256, device=q.device)
    return {
        "dijiang": lambda: layer(*arguments),
        "softmax": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scaling),
        "fla": lambda: kernel(*by_token, g=decay, scale=call.scaling),
        "fla, features": lambda: kernel(*features, by_token[2], g=decay, scale=1.0),
    }


class _Found(Exception):
    """Ends a pass where there is nothing more to learn from it."""


def layer_call(model: PreTrainedModel, ids: Tensor) -> tuple[DiJiangAttention, tuple[Any, ...]]:
    """The first converted layer, and what it is called with when the model reads a prompt [B, N] without a cache."""
    layer = next((module for module in model.modules() if isinstance(module, DiJiangAttention)), None)
    if layer is None:
        raise DijiangError("--against fla needs a converted checkpoint: this one has no converted layer")
    found: list[tuple[Any, ...]] = []

    def stop(_: Any, arguments: tuple[Any, ...]) -> None:
        found.append(arguments)
        raise _Found

    handle = layer.register_forward_pre_hook(stop)
    with suppress(_Found):  # asked for hidden states, the model reads a long prompt as one piece
        model(input_ids=ids, use_cache=False, output_hidden_states=True)
    handle.remove()
    return layer, found[0]
