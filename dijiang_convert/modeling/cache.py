"""The cache of a converted layer: tensors of fixed size, whatever the length.

`DiJiangCacheLayer` takes the place of a layer of `DynamicCache`, `StaticDiJiangCacheLayer` of one of `StaticCache`.
Both only keep tensors and count tokens: the attention module computes what new tokens make of the past.

Shape legend: B batch, A query and key/value heads, N new tokens, D head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from .past import Past, Sizes, Tokens


class DiJiangCacheLayer(CacheLayerMixin):
    """The `Past` of a layer, and how many tokens it holds.

    `update` only counts tokens: the attention module, which has the features, makes the new past and calls `keep`.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.past: Past | None = None
        self.count: int | Tensor = 0  # real tokens in the past: one number, or [B] after padding
        self.seen = 0  # tokens so far, padding included
        self.pending: Tokens | None = None  # tokens that `crop` can take back, which are not in the past yet
        self.is_confirmed = False  # whether `crop` was called after the pending tokens came
        self.known: dict[str, Any] = {}  # products of the layer's parameters that decoding uses again
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_empty(0)  # callers may look for both: they are empty
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens, and returns their keys and values without those of earlier tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    # ------------------------------------------------------------------------------ what the attention module uses

    def takes_one(self, valid: Tensor | None) -> bool:
        """Whether a single token can be written in place. valid: [B, 1], False for padding, or None without padding."""
        return self.past is not None and not self.record_past and valid is None and not torch.is_grad_enabled()

    def keep(self, past: Past, count: int | Tensor) -> None:
        """Replaces the past. count: how many tokens it holds, one number or [B]."""
        self.past, self.count = past, count

    def writable_past(self) -> Past:
        """The past to write to. Tensors of torch.inference_mode() are copied if that mode has ended, since PyTorch then
        refuses to change such tensors in place."""
        assert self.past is not None
        if not torch.is_inference_mode_enabled() and self.past.first().is_inference():
            self.past = self.past.map(torch.clone)
        return self.past

    # ------------------------------------------------------------------------------- what generation strategies use

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.past is not None:
            self.past = self.past.map(change)
        if self.pending is not None:
            self.pending = self.pending.map(change)
        if isinstance(self.count, Tensor):
            self.count = change(self.count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices, ...])

    def activate_past_recording(self) -> None:
        """From now on tokens enter the past only once a `crop` has confirmed them."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens, and confirms the pending tokens before them. Raises
        ValueError for a positive number, and RuntimeError if there are not so many pending tokens: others are in the
        past already."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        if not self.is_initialized:  # early exit left this layer out
            return
        count, kept = -tokens_to_remove, 0 if self.pending is None else self.pending.length
        if count > kept:
            raise RuntimeError(
                f"crop of {count} tokens from a DiJiang cache that can take back {kept}: "
                "call activate_past_recording() on the cache before feeding them"
            )
        if self.pending is not None:
            self.pending = self.pending.without_last(count) if count < kept else None
            self.is_confirmed = True
        self.seen -= count

    def offload(self) -> None:
        """Does nothing: the past is small and stays on its device. (Softmax layers of the same cache are offloaded.)"""

    def prefetch(self) -> None:
        """Does nothing, since `offload` moves nothing."""


class StaticDiJiangCacheLayer(DiJiangCacheLayer):
    """A `DiJiangCacheLayer` for compiled decoding: every call writes to the same tensors.

    Counts of tokens are tensors, too, so a graph need not be compiled again. Tokens can't be taken back.
    """

    is_compileable = True
    is_croppable = False  # type: ignore[assignment]

    def __init__(self, sizes: Sizes, max_cache_len: int) -> None:
        CacheLayerMixin.__init__(self)
        self.sizes = sizes
        self.max_cache_len = max_cache_len  # length of softmax layers in the cache: any layer may be asked for it
        self.record_past, self.pending, self.past = False, None, None
        self.known: dict[str, Any] = {}
        self.count, self.seen = torch.tensor(0), torch.tensor(0)  # type: ignore[assignment]
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the empty past, with the batch size, the device and the dtype of ``key_states``."""
        super().lazy_initialization(key_states, value_states)
        self.batch_size = key_states.shape[0]
        self.past = self.sizes.empty(self.batch_size, key_states)
        self.count = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        self.seen = self.seen.to(self.device)  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():  # CUDA graphs then write to the tensors in place
            for x in self._tensors():
                torch._dynamo.mark_static_address(x)

    def _tensors(self) -> list[Tensor]:
        assert self.past is not None and isinstance(self.count, Tensor) and isinstance(self.seen, Tensor)
        return [*self.past.tensors(), self.count, self.seen]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens, and returns their keys and values. Raises ValueError for another batch size, for keys
        that need a gradient, and in an export that would take the count for a constant."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"this static cache holds {self.batch_size} rows, not {key_states.shape[0]}: make another")
        if isinstance(key_states, FakeTensor) and not isinstance(self.count, FakeTensor):
            raise ValueError("a static cache that is part of an exported module needs torch.export with strict=True")
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise ValueError("a static cache is written in place and keeps no gradient: call under torch.no_grad()")
        self.seen.add_(key_states.shape[-2])  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.seen if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def reset(self) -> None:
        if self.is_initialized and self.past is not None:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            self.past.copy_(self.sizes.empty(self.batch_size, like))
            self.count.zero_()  # type: ignore[union-attr]
            self.seen.zero_()  # type: ignore[attr-defined]
        self.known = {}

    def takes_one(self, valid: Tensor | None) -> bool:
        return True

    def keep(self, past: Past, count: int | Tensor) -> None:
        assert self.past is not None and isinstance(self.count, Tensor)
        self.past.copy_(past)
        self.count.copy_(torch.as_tensor(count))

    def writable_past(self) -> Past:
        assert self.past is not None
        return self.past

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(change)
        if self.is_initialized:
            self.batch_size = self.count.shape[0]  # type: ignore[union-attr]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            rows = beam_idx.to(self.device)
            for x in self._tensors()[:-1]:  # the last is `seen`, one number for all rows
                x.copy_(x.index_select(0, rows))

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "a static DiJiang cache can't take tokens back: assisted decoding needs a dynamic one"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("a static DiJiang cache can't take tokens back: use a dynamic one")


