"""The cache of a converted layer: a state of fixed size and the window's keys, whatever the length.

Shape legend: B batch, G key/value heads, L kept tokens (at most the window, and more only while recording the past),
D head_dim, V value head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .linear_attention import FarState


class DiJiangCacheLayer(CacheLayerMixin):
    """Holds the far state, and keys and values of the last ``window`` tokens.

    `update` only counts: what the new tokens do to the state is the attention function's work, since the features are
    made there. Once the window is full, a single token replaces the oldest one in place (a ring, see `oldest`).

    keys, values: [B, G, L, D], [B, G, L, V]. far_keys: [B, G, L, D] where the far part sees other keys than the
    window does (rotary embedding removed), else None. valid: [B, L], False for padding.
    """

    is_sliding = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: FarState | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.far_keys: Tensor | None = None
        self.valid: Tensor | None = None
        self.oldest = 0  # index of the oldest token in the ring
        self.seen = 0
        self.pending = 0  # tokens that `crop` can still take back
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens and returns them alone: the past is in the state."""
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

    # ------------------------------------------------------------------------------ what the attention function uses

    @property
    def kept(self) -> int:
        """L, how many tokens are kept one by one."""
        return 0 if self.valid is None else self.valid.shape[1]

    @property
    def is_full(self) -> bool:
        """From here on a token costs the same, however many there were: see `replace_oldest`."""
        return self.valid is not None and self.kept == self.window and not self.record_past

    def tokens(self, ordered: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(keys, values, far keys, valid) of the kept tokens, oldest first unless ``ordered`` is False."""
        if ordered:
            self._unroll()
        assert self.keys is not None and self.values is not None and self.valid is not None
        return self.keys, self.values, self.keys if self.far_keys is None else self.far_keys, self.valid

    def append(self, k: Tensor, v: Tensor, far_k: Tensor | None, valid: Tensor) -> None:
        """Puts new tokens behind the kept ones."""
        if self.keys is None or self.values is None or self.valid is None:
            self.keys, self.values, self.far_keys, self.valid = k, v, far_k, valid
            return
        self._unroll()
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        self.far_keys = None if far_k is None or self.far_keys is None else torch.cat([self.far_keys, far_k], 2)
        self.valid = torch.cat([self.valid, valid], 1)

    def split_oldest(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes the ``count`` oldest tokens out of the kept ones and returns them as `tokens` does."""
        count = max(count, 0)
        old = tuple(x.narrow(dim, 0, count) for x, dim in zip(self.tokens(), (2, 2, 2, 1), strict=True))
        # A copy, so that the memory of a long prompt is freed and the ring owns what it writes to.
        self._map(lambda x, dim: x.narrow(dim, count, x.shape[dim] - count).clone())
        return old  # type: ignore[return-value]

    def replace_oldest(self, k: Tensor, v: Tensor, far_k: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Puts one token in the place of the oldest, and returns that one as `tokens` does. Without a window the new
        token is itself the oldest."""
        if self.window == 0:
            return k, v, k if far_k is None else far_k, torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        t, tokens = self.oldest, self.tokens(ordered=False)
        old = tuple(x.narrow(dim, t, 1).clone() for x, dim in zip(tokens, (2, 2, 2, 1), strict=True))
        keys, values, far_keys, valid = tokens
        keys[:, :, t], values[:, :, t], valid[:, t] = k[:, :, 0], v[:, :, 0], True
        if far_k is not None:
            far_keys[:, :, t] = far_k[:, :, 0]
        self.oldest = (t + 1) % self.window
        return old  # type: ignore[return-value]

    def reorder_tokens(self, order: Tensor) -> None:
        """Permutes the kept tokens of every row: order [B, L]."""

        def gather(x: Tensor, dim: int) -> Tensor:
            return x.gather(1, order) if dim == 1 else x.gather(2, order[:, None, :, None].expand_as(x))

        self._map(gather)

    def _unroll(self) -> None:
        """Brings the ring back into order, oldest first."""
        if self.oldest:
            shift = self.oldest
            self._map(lambda x, dim: x.roll(-shift, dim))
            self.oldest = 0

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """Applies ``change(tensor, token dimension)`` to everything kept by token."""
        assert self.keys is not None and self.values is not None and self.valid is not None
        self.keys, self.values, self.valid = change(self.keys, 2), change(self.values, 2), change(self.valid, 1)
        self.far_keys = None if self.far_keys is None else change(self.far_keys, 2)

    # ------------------------------------------------------------------------------- what generation strategies use

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.valid is not None:
            self._map(lambda x, dim: change(x))
        if self.state is not None:
            self.state = FarState(change(self.state.s), change(self.state.m))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_batch(lambda x: x[indices, ...])

    def activate_past_recording(self) -> None:
        """From now on tokens enter the state only once a `crop` has confirmed them."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past or self.seen == self.kept

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last ``-tokens_to_remove`` tokens exactly. Raises RuntimeError where they are already part
        of the state: call `activate_past_recording` before feeding them."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove")
        count = -tokens_to_remove
        if count > (self.kept if self.seen == self.kept else self.pending):
            raise RuntimeError(
                f"crop of {count} tokens from a DiJiang cache that can take back {self.pending}: "
                "call activate_past_recording() on the cache before feeding them"
            )
        if count:
            self._unroll()
            self._map(lambda x, dim: x.narrow(dim, 0, x.shape[dim] - count))
            self.seen -= count
        self.pending = 0

    def offload(self) -> None:
        raise NotImplementedError("a DiJiang cache is small and stays: drop cache_implementation='offloaded'")


def cache_layer(cache: Cache, layer_idx: int, window: int) -> DiJiangCacheLayer:
    """The DiJiang layer at ``layer_idx``, put in place of the plain and still empty one that generate() made.

    Raises ValueError where the layer holds tokens of another kind of cache, or is of a fixed kind (StaticCache).
    """
    while len(cache.layers) <= layer_idx:  # caches that grow their layers when first updated
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, DiJiangCacheLayer):
        return layer
    if type(layer).__name__ == DiJiangCacheLayer.__name__:
        raise ValueError("this cache was made by another DiJiang version: start from an empty cache")
    if not isinstance(layer, DynamicLayer):
        raise ValueError(
            f"a converted layer can't use {type(layer).__name__}: pass a DynamicCache or leave past_key_values out"
        )
    if layer.get_seq_length() > 0:
        raise ValueError(
            "past_key_values was filled by a softmax model: a converted layer keeps no keys, start from an empty cache"
        )
    cache.layers[layer_idx] = new = DiJiangCacheLayer(window)
    new.record_past = getattr(layer, "record_past", False)
    return new
