"""The cache of a converted layer: a state of fixed size and the window's keys, whatever the length.

`DiJiangCacheLayer` takes the place of a layer of `DynamicCache`, `StaticDiJiangCacheLayer` of one of `StaticCache`.

Shape legend: B batch, G key/value heads, A query and key/value heads, L kept tokens (at most the window, and more only
while recording the past), D head_dim, V value head_dim, F features, R rank of the code.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticCache, StaticLayer

from .linear_attention import FLOOR, FarState


class Kept(NamedTuple):
    """What a kernel has a cache keep: so many tokens, and of what sizes their parts and the state are. 0 is none.

    kv_heads, head_dim and value_dim are those that attention sees (a module may hand its cache something smaller that
    it makes keys and values from); state_heads and features are of the state; gates and code tell whether `Tokens` has
    them, and how long a code is; trail is A, of how many heads the last token is kept.
    """

    window: int
    kv_heads: int
    head_dim: int
    value_dim: int
    state_heads: int
    features: int
    far_keys: bool
    gates: bool
    code: int
    trail: int


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

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    def narrow(self, start: int, end: int) -> "Tokens":
        return self.map(lambda x, dim: x.narrow(dim, start, end - start))

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
    lag: Tensor | None = None  # the state's s is to be multiplied by e^lag, [B, G, F or 1], see `absorb_next`

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state = None
        self.recent: Tokens | None = None
        self.trail: Tensor | None = None  # see `follow`
        self.oldest = 0  # index of the oldest token in the ring
        self.seen = 0
        self.pending = 0  # tokens that `crop` can still take back
        self.is_padded: bool | None = None  # see `padding`
        self.ahead: list[Any] = []  # what the oldest tokens will do to the state, next one first: see `absorptions`
        self.prepared: dict[str, Any] = {}  # what decoding makes of the layer's parameters, see `Prepared`
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states.new_empty(0)  # where models look for them there are none
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
    def state(self) -> Any:
        """A `FarState`, or None before there is one."""
        if self.lag is not None:
            self.state = FarState(self._state.s * self.lag.exp()[..., None], self._state.m)
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self.lag, self.ahead = state, None, []

    @property
    def lagging_state(self) -> FarState:
        """The state as it is kept, which lacks the decay e^lag."""
        assert self._state is not None
        return self._state

    def set_state(self, state: FarState | None) -> None:
        self.state = state

    def absorb_next(self) -> Any:
        """Lets the next key into the state, in place: the first `Absorption` of ``ahead``, which it returns."""
        step = self.ahead.pop(0)
        step.apply(self._state.s)
        self._state, self.lag = FarState(self._state.s, step.m), step.lag
        return step

    def opened(self) -> "DiJiangCacheLayer":
        """A layer that any number of tokens can be appended to."""
        return self

    def settle(self, opened: "DiJiangCacheLayer", valid: Tensor) -> None:
        """Takes over what became of the layer that `opened` returned. valid: [B, N], of the tokens since."""

    @property
    def kept(self) -> int:
        """L, how many tokens are kept one by one."""
        return 0 if self.recent is None else self.recent.length

    def takes_one(self, mask: Tensor | None) -> bool:
        """Whether `replace_oldest` can take a single token. mask: [B, 1] if it is padding in some rows."""
        full = self.recent is not None and self.kept == self.window and not self.record_past
        return full and mask is None and not torch.is_grad_enabled()

    def tokens(self, ordered: bool = True) -> Tokens:
        """The kept tokens, oldest first unless ``ordered`` is False."""
        if ordered:
            self._unroll()
        assert self.recent is not None
        return self.recent

    def append(self, new: Tokens) -> None:
        """Puts new tokens behind the kept ones."""
        self.is_padded, self.ahead = None, []
        self.recent = new if self.recent is None else self.tokens().followed_by(new)

    def overtake(self, new: Tokens) -> None:
        """`append`, but where the kept tokens leave the window they are gone: they are part of the state already."""
        if new.length >= self.window:
            self.recent, self.oldest = None, 0
        self.append(new)

    def split_oldest(self, count: int) -> Tokens:
        """Takes the ``count`` oldest tokens out of the kept ones and returns them."""
        count = max(count, 0)
        old = self.tokens().narrow(0, count)
        # A copy, so that the memory of a long prompt is freed and the ring owns what it writes to.
        self._map(lambda x, dim: x.narrow(dim, count, x.shape[dim] - count).clone())
        return old

    def follow(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """What came before each of the new tokens, as `preceding` has it. The last one is kept for the next call, and
        others behind it that `crop` might make the last."""
        if tokens.shape[2] == 1 and self.trail is not None and self.takes_one(valid):
            before, self.trail = self.trail[:, :, -1:], tokens
            return before
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

    def oldest_tokens(self, new: Tokens, most: int) -> Tokens:
        """A view of those that `replace_oldest` overwrites next. Without a window the new one is itself the oldest."""
        count = min(most, self.window - self.oldest)
        return self.tokens(ordered=False).narrow(self.oldest, self.oldest + count) if self.window else new

    def replace_oldest(self, new: Tokens) -> Any:
        """Puts one real token in the place of the oldest."""
        if self.window > 0:
            for kept, part in zip(self.tokens(ordered=False)[:-1], new[:-1], strict=True):
                if kept is not None and part is not None:
                    kept.narrow(2, self.oldest, 1).copy_(part)
            if self.is_padded is not False:
                self.tokens(ordered=False).valid[:, self.oldest] = True
            self.oldest = (self.oldest + 1) % self.window
            if self.oldest == 0:
                self.is_padded = None

    def padding(self) -> Tensor | None:
        """Which kept tokens are real, [B, L], or None where all are. (Values are looked at once a prompt.)"""
        valid = self.tokens(ordered=False).valid
        if self.is_padded is None:
            self.is_padded = not bool(valid.all())
        return valid if self.is_padded else None

    def make_writable(self) -> None:
        """Copies what was made under torch.inference_mode() where that has ended: nothing else may write to it."""
        tensors = (self.recent.valid if self.recent is not None else None, *(self._state or ()))
        if not torch.is_inference_mode_enabled() and any(x is not None and x.is_inference() for x in tensors):
            self._map_batch(torch.clone)

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
        self.recent, self.ahead = self.recent.map(change), []

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
        if not self.is_initialized:  # a layer that was left out: early exit
            return
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
        """Nothing: what is kept is small and stays where it is. (Softmax layers of the same cache are offloaded.)"""

    def prefetch(self) -> None:
        """Nothing, as `offload`."""


class StaticDiJiangCacheLayer(DiJiangCacheLayer):
    """The same in tensors whose shape and place never change, and which every call writes to: for compiled decoding.

    Nothing is a Python number that changes from token to token. Each row of the batch has a ring of its own: its real
    token number n is at place n % window, and padding takes no place. Tokens can't be taken back.
    """

    is_compileable = True
    is_croppable = False  # type: ignore[assignment]

    def __init__(self, kept: Kept, max_cache_len: int) -> None:
        CacheLayerMixin.__init__(self)
        self.sizes, self.window = kept, kept.window
        self.max_cache_len = max_cache_len  # of softmax layers in the same cache, whose masks are sized by any layer
        self.record_past, self.pending, self.oldest = False, 0, 0
        self.prepared: dict[str, Any] = {}
        self.state, self.recent, self.trail = None, None, None
        self.seen = torch.tensor(0)  # type: ignore[assignment]
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes everything, empty, for as many rows as new keys have, on their device and of their dtype."""
        super().lazy_initialization(key_states, value_states)
        self.batch_size, sizes = key_states.shape[0], self.sizes
        heads, dim, values = sizes.kv_heads, sizes.head_dim, sizes.value_dim

        def empty(heads: int, dim: int, like: Tensor, tokens: int = self.window) -> Tensor:
            return like.new_zeros(self.batch_size, heads, tokens, dim)

        single = torch.zeros((), dtype=torch.float32, device=self.device)
        self.recent = Tokens(
            empty(heads, dim, key_states),
            empty(heads, values, value_states),
            empty(heads, dim, key_states) if sizes.far_keys else None,
            empty(heads, 2, single) if sizes.gates else None,
            empty(1, sizes.code, single) if sizes.code else None,
            torch.zeros(self.batch_size, self.window, dtype=torch.bool, device=self.device),
        )
        if sizes.features:
            self.state = FarState.empty(
                self.batch_size, sizes.state_heads, sizes.features, values, value_states
            )  # fmt: skip
        if sizes.trail:
            self.trail = empty(sizes.trail, dim, key_states, 1)
        self.count = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)  # real tokens of each row
        self.seen = self.seen.to(self.device)  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():  # so that CUDA graphs may write to them
            for x in self._tensors():
                torch._dynamo.mark_static_address(x)

    def _tensors(self) -> list[Tensor]:
        kept = (*(self.recent or ()), *(self.state or ()), self.trail, self.count, self.seen)
        return [x for x in kept if isinstance(x, Tensor)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Counts the new tokens. Raises ValueError for another batch, and where a gradient is wanted of the past."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(f"this static cache holds {self.batch_size} rows, not {key_states.shape[0]}: make another")
        if isinstance(key_states, FakeTensor) and not isinstance(self.count, FakeTensor):  # constant in the program
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
        if self.is_initialized:
            for x in self._tensors():
                x.zero_()
            if self.state is not None:
                self.state.m.fill_(FLOOR)

    def set_state(self, state: FarState | None) -> None:
        if self.state is not None and state is not None:
            self.state.s.copy_(state.s)
            self.state.m.copy_(state.m)

    def opened(self) -> DiJiangCacheLayer:
        layer = DiJiangCacheLayer(self.window)
        layer.state, layer.recent = self.state, self._turned(self.count)
        return layer

    def settle(self, opened: DiJiangCacheLayer, valid: Tensor) -> None:
        self.set_state(opened.state)
        self.count.add_(valid.sum(1))
        kept = iter(x for x in self._turned(-self.count, opened.recent) if x is not None)
        self.tokens(ordered=False).map(lambda x, dim: x.copy_(next(kept)))

    def _turned(self, by: Tensor, kept: Tokens | None = None) -> Tokens:
        """Each row's kept tokens moved to the left by so many places [B], around the end."""
        kept = self.tokens(ordered=False) if kept is None else kept
        if self.window == 0:
            return kept
        places = (torch.arange(self.window, device=by.device) + by[:, None]) % self.window  # [B, L]
        return kept.map(lambda x, dim: x.gather(dim, _along(places, x, dim)))

    def follow(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        assert self.trail is not None
        before, last = preceding(tokens, self.trail, valid)
        before = before.clone()  # not a view of what is written next
        self.trail.copy_(last)
        return before

    def trim_trail(self) -> None:
        """Nothing: one token is all there is."""

    def takes_one(self, mask: Tensor | None) -> bool:
        return True

    def replace_oldest(self, new: Tokens) -> Tokens:
        """Puts each row's new token in the place of its oldest, which it returns; but padding takes no place."""
        if self.window == 0:
            return new
        place, kept = (self.count % self.window)[:, None], self.tokens(ordered=False)
        old = kept.map(lambda x, dim: x.gather(dim, _along(place, x, dim)))
        parts = zip((x for x in old if x is not None), (x for x in new if x is not None), strict=True)

        def put(x: Tensor, dim: int) -> Tensor:
            before, after = next(parts)
            real = new.valid if dim == 1 else new.valid[:, None, :, None]
            return x.scatter_(dim, _along(place, x, dim), torch.where(real, after, before))

        kept.map(put)
        self.count.add_(new.valid[:, 0])
        return old._replace(valid=old.valid & new.valid)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map_batch(change)
        if self.is_initialized:
            self.count = change(self.count)
            self.batch_size = self.count.shape[0]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            rows = beam_idx.to(self.device)
            for x in self._tensors()[:-1]:  # all but `seen`
                x.copy_(x.index_select(0, rows))

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "a static DiJiang cache can't take tokens back: assisted decoding needs a dynamic one"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("a static DiJiang cache can't take tokens back: use a dynamic one")


class DecodingCache(StaticCache):
    """What generate() decodes with by default where CUDA graphs do: `StaticDiJiangCacheLayer` in every layer."""


def _along(places: Tensor, x: Tensor, dim: int) -> Tensor:
    """Indices [B, L] into dimension ``dim`` of x, in the shape that gather and scatter want."""
    return places if dim == 1 else places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


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


def cache_layer(cache: Cache, layer_idx: int, kept: Kept) -> DiJiangCacheLayer:
    """The DiJiang layer at ``layer_idx``, put in place of the plain and still empty one that generate() made.

    Raises ValueError where the layer holds tokens of another kind of cache, or is of an unknown kind.
    """
    while len(cache.layers) <= layer_idx:  # caches that grow their layers when first updated
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if isinstance(layer, DiJiangCacheLayer):
        return layer
    if type(layer).__name__ in (DiJiangCacheLayer.__name__, StaticDiJiangCacheLayer.__name__):
        raise ValueError("this cache was made by another DiJiang version: start from an empty cache")
    has_place = type(layer).__name__ != "DummyLayer"  # which stands for a layer that takes keys and values of another
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
        new = StaticDiJiangCacheLayer(kept, cache.get_max_length())
    else:
        new = DiJiangCacheLayer(kept.window)
        new.record_past = any(getattr(each, "record_past", False) for each in others)
    cache.layers[layer_idx] = new
    return new