def preceding(tokens: Tensor, first: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The real token before each of ``tokens``, [B, A, N, D], and the last real token, [B, A, 1, D].

    tokens: [B, A, N, D], queries and keys. first: [B, A, 1, D], the token before all of them. valid: [B, N], False for
    padding, or None without padding.
    """
    every = torch.cat([first, tokens], 2)
    if valid is not None:
        places = torch.arange(1, every.shape[2], device=valid.device)
        last = F.pad(torch.where(valid, places, 0).cummax(1).values, (1, 0))  # index of the last real token
        every = every.gather(2, last[:, None, :, None].expand_as(every))
    return every[:, :, :-1], every[:, :, -1:]


def cache_layer(cache: Cache, layer_idx: int, sizes: Sizes) -> DiJiangCacheLayer:
    """The DiJiang layer at ``layer_idx`` of a cache. It replaces a plain empty layer, as generate() makes it.

    sizes: of the layer's past. Raises ValueError for a layer that holds a softmax model's tokens, that another version
    of this code made, or that is of an unknown kind.
    """
    while len(cache.layers) <= layer_idx:  # some caches add a layer at its first update
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, DiJiangCacheLayer):
        return layer
    if type(layer).__name__ in (DiJiangCacheLayer.__name__, StaticDiJiangCacheLayer.__name__):
        raise ValueError("this cache was made by another DiJiang version: start from an empty cache")
    has_place = type(layer).__name__ != "DummyLayer"  # a dummy stands for a layer that borrows keys
    if has_place and not isinstance(layer, DynamicLayer | StaticLayer):
        raise ValueError(
            f"a converted layer can't use {type(layer).__name__}: pass a DynamicCache, a StaticCache or none"
        )
    if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0:
        raise ValueError(
            "the cache was filled by a softmax model: a converted layer keeps no keys, start from an empty cache"
        )
    new: DiJiangCacheLayer
    others = [layer] if has_place else cache.layers
    if any(isinstance(each, StaticLayer | StaticDiJiangCacheLayer) for each in others):
        new = StaticDiJiangCacheLayer(sizes, cache.get_max_length())
    else:
        new = DiJiangCacheLayer()
        new.record_past = any(getattr(each, "record_past", False) for each in others)
    cache.layers[layer_idx] = new
    return new
