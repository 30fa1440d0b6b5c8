"""The child of a converted attention module: the kernel's parameters, and attention with them.

Prefill goes through `chunked`, a single token with a full window through `attend_one`; both read and update the cache.

Shape legend: B batch, H query heads, G key/value heads, N new tokens, D head_dim, V value head_dim.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .accelerated import triton_available, wants_kernels
from .cache import DiJiangCacheLayer, Kept, StaticDiJiangCacheLayer, Tokens, preceding
from .configuration_dijiang import Kernel, Layers
from .decoding import Absorption, absorptions, attend
from .feature_map import FeatureMap, Prepared
from .inference import prefill
from .linear_attention import (
    FASTEST,
    FarState,
    absorb,
    accumulated,
    accumulation_dtype,
    attend_one,
    attend_window,
    chunked,
    near_logits,
)
from .rotary import known_rotation, parameter_names

AHEAD = 16  # tokens that leave the window next whose features are made together
PIECE = 3 * 2**16  # numbers in a piece's queries, for each thread, see `_in_pieces`


class Call(NamedTuple):
    """What the attention module's caller knows and the attention function needs: `_hand_over` gathers it.

    segments: [B, N], the document of each token where rows are packed (then there is no cache, and no padding).
    scaling, softcap, sink: of the source's logits, see `chunked`. causal: False for encoders.
    prepared: what is made of parameters once for all pieces of a prompt, where nothing needs a gradient.
    """

    cache: DiJiangCacheLayer | None
    hidden_states: Tensor | None
    cos_sin: tuple[Tensor, Tensor] | None
    segments: Tensor | None = None
    scaling: float = 1.0
    softcap: float | None = None
    sink: Tensor | None = None
    causal: bool = True
    prepared: dict[str, Any] | None = None


class DiJiangAttention(nn.Module):
    """The child of a converted attention module: kernel parameters, and attention with them.

    The far state has kv_heads heads; with a fixed decay a query head (``decay: retnet``) it has as many as queries.
    """

    log_decay: Tensor

    def __init__(self, kernel: Kernel, layers: Layers, apply_rotary: Callable[..., Any] | None) -> None:
        super().__init__()
        self.kernel, self.layers = kernel, layers
        self.arguments: list[str] = []  # of the attention module's forward
        self.borrows = False  # keys and values of an earlier layer
        self.apply_rotary = apply_rotary if kernel.rotary == "remove" else None
        heads, kv_heads = layers.heads, layers.kv_heads
        if kernel.far:
            self.q_features = FeatureMap(heads, layers.head_dim, kernel, scaled=kernel.window > 0)
            self.k_features = FeatureMap(kv_heads, layers.head_dim, kernel)
            if kernel.learned_features:
                if kernel.window > 0:
                    self.q_offset = nn.Parameter(torch.empty(heads, dtype=torch.float32))  # c
                self.k_strength = nn.Parameter(torch.empty(kv_heads, dtype=torch.float32))  # b
            if kernel.decay == "learned":
                self.decay = nn.Parameter(torch.empty(kv_heads, dtype=torch.float32))  # log(−log γ)
            elif kernel.decay == "retnet":
                self.register_buffer("log_decay", torch.empty(heads, dtype=torch.float32))
            if kernel.selective:  # what a hidden state adds to g(k), and to log(−log γ)
                shape = (2 * kv_heads, layers.hidden_size)
                self.selection = nn.Parameter(torch.empty(shape, dtype=torch.float32))
            if kernel.decay_rank:  # the same for each feature's own decay, and what that is without
                features = self.k_features.features
                self.decay_down = nn.Parameter(torch.empty(kernel.decay_rank, layers.hidden_size, dtype=torch.float32))
                self.decay_up = nn.Parameter(torch.empty(kv_heads * features, kernel.decay_rank, dtype=torch.float32))
                self.feature_decay = nn.Parameter(torch.empty(kv_heads, features, dtype=torch.float32))
            if kernel.shift:  # share of the token before
                self.q_shift = nn.Parameter(torch.empty(heads, 1, layers.head_dim, dtype=torch.float32))
                self.k_shift = nn.Parameter(torch.empty(kv_heads, 1, layers.head_dim, dtype=torch.float32))
        if kernel.gate:
            width = heads * layers.value_dim
            self.gate = nn.Parameter(torch.empty(width, layers.hidden_size, dtype=torch.float32))  # W_G
            self.norm_weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
            self.norm_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Sets what no checkpoint has set. Only `transformers.initialization` knows which that is."""
        kernel = self.kernel
        if kernel.far:
            self.q_features.reset_parameters()
            self.k_features.reset_parameters()
            if kernel.learned_features:
                if kernel.window > 0:
                    init.zeros_(self.q_offset)
                init.zeros_(self.k_strength)
            if kernel.decay == "learned":
                init.constant_(self.decay, math.log(1 / 256))
            elif kernel.decay == "retnet":
                spread = torch.linspace(math.log(1 / 32), math.log(1 / 512), self.layers.heads, dtype=torch.float32)
                init.copy_(self.log_decay, torch.log1p(-spread.exp()))
            if kernel.selective:
                init.zeros_(self.selection)
            if kernel.decay_rank:
                init.normal_(self.decay_down, std=self.layers.hidden_size**-0.5)
                init.normal_(self.decay_up, std=0.1)
                init.constant_(self.feature_decay, math.log(1 / 256))
            if kernel.shift:
                init.zeros_(self.q_shift)
                init.zeros_(self.k_shift)
        if kernel.gate:
            init.normal_(self.gate, std=self.layers.hidden_size**-0.5)
            init.ones_(self.norm_weight)
            init.zeros_(self.norm_bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """q [B, H, N, D], k [B, G, N, D], v [B, G, N, V], mask [B, N] or None if no token is padding → [B, H, N, V]."""
        if not torch.is_autocast_enabled(q.device.type):
            return self._attend(q, k, v, mask, call)
        with torch.autocast(q.device.type, enabled=False):  # which would make the state's products half precision
            return self._attend(q, k, v, mask, call)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        if _gradless(q):
            call = call._replace(prepared={} if call.cache is None else call.cache.prepared)
        if triton_available(q) and q.shape[2] == 1 and isinstance(call.cache, StaticDiJiangCacheLayer):
            from .decode_kernels import decodes

            if decodes(self, q):
                return self._decode_in_kernels(q, k, v, mask, call)
        far_q, far_k = self._without_rotation(q, k, call.cos_sin)
        if self.kernel.far and self.kernel.shift:
            far_q, far_k = self._shifted(far_q, far_k, mask, call)
        valid = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask.bool()
        new = Tokens(k, v, far_k if self._keeps_far_keys else None, *self._gates(call), valid)
        cache = call.cache
        if cache is not None and self.borrows:  # the module, which has no keys of its own, did not
            cache.update(k, v)
        if cache is not None and q.shape[2] == 1 and cache.takes_one(mask):
            out = self._decode(cache, q, far_q, new, call)
        else:
            out = self._prefill(q, far_q, new, mask is not None, call)
        if self.kernel.gate:
            out = self._gated(out, call.hidden_states)
        return out.to(v.dtype)

    def _prefill(self, q: Tensor, far_q: Tensor, new: Tokens, padded: bool, call: Call) -> Tensor:
        """Any number of tokens, chunked. What the cache kept comes before them."""
        window, queries, cache = self.kernel.window, q.shape[2], call.cache
        past = DiJiangCacheLayer(window) if cache is None else cache.opened()
        if past.kept > window + past.pending:  # confirmed by `crop`, and behind the window: part of the state now
            old = past.split_oldest(past.kept - window - past.pending)
            if self.kernel.far:
                past.state = self._absorb(past.state, old, call)
        fast = _gradless(q) and self.kernel.far and self.kernel.normalize and call.causal and call.segments is None
        fast = fast and past.kept <= window and not past.record_past
        if fast and not padded:
            out, state = self._in_pieces(q, far_q, past.tokens() if past.kept else None, new, past.state, call)
            past.overtake(new)
        else:
            past.append(new)
            order = _padding_first(past.tokens().valid) if padded and call.causal else None
            if order is not None:  # the window counts real tokens: padding moves out of their way, and back below
                past.reorder_tokens(order)
                shift = order.shape[1] - queries
                rows = (order[:, shift:] - shift).clamp(min=0)[:, None, :, None]
                q, far_q = q.gather(2, rows.expand_as(q)), far_q.gather(2, rows.expand_as(far_q))
            if fast:
                out, state = self._in_pieces(q, far_q, None, past.tokens(), past.state, call)
            else:
                out, state = self._chunked(past.tokens(), q, far_q, past.state, call)
            if order is not None:
                rows = (order.argsort(1)[:, shift:] - shift).clamp(min=0)[:, None, :, None]
                out = out.gather(2, rows.expand_as(out))

        if past.record_past:
            past.pending += queries
        elif cache is not None:
            past.state = state
            past.split_oldest(past.kept - window)
            cache.settle(past, new.valid)
        past.trim_trail()
        return out

    def _in_pieces(
        self, q: Tensor, far_q: Tensor, kept: Tokens | None, new: Tokens, state: FarState | None, call: Call
    ) -> tuple[Tensor, FarState | None]:
        """`_chunked`, so many tokens at a time that their features and weights stay in the processor's cache.

        kept: at most a window of tokens before ``new``. Where they are None, ``new`` has them, too.
        """
        length, window, count = q.shape[2], self.kernel.window, 0 if kept is None else kept.length
        before = count + new.length - length
        out = q.new_empty(q.shape[0], length, q.shape[1], new.v.shape[3], dtype=accumulation_dtype(q)).transpose(1, 2)
        for start, end in self._pieces(q):
            first, last, piece = max(start + before - window, 0), end + before, slice(start, end)
            if kept is None or first >= count:
                tokens = new.narrow(first - count, last - count)
            else:
                tokens = kept.narrow(first, count).followed_by(new.narrow(0, last - count))
            given, now = (tokens, q[:, :, piece], far_q[:, :, piece], state, call), out[:, :, piece]
            done = self._prefill_piece(*given, now)
            if done is None:
                made, state = self._chunked(*given)
                now.copy_(made)
            else:
                state = done[1]
        return out, state

    def _pieces(self, q: Tensor) -> Iterator[tuple[int, int]]:
        """Where a prompt is divided: into pieces of whole chunks, about equally long, and what remains."""
        length, size = q.shape[2], self.kernel.chunk_size
        numbers = q.shape[0] * q.shape[1] * size * q.shape[3]  # of a chunk
        chunks, most = length // size, max(PIECE * torch.get_num_threads() // numbers, 1)
        step = max(-(-chunks // max(-(-chunks // most), 1)), 1) * size
        return itertools.pairwise(sorted({*range(0, chunks * size, step), chunks * size, length}))

    def _chunked(
        self, tokens: Tokens, q: Tensor, far_q: Tensor, state: FarState | None, call: Call
    ) -> tuple[Tensor, FarState | None]:
        """The output for the last of the tokens, whose queries these are, and the state after all but a window."""
        features: tuple[Tensor | None, ...] = (None,) * 4
        if self.kernel.far:
            features = (*self._query_features(far_q, call), *self._key_features(tokens, call))
        return chunked(
            q, self._per_state_head(tokens.k), self._per_state_head(tokens.v), *features,
            scaling=call.scaling, window=self.kernel.window, softcap=call.softcap, sink=call.sink,
            log_decay=self._log_decay(tokens.gates), feature_decay=self._feature_decay(tokens.code, call),
            mask=tokens.valid, state=state, segments=call.segments, causal=call.causal,
            normalize=self.kernel.normalize, chunk_size=self.kernel.chunk_size,
        )  # fmt: skip

    def _prefill_piece(
        self, tokens: Tokens, q: Tensor, far_q: Tensor, state: FarState | None, call: Call, out: Tensor
    ) -> tuple[Tensor, FarState] | None:
        """`prefill`, or None where it gives up."""
        window, queries = self.kernel.window, q.shape[2]
        missing = window + queries - tokens.length
        if missing:  # before the first
            tokens = tokens.map(
                lambda x, dim: torch.cat([x.new_zeros(*x.shape[:dim], missing, *x.shape[dim + 1 :]), x], dim)
            )
        absorbed, known = tokens.narrow(0, queries), self._prepared_queries(far_q, call)
        return prefill(
            q, self._per_state_head(tokens.k), self._per_state_head(tokens.v),
            far_q, known.weight, self.q_features.log_scale(far_q, known),
            *self._quick_key_features(absorbed, call),
            scaling=call.scaling, window=window, softcap=call.softcap, sink=call.sink,
            log_decay=self._log_decay(absorbed.gates), feature_decay=self._feature_decay(absorbed.code, call),
            mask=None if tokens.valid.all() else tokens.valid, state=state, chunk_size=self.kernel.chunk_size, out=out,
        )  # fmt: skip

    def _decode_in_kernels(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """One token with a static cache, where Triton's kernels run."""
        from .decode_kernels import decode

        assert isinstance(call.cache, StaticDiJiangCacheLayer)
        far, turn = None, None
        if self.borrows:
            call.cache.update(k, v)
        if self._keeps_far_keys and not torch.compiler.is_compiling() and not self.kernel.shift and call.cos_sin:
            turn = known_rotation(self.apply_rotary, *call.cos_sin, self.layers.rotary_dim)
        if self._keeps_far_keys and turn is None:
            far = self._without_rotation(q, k, call.cos_sin)
            if self.kernel.shift:
                far = self._shifted(*far, mask, call)
        out = decode(self, call.cache, q, k, v, far, turn, mask, call)
        if self.kernel.gate:
            out = self._gated(out, call.hidden_states)
        return out.to(v.dtype)

    def _decode(self, cache: DiJiangCacheLayer, q: Tensor, far_q: Tensor, new: Tokens, call: Call) -> Tensor:
        """One token, in place: the oldest one leaves the window for the state, the new one takes its slot."""
        step: Absorption | None = None
        if isinstance(cache, StaticDiJiangCacheLayer):
            old = cache.replace_oldest(new)
            if self.kernel.far:
                cache.set_state(self._absorb(cache.state, old, call))
            padding: Tensor | None = cache.tokens(ordered=False).valid
        else:
            cache.make_writable()
            if call.prepared is None:
                call = call._replace(prepared={} if torch.compiler.is_compiling() else cache.prepared)
            if self.kernel.far:
                if not cache.ahead:
                    cache.ahead = self._look_ahead(cache, cache.oldest_tokens(new, AHEAD), call)
                step = cache.absorb_next()
            cache.replace_oldest(new)
            padding = cache.padding()
        cache.trim_trail()
        keys, values, *_ = cache.tokens(ordered=False)
        exact: dict[str, Any] = {"scaling": call.scaling, "softcap": call.softcap, "sink": call.sink}
        if not self.kernel.far:
            return attend_window(q, keys, values, valid=padding, **exact)[0]
        keys, values = self._per_state_head(keys), self._per_state_head(values)
        if step is not None and step.scale is not None and _gradless(q):
            near = near_logits(q, keys, call.scaling, call.softcap, padding)
            far = self.q_features.logits(far_q, self._prepared_queries(far_q, call), step.scale)
            out = attend(near, values, far, cache.lagging_state.s, call.sink)
            if out is not None:
                return out
        features = self._query_features(far_q, call)
        return attend_one(
            q, keys, values, *features, cache.state, valid=padding, normalize=self.kernel.normalize, **exact
        )

    def _look_ahead(self, cache: DiJiangCacheLayer, old: Tokens, call: Call) -> list[Absorption]:
        """What the next tokens to leave the window do to the state, made for all of them at once."""
        fk, gk = self._quick_key_features(old, call) if self.kernel.normalize else self._key_features(old, call)
        padding = None if cache.padding() is None else old.valid
        decays = (self._log_decay(old.gates), self._feature_decay(old.code, call))
        bias = self._prepared_queries(old.far_keys, call).bias if self.kernel.normalize else None
        lazy = self.kernel.normalize and _gradless(old.k)
        state = cache.lagging_state if lazy else cache.state
        return absorptions(
            state.m, cache.lag, fk, gk, self._per_state_head(old.v), *decays, padding,
            repeats=self.layers.heads // gk.shape[1], bias=bias, lazy=lazy,
        )  # fmt: skip

    def _absorb(self, state: FarState | None, old: Tokens, call: Call) -> FarState:
        fk, gk = self._key_features(old, call)
        v = self._per_state_head(old.v)
        if state is None:
            state = FarState.empty(v.shape[0], v.shape[1], fk.shape[-1], v.shape[-1], v)
        return absorb(state, fk, gk, v, self._log_decay(old.gates), self._feature_decay(old.code, call), old.valid)

    # ------------------------------------------------------------------------------------------------------ features

    @property
    def kept(self) -> Kept:
        """What a cache keeps for this layer."""
        kernel, layers = self.kernel, self.layers
        return Kept(
            window=kernel.window,
            kv_heads=layers.kv_heads,
            head_dim=layers.head_dim,
            value_dim=layers.value_dim,
            state_heads=layers.heads if kernel.decay == "retnet" else layers.kv_heads,
            features=self.k_features.features if kernel.far else 0,
            far_keys=self._keeps_far_keys,
            gates=kernel.far and kernel.selective,
            code=kernel.decay_rank if kernel.far else 0,
            trail=layers.heads + layers.kv_heads if kernel.far and kernel.shift else 0,
        )

    @property
    def _keeps_far_keys(self) -> bool:
        return self.kernel.far and (self.kernel.shift or self.apply_rotary is not None)

    def _query_features(self, q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        features, scale = self.q_features(q, call.scaling)
        return features, scale + self.q_offset[:, None] if self.q_features.scaled else scale

    def _key_features(self, tokens: Tokens, call: Call) -> tuple[Tensor, Tensor]:
        features, scale = self.k_features(tokens.far_keys, call.scaling)
        if self.kernel.learned_features:
            scale = scale * self.k_strength[:, None]
        return self._of_state(features, scale, tokens)

    def _quick_key_features(self, tokens: Tokens, call: Call) -> tuple[Tensor, Tensor]:
        """The same as `_key_features` does together, in fewer passes and without gradients."""
        x, known = tokens.far_keys, call.prepared
        assert known is not None
        if "k" not in known:
            known["k"] = self.k_features.prepared(x, call.scaling)
        strength = self.k_strength[:, None] if self.kernel.learned_features else 1.0
        return self._of_state(*self.k_features.unnormalized(x, known["k"], strength), tokens)

    def _of_state(self, features: Tensor, scale: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        if tokens.gates is not None:
            scale = scale + tokens.gates[..., 0]
        return self._per_state_head(features), self._per_state_head(scale)

    def _prepared_queries(self, q: Tensor, call: Call) -> Prepared:
        assert call.prepared is not None
        if "q" not in call.prepared:
            offset = self.q_offset if self.q_features.scaled else None
            call.prepared["q"] = self.q_features.prepared(q, call.scaling, offset)
        return call.prepared["q"]

    def _per_state_head(self, x: Tensor) -> Tensor:
        """Repeats key/value heads where every query head has a state of its own (a fixed decay a query head)."""
        repeats = self.layers.heads // self.layers.kv_heads if self.kernel.decay == "retnet" else 1
        return x if repeats == 1 else x.repeat_interleave(repeats, 1)

    def _gates(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """What each token's hidden state adds to its key's log-scale and to log(−log γ), [B, G, N, 2], and the code of
        what it does to the decays of features, [B, 1, N, R]."""
        if not (self.kernel.far and (self.kernel.selective or self.kernel.decay_rank)):
            return None, None
        if call.hidden_states is None:
            raise ValueError(
                "the attention module got no hidden_states: convert with kernel.selective false, kernel.decay_rank 0"
            )
        x, known = accumulated(call.hidden_states), {} if call.prepared is None else call.prepared
        if "gates" not in known:
            parts: list[Tensor] = [self.selection] if self.kernel.selective else []
            parts += [self.decay_down] if self.kernel.decay_rank else []
            known["gates"] = torch.cat(parts).to(x.dtype), x.new_full((), 1e-6)
        weight, epsilon = known["gates"]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        made = F.linear(x, weight) * torch.addcmul(epsilon, norm, norm, value=1 / x.shape[-1]).rsqrt()
        gates, code = made.split([made.shape[-1] - self.kernel.decay_rank, self.kernel.decay_rank], -1)
        return (
            gates.unflatten(-1, (-1, 2)).transpose(1, 2) if self.kernel.selective else None,
            code[:, None] if self.kernel.decay_rank else None,
        )

    def _log_decay(self, gates: Tensor | None) -> Tensor | None:
        """log γ, [G] or of each key [B, G, K]."""
        if not self.kernel.far or self.kernel.decay == "none":
            return None
        if self.kernel.decay == "retnet":
            return accumulated(self.log_decay)
        decay = accumulated(self.decay)
        # At most 4: a single token can wipe out what came before it.
        return -decay.exp() if gates is None else _bounded_decay(gates[..., 1] + (decay[:, None] - math.log(4.0)), 4.0)

    def _feature_decay(self, code: Tensor | None, call: Call) -> Tensor | None:
        """log γ of each key and feature, [B, G, K, F]."""
        if code is None:
            return None
        known = {} if call.prepared is None else call.prepared
        if "decay" not in known:
            up = self.decay_up.to(code.dtype).unflatten(0, self.feature_decay.shape).mT  # [G, R, F]
            known["decay"] = up, accumulated(self.feature_decay)[:, None] - math.log(FASTEST)
        up, start = known["decay"]
        if torch.is_grad_enabled() or code.shape[0] > 1:
            return _bounded_decay((code @ up).add_(start), FASTEST)
        return _bounded_decay(torch.baddbmm(start, code[0].expand(up.shape[0], -1, -1), up)[None], FASTEST)

    def _shifted(self, q: Tensor, k: Tensor, mask: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """Adds a share of the token before to queries and keys; the first of a document has none before it."""
        both, valid = torch.cat([q, k], 1), None if mask is None else mask.bool()
        if call.cache is None:
            before, _ = preceding(both, torch.zeros_like(both[:, :, :1]), valid)
        else:
            before = call.cache.follow(both, valid)
        if call.segments is not None:
            starts = F.pad(call.segments[:, 1:] != call.segments[:, :-1], (1, 0), value=True)
            before = before.masked_fill(starts[:, None, :, None], 0)
        q_before, k_before = before.split([q.shape[1], k.shape[1]], 1)
        return q + (self.q_shift * q_before).to(q.dtype), k + (self.k_shift * k_before).to(k.dtype)

    def _without_rotation(self, q: Tensor, k: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Undoes rotary embedding by rotating back: the model's own function with −sin, over the squared length that
        scaled variants (YaRN) give cos and sin."""
        if not self._keeps_far_keys or self.apply_rotary is None or cos_sin is None:
            return q, k
        dim = self.layers.rotary_dim  # less than head_dim with partial rotary embedding
        turn = known_rotation(self.apply_rotary, *cos_sin, dim) if _gradless(q) else None
        if turn is not None:
            if q.shape[2] > 1:
                return turn.back(q, *cos_sin), turn.back(k, *cos_sin)
            both = turn.back(torch.cat([q, k], 1), *cos_sin)
            return both[:, : q.shape[1]], both[:, q.shape[1] :]
        cos, sin = (accumulated(x) for x in cos_sin)
        length = cos[..., :1].square() + sin[..., :1].square()
        back = (cos / length, -sin / length)
        if "k" in parameter_names(self.apply_rotary):
            turned_q, turned_k = self.apply_rotary(q[..., :dim], k[..., :dim], *back)
        else:  # a function of one of them
            turned_q, turned_k = (self.apply_rotary(x[..., :dim], *back) for x in (q, k))
        return (
            torch.cat([turned_q.to(q.dtype), q[..., dim:]], -1),
            torch.cat([turned_k.to(k.dtype), k[..., dim:]], -1),
        )

    def _gated(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """Group norm a head and the output gate SiLU(x W_G) of the published formulation."""
        assert hidden_states is not None
        out = F.layer_norm(out, out.shape[-1:])
        shape = (self.layers.heads, 1, self.layers.value_dim)
        out = out * self.norm_weight.view(shape) + self.norm_bias.view(shape)
        x = accumulated(hidden_states)
        gate = F.silu(x @ self.gate.to(x.dtype).mT)
        return out * gate.unflatten(-1, (self.layers.heads, -1)).transpose(1, 2)


def _gradless(q: Tensor) -> bool:
    """Whether this runs now, on a CPU, and nothing asks for a gradient: then values may be looked at."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or wants_kernels(q):
        return False
    return q.device.type == "cpu"


def _bounded_decay(x: Tensor, bound: float) -> Tensor:
    """−bound · σ(x), which is −e^{x + log bound} where that is small: its sums over a chunk stay exact in float32.
    Without gradients x is overwritten."""
    return x.sigmoid() * -bound if torch.is_grad_enabled() else x.sigmoid_().mul_(-bound)


def _padding_first(valid: Tensor) -> Tensor | None:
    """The order [B, K] that puts padding before the real tokens of each row, or None if it is seen to be there."""
    if not torch.compiler.is_compiling() and not (valid[:, :-1] & ~valid[:, 1:]).any():
        return None
    return valid.to(torch.int8).argsort(dim=1, stable=True)
