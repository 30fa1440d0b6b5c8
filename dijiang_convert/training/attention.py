"""Chooses what the attention of a converted model computes while it trains: its kernel, or the original's softmax.

The choice is made in the model's config, where transformers looks attention functions up. Weights are not touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..checkpoint.loading import softmax_implementation
from ..modeling.interface import dijiang_attention, dijiang_mask
from .logits import inner_model

RECOMPUTED = "dijiang_recomputed"


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the context, the model runs another attention function.

    name: a function of `AttentionInterface`, or "softmax" for the original's attention.
    """
    name = softmax_implementation(type(model)) if name == "softmax" else name
    # Parts of a model may have configs of their own. A part that runs another function than the whole keeps it.
    config: Any = model.config
    parts = [getattr(config, part) for part in config.sub_configs if getattr(config, part, None) is not None]
    used = config._attn_implementation_internal
    configs = [config, *(each for each in parts if each._attn_implementation_internal == used)]
    before = [each._attn_implementation_internal for each in configs]
    try:
        for each in configs:
            each._attn_implementation_internal = name
        yield
    finally:
        for each, old in zip(configs, before, strict=True):
            each._attn_implementation_internal = old


@contextmanager
def original(student: Any) -> Iterator[None]:
    """Inside the context, a converted model computes softmax attention, without adapters and without dropout.

    That is the original, as long as no stage has changed the base weights. student: the model, or a wrapper of it.
    """
    training = student.training
    student.eval()
    adapted = next((module for module in student.modules() if isinstance(module, PeftModel)), None)
    try:
        with (
            nullcontext() if adapted is None else adapted.disable_adapter(),
            attention(inner_model(student), "softmax"),
        ):
            yield
    finally:
        student.train(training)


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context, the backward pass recomputes each kernel from its inputs.

    Autograd would keep a kernel's intermediate tensors, which take more memory than the rest of the layer. Activation
    checkpointing recomputes whole layers, so training with it does not need this context.
    """
    with attention(model, RECOMPUTED):
        yield


def recomputed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`dijiang_attention`, with the same arguments, that keeps nothing but its inputs for the backward pass."""
    return checkpoint(
        dijiang_attention, module, query, key, value, attention_mask,
        use_reentrant=False, preserve_rng_state=False, **kwargs,
    )  # fmt: skip


AttentionInterface.register(RECOMPUTED, recomputed_attention)
AttentionMaskInterface.register(RECOMPUTED, dijiang_mask)
