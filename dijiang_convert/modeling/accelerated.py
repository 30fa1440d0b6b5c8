"""Which kernels may run: Triton ones of our own, and flash-linear-attention's. Neither package is needed.

Without them the layer runs in plain torch, after one notice. The environment variable ``DIJIANG_KERNELS`` decides
otherwise: ``torch`` keeps to plain torch, ``interpret`` takes CPU tensors to Triton's interpreter (with
``TRITON_INTERPRET=1``, slow: for tests).
"""

import importlib.util
import os

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


def _notice(message: str) -> None:
    logger.warning_once(f"{message}, which is slower on a GPU. pip install 'dijiang-convert[cuda]'")
