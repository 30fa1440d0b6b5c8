"""Which kernels may run: Triton ones of our own, and flash-linear-attention's. Neither package is needed.

Without them the layer runs in plain torch, after one notice. The environment variable ``DIJIANG_KERNELS`` decides
otherwise: ``torch`` keeps to plain torch, ``interpret`` takes CPU tensors to Triton's interpreter (with
``TRITON_INTERPRET=1``, slow: for tests).
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Looked up once: a compiled graph can't.
TRITON = importlib.util.find_spec("triton") is not None
FLA = TRITON and importlib.util.find_spec("fla") is not None
MODE = os.environ.get("DIJIANG_KERNELS", "")


def wants_kernels(x: Tensor) -> bool:
    """Whether x lies where Triton's kernels run."""
    return MODE != "torch" and (x.is_cuda or (MODE == "interpret" and x.device.type == "cpu"))


def triton_available(x: Tensor) -> bool:
    """Whether Triton's kernels of our own may take x: on a GPU, where triton is installed."""
    if TRITON or not wants_kernels(x):
        return TRITON and wants_kernels(x)
    _notice("triton is not installed: linear attention runs in plain torch")
    return False


def fla_available(x: Tensor) -> bool:
    """Whether flash-linear-attention's kernels may take x: on a GPU, where it is installed."""
    if FLA or not wants_kernels(x):
        return FLA and wants_kernels(x)
    _notice("flash-linear-attention is not installed: training runs linear attention in plain torch")
    return False


def chunked_form(q: Tensor, v: Tensor, *others: Tensor | None) -> Callable[..., Any] | None:
    """What computes `chunked` for q, features and all else by kernels, or None where plain torch does: see `_fit`."""
    given = [x for x in (q, v, *others) if x is not None]
    if not _fit(given, max(q.shape[-1], v.shape[-1])):
        return None
    if _need_gradients(given):
        if not fla_available(q):
            return None
        from .fla_kernels import train

        return train
    if not triton_available(q):
        return None
    from .chunk_kernels import prefill

    return prefill


def feature_form(x: Tensor, *parameters: Tensor | None) -> Callable[..., Any] | None:
    """What computes features of x by a kernel, or None where plain torch does: see `_fit`, and with gradients."""
    given = [x, *(p for p in parameters if p is not None)]
    if not _fit(given, x.shape[-1]) or _need_gradients(given) or not triton_available(x):
        return None
    from .feature_kernels import feature_map

    return feature_map


def _fit(given: list[Tensor], head_dim: int) -> bool:
    """Whether kernels fit these tensors. Plain torch has CPUs, float64, heads too wide for a GPU's shared memory, GPUs
    before compute capability 8.0 (and AMD's, where nothing was tried), and graphs that torch.compile or torch.export
    make, which fuse for themselves."""
    x = given[0]
    if not wants_kernels(x) or torch.compiler.is_compiling() or any(t.dtype == torch.float64 for t in given):
        return False
    if head_dim > (128 if x.dtype == torch.float32 else 256):
        return False
    return not x.is_cuda or _is_recent(x.device)


def _need_gradients(given: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in given)


@functools.cache
def _is_recent(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _notice(message: str) -> None:
    logger.warning_once(f"{message}, which is slower on a GPU. pip install 'dijiang-convert[cuda]'")
