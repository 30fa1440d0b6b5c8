"""The attention function and the mask function "dijiang", which transformers' interfaces call in converted models.

Both translate arguments, and leave attention to `attention` or to the source's softmax. A mask has the form of flash
attention's: [B, keys], True for real tokens, or None if all are.

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
from .packing import packed_documents, packed_mask
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
    """Attention as `AttentionInterface` calls it, [B, N, H, V]; and None, for it has no weights to return.

    The module's child computes it, so checkpoints of several versions can share the name "dijiang". A module without a
    child, whose layer is not converted, gets `softmax_attention`.

    query: [B, H, N, D], key: [B, G, N, D], value: [B, G, N, V]. attention_mask: from `dijiang_mask`, or the documents
    of `packed_arguments`. dijiang: from `_hand_over`. Raises RuntimeError where that hook is missing, and
    NotImplementedError for arguments that the kernel does not follow.
    """
    if not hasattr(module, "dijiang"):
        return softmax_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if dijiang is None:
        raise RuntimeError(f"{type(module).__name__} lost the forward hook that hands over the cache: reload the model")
    refuse_unsupported(kwargs)
    documents = packed_documents(attention_mask)
    mask = None if attention_mask is None or documents is not None else real_tokens(attention_mask, query.shape[2])
    if mask is not None and is_all(mask):
        mask = None
    causal = kwargs.get("is_causal")
    call = dijiang._replace(
        documents=documents,
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
    """Softmax attention of a layer that is not converted, under the masks of a converted model: by PyTorch's SDPA or,
    for soft-capped logits and sinks, by the model's own function. Arguments and result are those of
    `dijiang_attention`, but keys and values are those of all tokens so far."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    queries, keys = query.shape[2], key.shape[2]
    documents = packed_documents(attention_mask)
    window = kwargs.get("sliding_window") or _sliding_window(module)
    visible = sliding_window_causal_mask_function(window) if window else causal_mask_function
    if documents is not None:
        attention_mask = packed_mask(documents, visible if causal else bidirectional_mask_function)
    elif attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.shape[2] == queries + 1:  # the last row of `static_mask` is of no query
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
    """The sliding window that the config gives a layer, for modules that don't pass it to their attention function;
    None for other layers."""
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
    """The padding mask of converted layers, as `AttentionMaskInterface` calls it: [B, keys], True for real tokens, None
    if all are. The keys are the new tokens, or all so far if some layers are softmax. A static cache, which has slots
    for later tokens, gets `static_mask`.

    Sliding and chunked layers that are not converted, and images, get transformers' own mask, [B, 1, N, keys].

    attention_mask: [B, tokens so far], 0 for padding, or None. The other arguments are transformers'.
    """
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
    """The mask for a static cache, [B, 1, N + 1, keys]: True where a new token sees a key. The last row is of no query:
    its last N entries are True for new tokens that are real (see `real_tokens`).

    converted: whether every layer is converted. Then the mask has these N entries alone, [B, 1, 1, N], or is None if
    all are True. The other arguments are those of `dijiang_mask`.
    """
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
    """Which of the ``count`` new tokens are not padding, [B, N].

    mask: from `dijiang_mask`. Raises NotImplementedError for any other mask of four dimensions.
    """
    if mask.dim() == 4:
        if mask.shape[2] != count + 1 and mask.shape[2:] != (1, count):
            raise NotImplementedError(
                "DiJiang attention is causal over the real tokens of a row: it does not follow masks of another shape, "
                "as for image tokens that see each other"
            )
        mask = mask[:, 0, -1]
    return mask[:, -count:]


def is_all(mask: Tensor) -> bool:
    """Whether every token of a mask is real; False in a compiled graph, which can't look at values."""
    return not torch.compiler.is_compiling() and bool(mask.all())


def converted_layers(config: Any) -> set[int]:
    """The numbers of the layers that a config's section ``dijiang`` names; none for a config without this section."""
    section = getattr(config, "dijiang", None)
    return set() if section is None else set(section["layers"])


def _local_layers(config: Any) -> set[int]:
    """The layers that see only a part of the tokens before; all layers if the config does not tell them apart."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {i for i, kind in enumerate(types) if kind in ("sliding_attention", "chunked_attention")}


AttentionInterface.register("dijiang", dijiang_attention)
AttentionMaskInterface.register("dijiang", dijiang_mask)
