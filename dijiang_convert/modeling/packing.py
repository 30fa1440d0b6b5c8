"""Packed rows: several documents one after the other in a row, each computed as if it were alone.

Documents are told apart as transformers does it, by position_ids that restart where no attention_mask is given, or by
the bounds that flash attention takes (cu_seq_lens_q). The document of each token travels to the attention function in
the mask's place, [B, 1, 1, N] and counted from 1: every architecture hands down masks of four dimensions as they are,
and gradient checkpointing keeps them. This module finds documents and makes masks for softmax layers; in converted
layers `Layout.packed` keeps documents apart.

Shape legend: B batch, N tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
    sdpa_mask,
)

CACHE_NAMES = ("cache", "past_key_values")  # names of the cache argument, the newer first
FLASH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def new_tokens(given: dict[str, Any]) -> Tensor | None:
    """The tokens that a forward is given, [B, N], or their embeddings, [B, N, …]; None without either."""
    return given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")


def find_documents(given: dict[str, Any], causal: bool = True) -> Tensor | None:
    """The document of each token [B, N], counted from 0 in every row, or None where nothing is packed.

    given: the arguments of a model's forward. causal: False for encoders, whose documents only bounds tell apart: their
    positions may restart for other reasons. Raises ValueError for packed rows with an attention_mask or a cache, and
    for bounds that don't fit the row.
    """
    tokens = new_tokens(given)
    mask, positions, bounds = (given.get(name) for name in ("attention_mask", "position_ids", FLASH_ARGUMENTS[0]))
    documents: Tensor | None = None
    if tokens is None:
        return None
    if bounds is not None:
        documents = _between(bounds, given.get(FLASH_ARGUMENTS[1]), tokens)
    elif not causal:
        return None
    elif torch.compiler.is_compiling():
        documents = _unseen(given, tokens)
    elif positions is None or positions.shape[-1] == 1:
        return None
    elif mask is not None:
        documents = positions if _restart(positions, mask) else None
    elif positions.dim() != 2:
        documents = positions if (positions.diff(dim=-1) != 1).any() else None
    else:
        documents = find_packed_sequence_indices(positions.expand(tokens.shape[0], -1))
    if documents is None:
        return None
    if mask is not None or documents.dim() != 2:
        raise ValueError(
            "position_ids restart inside a row: packed rows take position_ids [batch, length] and no attention_mask"
        )
    if any(given.get(name) is not None for name in CACHE_NAMES) or given.get("use_cache"):
        raise ValueError("packed rows neither fill a cache nor go on from one: leave the cache and use_cache out")
    return documents


def _unseen(given: dict[str, Any], tokens: Tensor) -> Tensor | None:
    """The document of each token, [B, N], in a compiled graph, which can't look whether positions restart: so any call
    that may be packed has documents. None for other calls."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    caches = any(given.get(name) is not None for name in CACHE_NAMES) or given.get("use_cache")
    if mask is not None or caches or positions is None or positions.dim() != 2:
        return None
    return F.pad((positions.diff(dim=-1) != 1).cumsum(-1), (1, 0)).expand(tokens.shape[0], -1)


def _between(bounds: Tensor, of_keys: Tensor | None, tokens: Tensor) -> Tensor:
    """The document of each token, [1, N]. bounds, of_keys: [documents + 1], where each document starts, and N at the
    end; of_keys may be None. Raises ValueError for bounds that don't fit ``tokens``, or a batch of several rows."""
    length = tokens.shape[1]
    if tokens.shape[0] != 1 or bounds[-1] != length or (of_keys is not None and not torch.equal(bounds, of_keys)):
        raise ValueError(f"cu_seq_lens_q and cu_seq_lens_k must cover the {length} tokens of a batch of one row alike")
    return torch.bucketize(torch.arange(length, device=bounds.device), bounds[1:], right=True)[None]


def _restart(positions: Tensor, mask: Tensor) -> bool:
    """Whether positions, [B, N], stop growing between two real tokens. mask: [B, N or more], 0 for padding."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or positions.dim() != 2:
        return False
    real = mask[:, -positions.shape[1] :].bool()
    return bool(((positions.diff(dim=-1) < 1) & real[:, 1:] & real[:, :-1]).any())


def packed_arguments(given: dict[str, Any], documents: Tensor, config: Any, accepted: list[str]) -> dict[str, Any]:
    """The arguments ``given`` to a forward, with a mask that keeps documents apart. documents: [B, N], the document of
    each token. accepted: the names of the forward's parameters."""
    arguments = {name: value for name, value in given.items() if name not in FLASH_ARGUMENTS}
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "position_ids" in accepted and given.get("position_ids") is None:
        places, bounds = torch.arange(documents.shape[1], device=documents.device)[None], given.get(FLASH_ARGUMENTS[0])
        arguments["position_ids"] = places if bounds is None else places - bounds[documents]
    if config._attn_implementation.startswith("dijiang"):
        arguments["attention_mask"] = (documents + 1)[:, None, None]
    elif config._attn_implementation == "sdpa" and _is_full(config):
        # In other models transformers makes a mask for each kind of layer.
        arguments["attention_mask"] = packed_mask(documents)
    return arguments


def _is_full(config: Any) -> bool:
    """Whether every layer of the softmax model sees the whole of its document."""
    kinds = getattr(config, "layer_types", None) or []
    return getattr(config, "sliding_window", None) is None and set(kinds) <= {"full_attention"}


def packed_documents(mask: Tensor | None) -> Tensor | None:
    """The document of each token, [B, N], from a mask of `packed_arguments`; None for any other mask."""
    is_packed = mask is not None and mask.dim() == 4 and mask.dtype == torch.long  # other masks are bool
    return mask[:, 0, 0] if is_packed else None  # type: ignore[index]


def packed_mask(documents: Tensor, visible: Any = causal_mask_function) -> Tensor:
    """The mask for softmax attention, [B, 1, N, N]: True where query and key are of one document and the query sees the
    key by ``visible``, a mask function of transformers. documents: [B, N], the document of each token."""
    batch, length = documents.shape
    mask = sdpa_mask(
        batch_size=batch, q_length=length, kv_length=length, device=documents.device, allow_is_causal_skip=False,
        mask_function=and_masks(packed_sequence_mask_function(documents), visible),
    )  # fmt: skip
    assert mask is not None
    return mask
