"""What a converted model's attention computes while it trains: the kernel, or the softmax it came from."""

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
    """Inside, the model runs another attention function; "softmax" makes it the model that its base weights are."""
    name = softmax_implementation(type(model)) if name == "softmax" else name
    # Parts of a model may have configs of their own; what runs another function than the whole is left alone.
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
    """Inside, a converted model, with adapters or without, is the softmax model it was: no adapters, no dropout."""
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
    """Inside, kernels are computed again in the backward pass instead of keeping what lies between their input and
    output, which takes more memory than all the rest of a layer. For training without activation checkpointing, which
    does the same for whole layers."""
    with attention(model, RECOMPUTED):
        yield


def recomputed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`dijiang_attention` that keeps only its input for the backward pass."""
    return checkpoint(
        dijiang_attention, module, query, key, value, attention_mask,
        use_reentrant=False, preserve_rng_state=False, **kwargs,
    )  # fmt: skip


AttentionInterface.register(RECOMPUTED, recomputed_attention)
AttentionMaskInterface.register(RECOMPUTED, dijiang_mask)
