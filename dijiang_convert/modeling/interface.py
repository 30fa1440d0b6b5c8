"""The attention function and the mask that transformers' interfaces call, of converted models.

A mask is passed around as flash attention's is: [B, keys], True for real tokens, or None if all are.

Shape legend: B batch, H query heads, G key/value heads, N new tokens, D head_dim, V value head_dim.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from .attention import Call
from .packing import packed_mask, packed_segments
from .table import Logits

# Arguments of attention functions that change the result and that the kernel does not follow.
UNSUPPORTED_ARGUMENTS = ("position_bias", "head_mask", "indices", "cu_seq_lens_q")


# ---------------------------------------------------------------------------------------- the attention function


def dijiang_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dijiang: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as `AttentionInterface` calls it: a thin dispatcher to the module's child, so that checkpoints of
    several versions can share the name. Layers that were not converted get softmax attention."""
    if not hasattr(module, "dijiang"):
        return softmax_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if dijiang is None:
        raise RuntimeError(f"{type(module).__name__} lost the forward hook that hands over the cache: reload the model")
    refuse_unsupported(kwargs)
    segments = packed_segments(attention_mask)
    mask = None if attention_mask is None or segments is not None else real_tokens(attention_mask, query.shape[2])
    if mask is not None and is_all(mask):
        mask = None
    causal = kwargs.get("is_causal")
    call = dijiang._replace(
        segments=segments,
        logits=Logits(
            query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap"), kwargs.get("s_aux")
        ),
        causal=getattr(module, "is_causal", True) if causal is None else causal,
    )
    out = module.dijiang(query, key, value, mask, call)  # type: ignore[operator]
    return out.transpose(1, 2).contiguous(), None


def refuse_unsupported(kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for attention arguments that the kernel would have to ignore."""
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"DiJiang attention does not support {name}")


def softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The source's attention from the mask that DiJiang models pass around (see `dijiang_mask`): PyTorch's SDPA, or the
    model's own function where that can't do it (soft-capped logits, sinks)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    queries, keys = query.shape[2], key.shape[2]
    segments = packed_segments(attention_mask)
    window = kwargs.get("sliding_window") or _sliding_window(module)
    visible = sliding_window_causal_mask_function(window) if window else causal_mask_function
    if segments is not None:
        attention_mask = packed_mask(segments, visible if causal else bidirectional_mask_function)
    elif attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.shape[2] == queries + 1:  # of a static cache, see `static_mask`
            attention_mask = attention_mask[:, :, :-1]
    elif causal:
        if attention_mask is not None:
            attention_mask = attention_mask[:, -keys:].bool()
        attention_mask = sdpa_mask(
            batch_size=query.shape[0], q_length=queries, kv_length=keys, q_offset=keys - queries, kv_offset=0,
            attention_mask=attention_mask, allow_is_causal_skip=plain and not window, mask_function=visible,
            device=query.device,
        )  # fmt: skip
    elif attention_mask is not None:
        attention_mask = attention_mask[:, None, None, -keys:].bool().expand(-1, 1, queries, -1)
    if plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=causal, **kwargs
        )
    if attention_mask is not None:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    own = sys.modules[type(module).__module__].eager_attention_forward
    out, _ = own(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return out, None


def _sliding_window(module: nn.Module) -> int | None:
    """The window of a sliding layer whose module does not say it in its call."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[module.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def dijiang_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask as DiJiang attention wants it: [B, keys], True for real tokens, or None if all are. The keys are the
    new ones; where softmax layers are left, all so far. (Of packed documents: see `packing`; of a cache that has places
    for tokens to come: `static_mask`.)

    Layers that see less or more than all tokens before (sliding, chunked, images) get transformers' own mask,
    [B, 1, N, keys], unless they were converted too."""
    layers, local_size = converted_layers(config), kwargs.pop("local_size", None)
    sizes: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "attention_mask": attention_mask,
    }  # fmt: skip
    is_static = isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        is_local = local_size is not None and (is_static or kwargs.get("allow_is_causal_skip", True))
        if not (is_local and _local_layers(config) <= layers):
            return sdpa_mask(**sizes, mask_function=mask_function, local_size=local_size, **kwargs)
    converted = set(range(config.num_hidden_layers)) <= layers
    if is_static:
        return static_mask(**sizes, converted=converted, **kwargs)
    if attention_mask is None:
        return None
    if converted:
        attention_mask = attention_mask[:, -q_length:]
    return None if is_all(attention_mask) else attention_mask


def static_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    converted: bool,
    **arguments: Any,
) -> Tensor | None:
    """The mask for a static cache: [B, 1, N + 1, keys], True where a new token sees a key, and in a last row which of
    the new tokens are real (see `real_tokens`). That row alone, [B, 1, 1, N], where every layer is ``converted``."""
    real = None
    if attention_mask is not None:
        real = attention_mask[:, torch.arange(q_length, device=attention_mask.device) + q_offset]
    if converted:
        return None if real is None or is_all(real) else real[:, None, None]
    visible = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,  # type: ignore[arg-type]
        attention_mask=attention_mask, **{**arguments, "allow_is_causal_skip": False},
    )  # fmt: skip
    assert visible is not None
    real = torch.ones_like(visible[:, 0, 0, :q_length]) if real is None else real
    return torch.cat([visible, F.pad(real, (kv_length - q_length, 0))[:, None, None]], 2)


def real_tokens(mask: Tensor, count: int) -> Tensor:
    """Which of the ``count`` new tokens are not padding, [B, N], by a mask of `dijiang_mask`.

    Raises NotImplementedError for a mask that is no causal one."""
    if mask.dim() == 4:
        if mask.shape[2] != count + 1 and mask.shape[2:] != (1, count):
            raise NotImplementedError(
                "DiJiang attention is causal over the real tokens of a row: it does not follow masks of another shape, "
                "as for packed rows given to an inner model, or for image tokens that see each other"
            )
        mask = mask[:, 0, -1]
    return mask[:, -count:]


def is_all(mask: Tensor) -> bool:
    """Whether every token is real. False where that can't be asked: compiled graphs see no values."""
    return not torch.compiler.is_compiling() and bool(mask.all())


def converted_layers(config: Any) -> set[int]:
    section = getattr(config, "dijiang", None)
    return set() if section is None else set(section["layers"])


def _local_layers(config: Any) -> set[int]:
    """Those that see a part of the tokens before: all of them where the config does not tell layers apart."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {i for i, kind in enumerate(types) if kind in ("sliding_attention", "chunked_attention")}


AttentionInterface.register("dijiang", dijiang_attention)
AttentionMaskInterface.register("dijiang", dijiang_mask)
