"""The cache of a converted layer: a state of fixed size and the window's keys, whatever the length.

Shape legend: B batch, G key/value heads, L kept tokens (at most the window, and more only while recording the past),
D head_dim, V value head_dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .linear_attention import FarState


class Tokens(NamedTuple):
    """What is kept of each token, oldest first unless a ring says otherwise.

    k, v: [B, G, L, D], [B, G, L, V]. far_k: [B, G, L, D] where the far part sees other keys than the window does
    (rotary embedding removed, shifted), else None. gates: [B, G, L, 2], what the token's hidden state does to its
    log-scale and to the state's decay, or None. code: [B, 1, L, R], what it does to the decay of features, or None.
    valid: [B, L], False for padding.
    """

    k: Tensor
    v: Tensor
    far_k: Tensor | None
    gates: Tensor | None
    code: Tensor | None
    valid: Tensor

    @property
    def far_keys(self) -> Tensor:
        return self.k if self.far_k is None else self.far_k

    def map(self, change: Callable[[Tensor, int], Tensor]) -> "Tokens":
        """``change(tensor, token dimension)`` of everything."""
        dims = (2, 2, 2, 2, 2, 1)
        return Tokens(*(x if x is None else change(x, dim) for x, dim in zip(self, dims, strict=True)))  # type: ignore[arg-type]

    def followed_by(self, other: "Tokens") -> "Tokens":
        others = iter(x for x in other if x is not None)
        return self.map(lambda x, dim: torch.cat([x, next(others)], dim))


class DiJiangCacheLayer(CacheLayerMixin):
    """Holds the far state, what `Tokens` says of the last ``window`` tokens, and the token that the next is shifted by.

    `update` only counts: what the new tokens do to the state is the attention function's work, since the features are
    made there. Once the window is full, a single token replaces the oldest one in place (a ring, see `oldest`).
    """

    is_sliding = False

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: FarState | None = None
        self.recent: Tokens | None = None
        self.trail: Tensor | None = None  # see `follow`
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
        return 0 if self.recent is None else self.recent.valid.shape[1]

    @property
    def is_full(self) -> bool:
        """From here on a token costs the same, however many there were: see `replace_oldest`."""
        return self.recent is not None and self.kept == self.window and not self.record_past

    def tokens(self, ordered: bool = True) -> Tokens:
        """The kept tokens, oldest first unless ``ordered`` is False."""
        if ordered:
            self._unroll()
        assert self.recent is not None
        return self.recent

    def append(self, new: Tokens) -> None:
        """Puts new tokens behind the kept ones."""
        self.recent = new if self.recent is None else self.tokens().followed_by(new)

    def split_oldest(self, count: int) -> Tokens:
        """Takes the ``count`` oldest tokens out of the kept ones and returns them."""
        count = max(count, 0)
        old = self.tokens().map(lambda x, dim: x.narrow(dim, 0, count))
        # A copy, so that the memory of a long prompt is freed and the ring owns what it writes to.
        self._map(lambda x, dim: x.narrow(dim, count, x.shape[dim] - count).clone())
        return old

    def follow(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """What came before each of the new tokens, as `preceding` has it. The last one is kept for the next call, and
        others behind it that `crop` might make the last."""
        first = torch.zeros_like(tokens[:, :, :1]) if self.trail is None else self.trail[:, :, -1:]
        before, last = preceding(tokens, first, valid)
        new = torch.cat([before[:, :, 1:], last], 2)
        self.trail = torch.cat([first if self.trail is None else self.trail, new], 2)
        return before

    def trim_trail(self) -> None:
        """Keeps of the trail what `crop` can still come back to."""
        kept = 1 + (self.kept if self.seen == self.kept else self.pending)
        if self.trail is not None and self.trail.shape[2] > kept:
            self.trail = self.trail[:, :, -kept:].clone()

    def replace_oldest(self, new: Tokens) -> Tokens:
        """Puts one token in the place of the oldest, and returns that one. Without a window the new token is itself the
        oldest."""
        if self.window == 0:
            return new
        t, kept = self.oldest, self.tokens(ordered=False)
        old = kept.map(lambda x, dim: x.narrow(dim, t, 1).clone())
        parts = iter(x for x in new if x is not None)
        kept.map(lambda x, dim: x.narrow(dim, t, 1).copy_(next(parts)))
        self.oldest = (t + 1) % self.window
        return old

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
        assert self.recent is not None
        self.recent = self.recent.map(change)

    # ------------------------------------------------------------------------------- what generation strategies use

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.recent is not None:
            self._map(lambda x, dim: change(x))
        if self.state is not None:
            self.state = FarState(change(self.state.s), change(self.state.m))
        if self.trail is not None:
            self.trail = change(self.trail)

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
            if self.trail is not None:
                self.trail = self.trail[:, :, : self.trail.shape[2] - count]
            self.seen -= count
        self.pending = 0

    def offload(self) -> None:
        raise NotImplementedError("a DiJiang cache is small and stays: drop cache_implementation='offloaded'")


def preceding(tokens: Tensor, first: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """At each place of tokens [B, A, N, D] the real token before it, and the last one of all [B, A, 1, D].

    first: what came before them. valid: [B, N], False for padding, or None.
    """
    every = torch.cat([first, tokens], 2)
    if valid is not None:
        places = torch.arange(1, every.shape[2], device=valid.device)
        last = F.pad(torch.where(valid, places, 0).cummax(1).values, (1, 0))  # index of the last real token so far
        every = every.gather(2, last[:, None, :, None].expand_as(every))
    return every[:, :, :-1], every[:, :, -1:]


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
        raise ValueError(f"a converted layer can't use {type(layer).__name__}: pass a DynamicCache or none")
    if layer.get_seq_length() > 0:
        raise ValueError(
            "the cache was filled by a softmax model: a converted layer keeps no keys, start from an empty cache"
        )
    cache.layers[layer_idx] = new = DiJiangCacheLayer(window)
    new.record_past = getattr(layer, "record_past", False)
    return new
