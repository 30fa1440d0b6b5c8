"""The child of a converted attention module. It makes features and decays, and picks the code that computes attention.

A recipe with a window uses `kernel` and `step`, one without a window `linear`. A single token whose cache can be
written in place has a form of its own; all other calls share one. The source's module makes q, k and v.

Shape legend: B batch, H query heads, G key/value heads, N new tokens, T slots (see `Layout`), C tokens of a block, D
head_dim, V value head_dim, F features, X numbers of a token's gates (see `TokenGates`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .cache import DiJiangCacheLayer, preceding
from .configuration_dijiang import Kernel, Layers
from .decay import StateDecay, TokenGates
from .feature_map import KeyFeatures, QueryFeatures
from .kernel import attend_blocks, attend_both_sides
from .layout import Layout
from .linear import attend_chunks, attend_chunks_both_sides, attend_one
from .past import Group, Past, Sizes, Tokens
from .rotary import without_rotation
from .state import NEVER, Written, accumulated
from .step import advance, attend_token
from .table import Keys, KeyTokens, Logits, Queries, Table, in_pieces


class Call(NamedTuple):
    """What attention needs beside q, k, v and the padding mask, from `_hand_over` and `dijiang_attention`.

    cache: this layer's, or None. hidden_states: [B, N, hidden], the attention module's input. cos_sin: what the model's
    rotary function takes, or None. documents: [B, N], the document of each token in packed rows, without cache and
    padding. logits: how the source makes logits. causal: False for encoders. heads: the key/value heads of the call.
    """

    cache: DiJiangCacheLayer | None
    hidden_states: Tensor | None
    cos_sin: tuple[Tensor, Tensor] | None
    documents: Tensor | None = None
    logits: Logits = Logits(1.0)
    causal: bool = True
    heads: slice = slice(None)

    def of_heads(self, part: slice, kv_heads: int) -> "Call":
        """This call for some of the ``kv_heads`` key/value heads."""
        return self._replace(heads=part, logits=self.logits.of_heads(part, kv_heads))


class DiJiangAttention(nn.Module):
    """The parameters of one layer's kernel, and attention with them. Each key/value head has a table, which its query
    heads share; with ``decay: retnet`` each query head has one."""

    def __init__(
        self, kernel: Kernel, layers: Layers, apply_rotary: Callable[..., Any] | None, memory: tuple[int, ...] = ()
    ) -> None:
        """apply_rotary: the model's rotary function, or None if the layer has none. memory: see `Layers.memory_of`."""
        super().__init__()
        self.layers = layers
        self.arguments: list[str] = []  # names of the parameters of the attention module's forward
        self.borrows = False  # whether keys and values are those of an earlier layer
        self.apply_rotary = apply_rotary if kernel.rotary == "remove" else None
        self.resize(kernel, memory)
        heads, kv_heads = layers.heads, layers.kv_heads
        if kernel.far:
            self.q_features = QueryFeatures(heads, layers.head_dim, kernel, scaled=kernel.window > 0)
            self.k_features = KeyFeatures(kv_heads, layers.head_dim, kernel)
            self.decay = StateDecay(heads, kv_heads, self.k_features.features, kernel)
            if kernel.selective or kernel.decay_rank:
                self.gates = TokenGates(kv_heads, layers.hidden_size, kernel)
            if kernel.shift:  # μ, the share of the previous token's query and key
                self.q_shift = nn.Parameter(torch.empty(heads, 1, layers.head_dim, dtype=torch.float32))
                self.k_shift = nn.Parameter(torch.empty(kv_heads, 1, layers.head_dim, dtype=torch.float32))
        if kernel.gate:
            width = heads * layers.value_dim
            self.gate = nn.Parameter(torch.empty(width, layers.hidden_size, dtype=torch.float32))  # W_G
            self.norm_weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
            self.norm_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def resize(self, kernel: Kernel, memory: tuple[int, ...] = ()) -> None:
        """Changes the sizes of the table, on which no parameter depends. Arguments as of `__init__`."""
        self.kernel, self.memory = kernel, memory
        self.groups = Group.of(kernel, self.sizes.state_heads, memory)

    def reset_parameters(self) -> None:
        """Initialises parameters. Functions of `transformers.initialization` skip those that a checkpoint has set."""
        kernel = self.kernel
        if kernel.far:
            for part in self.children():
                part.reset_parameters()  # type: ignore[operator]
            if kernel.shift:
                init.zeros_(self.q_shift)
                init.zeros_(self.k_shift)
        if kernel.gate:
            init.normal_(self.gate, std=self.layers.hidden_size**-0.5)
            init.ones_(self.norm_weight)
            init.zeros_(self.norm_bias)

    @property
    def sizes(self) -> Sizes:
        """The sizes by which a cache makes this layer's past."""
        layers = self.layers
        return Sizes(
            self.kernel, layers.heads, layers.kv_heads, layers.head_dim, layers.value_dim, self._sees_other_keys,
            self.memory,
        )  # fmt: skip

    @property
    def _sees_other_keys(self) -> bool:
        return self.kernel.far and (self.kernel.shift or self.apply_rotary is not None)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        """Attention of new tokens, [B, H, N, V]. q: [B, H, N, D], k: [B, G, N, D], v: [B, G, N, V], as the source makes
        them. mask: [B, N], False for padding, or None. Raises ValueError if ``call`` lacks hidden states for gates."""
        if not torch.is_autocast_enabled(q.device.type):
            return self._attend(q, k, v, mask, call)
        with torch.autocast(q.device.type, enabled=False):  # autocast would make the state's products half precision
            return self._attend(q, k, v, mask, call)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: Call) -> Tensor:
        cache = call.cache
        if cache is not None and self.borrows:  # a module that borrows keys does not update the cache
            cache.update(k, v)
        far_q, far_k = q, k
        if self.kernel.far and self.apply_rotary is not None and call.cos_sin is not None:
            far_q, far_k = without_rotation(self.apply_rotary, q, k, *call.cos_sin, dim=self.layers.rotary_dim)
        keeps = cache is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        known = cache.known if cache is not None and keeps else {}
        keys = KeyTokens(
            self._repeated(k), self._repeated(v), far_k if self._sees_other_keys else None, self._gates(call, known)
        )
        new = Tokens(q, far_q, keys, None if mask is None else mask.bool())
        if not call.causal:
            out = self._both_sides(new, call)
        elif cache is None:
            out, _, _ = self._extend(None, 0, new, call)
        elif q.shape[2] == 1 and cache.takes_one(mask):
            out = self._decode(cache, new, known, call)
        else:
            out = self._prefill(cache, new, call)
        if self.kernel.gate:
            out = self._gated(out, call.hidden_states)
        return out.to(v.dtype)

    # ------------------------------------------------------------------------------------------- any number of tokens

    def _prefill(self, cache: DiJiangCacheLayer, new: Tokens, call: Call) -> Tensor:
        """Attention of any number of tokens after those in the cache, [B, H, N, V]. The tokens enter the cache's past;
        in a cache that records, they stay in `pending` until the first call after a `crop`."""
        if not cache.record_past:
            out, past, count = self._extend(cache.past, cache.count, new, call)
            cache.keep(past, count)
            cache.known = {}
            return out
        if cache.pending is not None and cache.is_confirmed:
            _, past, count = self._extend(cache.past, cache.count, cache.pending, call)
            cache.keep(past, count)
            cache.pending = None
        cache.pending = new if cache.pending is None else cache.pending.followed_by(new)
        cache.is_confirmed = False
        out, _, _ = self._extend(cache.past, cache.count, cache.pending, call)
        return out[:, :, -new.length :]

    def _extend(
        self, past: Past | None, count: int | Tensor, new: Tokens, call: Call
    ) -> tuple[Tensor, Past, int | Tensor]:
        """Attention of new tokens after a past of ``count`` tokens, one number or [B]: the output, [B, H, N, V], the
        past with the new tokens, and its count."""
        new, trail = self._shifted(new, None if past is None else past.trail, call.documents)
        layout = self._layout(new, count, call)
        out, after = self._by_heads(past, new, layout, call)
        is_alike = new.valid is None and not isinstance(count, Tensor)
        count = count + (new.length if is_alike else new.real().sum(1))
        return layout.outputs(out, new.length), after._replace(trail=trail), count

    def _by_heads(self, past: Past | None, new: Tokens, layout: Layout, call: Call) -> tuple[Tensor, Past]:
        """Runs `_extend_table` or `_extend_state` on groups of heads: the output [B, H, T, V], and the past without its
        trail. On a CPU groups are divided so that their features stay in a core's cache."""
        attend = self._extend_table if self.kernel.window else self._extend_state
        batch, heads = new.keys.k.shape[:2]
        parts = self.groups
        if self.kernel.decay != "retnet":  # groups are of key/value heads, retnet's of query heads
            numbers = batch * new.length * 2 * self.layers.head_dim
            parts = [part for group in parts for part in group.pieces(numbers, new.q)]
        if len(parts) == 1:
            return attend(past, new, layout, call, parts[0].kernel)
        sizes = [part.heads for part in parts]
        pasts: list[Any] = [None] * len(sizes) if past is None else past.split(sizes)
        outputs, after = [], []
        for group, earlier, tokens in zip(parts, pasts, new.split(sizes), strict=True):
            out, later = attend(earlier, tokens, layout, call.of_heads(group.part, heads), group.kernel)
            outputs.append(out)
            after.append(later)
        out = torch.cat([out.transpose(1, 2) for out in outputs], 2)  # in memory [B, T, H, V], as modules want it
        return out.transpose(1, 2), Past.joined(after)

    def _layout(self, new: Tokens, count: int | Tensor, call: Call) -> Layout:
        kernel = self.kernel
        if call.documents is not None:
            return Layout.packed(call.documents, kernel.block, kernel.window)
        if not kernel.window:
            count = 0  # without a table, chunks may begin at any token
        if new.valid is None and not isinstance(count, Tensor):
            return Layout.plain(new.length, kernel.block, kernel.window, count, new.q.device)
        count = torch.as_tensor(count, device=new.q.device).expand(len(new.q))
        return Layout.padded(new.real(), kernel.block, kernel.window, count)

    def _extend_table(
        self, past: Past | None, new: Tokens, layout: Layout, call: Call, kernel: Kernel
    ) -> tuple[Tensor, Past]:
        """`_extend` in slots, for heads whose tables have one size: [B, H, T, V], and their past."""
        table, block = None if past is None else past.tables[0], kernel.block
        keys = new.keys.map(layout.keys, None if table is None else table.window)
        written = []
        if kernel.far:  # all blocks but those of the last window leave, and write to the state
            leaving = layout.blocks - 1
            numbers = keys.k.shape[0] * keys.k.shape[1] * 2 * self.k_features.features * block  # log features, decays
            for start, end in in_pieces(leaving, numbers, keys.k):
                written.append(self._written(keys.between(start * block, end * block), None, block, call))
        queries, rows = self._queries(new, layout, call), Keys(keys.k, keys.v, written)
        out, after = attend_blocks(queries, rows, layout, table, kernel, call.logits)
        far_k, gates = (x if x is None else layout.last_window(x).clone() for x in keys[2:])
        return out, Past((after._replace(far_k=far_k, gates=gates),), None, None)

    def _extend_state(
        self, past: Past | None, new: Tokens, layout: Layout, call: Call, kernel: Kernel
    ) -> tuple[Tensor, Past]:
        written = self._written(new.keys.map(layout.queries), layout.real, kernel.block, call)
        features, state = self._queries(new, layout, call).features, None if past is None else past.state
        assert features is not None
        out, state = attend_chunks(features, written, layout, state, kernel.normalize)
        return out, Past((), state, None)

    def _both_sides(self, new: Tokens, call: Call) -> Tensor:
        """Attention of all tokens of an encoder, [B, H, N, V]."""
        new, _ = self._shifted(new, None, call.documents)
        layout = self._layout(new, 0, call)
        queries, keys = self._queries(new, layout, call), new.keys.map(layout.queries)
        written = []
        if self.kernel.far:
            written = [self._written(keys, layout.real, self.kernel.block, call)]
        if self.kernel.window:
            rows = Keys(keys.k, keys.v, written)
            out = attend_both_sides(queries, rows, layout, self.kernel, call.logits)
        else:
            assert queries.features is not None
            out = attend_chunks_both_sides(queries.features, written[0], layout, self.kernel.normalize)
        return layout.outputs(out, new.length)

    def _queries(self, new: Tokens, layout: Layout, call: Call) -> Queries:
        features = None
        if self.kernel.far:
            repeats = self.layers.heads // self.layers.kv_heads
            start, end, _ = call.heads.indices(self.layers.kv_heads)
            heads = slice(start * repeats, end * repeats)
            features = self.q_features(layout.queries(new.far_q), call.logits.scaling, heads)
        return Queries(layout.queries(new.q), features)

    # ------------------------------------------------------------------------------------------------------ one token

    def _decode(self, cache: DiJiangCacheLayer, new: Tokens, known: dict[str, Any], call: Call) -> Tensor:
        """Attention of one token, [B, H, 1, V], which is written to the cache in place. known: `cache.known`."""
        past, valid = cache.writable_past(), None if new.valid is None else new.valid[:, 0]
        new, trail = self._shifted(new, past.trail, None)
        features = None
        if self.kernel.far:
            features = self.q_features(new.far_q, call.logits.scaling, known=known.setdefault("queries", {}))
        if past.tables:
            out, past = self._decode_tables(past, new, features, cache.count, call)
        else:
            assert features is not None and past.state is not None
            written = self._written(new.keys, new.valid, 1, call).map(lambda x: x[:, :, 0])
            out, state = attend_one(features, written, past.state, self.kernel.normalize)
            past = Past((), state, None)
        cache.keep(past._replace(trail=trail), cache.count + (1 if valid is None else valid.long()))
        return out

    def _decode_tables(
        self, past: Past, new: Tokens, features: Tensor | None, count: int | Tensor, call: Call
    ) -> tuple[Tensor, Past]:
        """Attention of one token over all tables. features: [B, H, 1, F], the query's, or None without a state."""
        if len(self.groups) == 1:
            return self._decode_group(past, new, features, count, call, self.groups[0].kernel)
        sizes, heads = [group.heads for group in self.groups], self.layers.kv_heads
        repeats = self.layers.heads // heads
        outputs: list[Tensor] = []
        after: list[Past] = []
        for (part, kernel), earlier, tokens in zip(self.groups, past.split(sizes), new.split(sizes), strict=True):
            own = None if features is None else features[:, part.start * repeats : part.stop * repeats]
            if after:  # the first group has written the gates, which all share
                tokens = tokens._replace(keys=tokens.keys._replace(gates=None))
            out, later = self._decode_group(earlier, tokens, own, count, call.of_heads(part, heads), kernel)
            outputs.append(out)
            after.append(later)
        return torch.cat(outputs, 1), Past.joined(after)

    def _decode_group(
        self, past: Past, new: Tokens, features: Tensor | None, count: int | Tensor, call: Call, kernel: Kernel
    ) -> tuple[Tensor, Past]:
        """Attention of one token for heads whose tables have one size."""
        valid = None if new.valid is None else new.valid[:, 0]
        table = self._advanced(past.tables[0], count, valid, call, kernel)
        out = attend_token(Queries(new.q, features), new.keys, table, count, valid, kernel, call.logits)
        return out, Past((table,), None, None)

    def _advanced(self, table: Table, count: int | Tensor, valid: Tensor | None, call: Call, kernel: Kernel) -> Table:
        """The table with room for one more token: where the window's last block is full, its oldest block leaves."""
        block = kernel.block
        if not isinstance(count, Tensor):
            return self._advance(table, count, call, kernel) if count and count % block == 0 else table
        due = (count > 0) & (count % block == 0)
        due = due if valid is None else due & valid  # padding takes no slot
        if torch.compiler.is_compiling():  # a graph can't look at values, so it has both branches
            held = [x for x in table if x is not None]

            def some(*tensors: Tensor) -> tuple[Tensor, ...]:
                after = self._advance(table.of(tensors), count, call, kernel)
                kept = zip(tensors, (x for x in after if x is not None), strict=True)
                return tuple(torch.where(due.view(-1, *[1] * (x.dim() - 1)), y, x) for x, y in kept)

            def none(*tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(x.clone() for x in tensors)

            return table.of(torch.cond(due.any(), some, none, held))
        rows = due.nonzero()[:, 0]
        if not len(rows):
            return table
        after = self._advance(table.map(lambda x: x[rows]), count[rows], call, kernel)
        pairs = zip(table, after, strict=True)
        return Table(*(x if x is None or y is None else x.index_copy(0, rows, y) for x, y in pairs))  # type: ignore[arg-type]

    def _advance(self, table: Table, count: int | Tensor, call: Call, kernel: Kernel) -> Table:
        written, block = None, kernel.block
        if kernel.far:
            written = self._written(table.window.map(lambda x: x[:, :, :block]), None, block, call)
            written = written.map(lambda x: x[:, :, 0])
        return advance(table, written, count, kernel)

    # --------------------------------------------------------------------------------- what keys write to the state

    def _written(self, keys: KeyTokens, real: Tensor | None, block: int, call: Call) -> Written:
        """What T keys write to the state, and the state's decay, [B, G, T / C, C, …]. real: [B or 1, T], False in slots
        without a key, or None if all have one. block: C."""
        repeats = self.layers.heads // self.layers.kv_heads if self.kernel.decay == "retnet" else 1
        seen = keys.k[:, ::repeats] if keys.far_k is None else keys.far_k
        decay, log_scale = self.decay(seen, keys.gates, call.heads)
        features, scale = (self._repeated(x) for x in self.k_features(seen, call.logits.scaling, call.heads))
        written = Written(features, scale if log_scale is None else scale + log_scale, keys.v, decay)
        if real is not None:
            padding = ~real[:, None, :, None]
            scale, decay = written.log_scale.masked_fill(padding, NEVER), decay.map(lambda x: x.masked_fill(padding, 0))
            written = written._replace(log_scale=scale, decay=decay)
        return written.map(lambda x: x.unflatten(2, (-1, block)))

    def _gates(self, call: Call, known: dict[str, Any]) -> Tensor | None:
        """The gates of each token (see `TokenGates`), [B, 1, N, X], or None for a kernel without gates."""
        if not (self.kernel.far and (self.kernel.selective or self.kernel.decay_rank)):
            return None
        if call.hidden_states is None:
            raise ValueError(
                "the attention module got no hidden_states: convert with kernel.selective false, kernel.decay_rank 0"
            )
        return self.gates(call.hidden_states, known.setdefault("gates", {}))

    def _repeated(self, x: Tensor) -> Tensor:
        """x: [B, G, …], with ``decay: retnet`` repeated to [B, H, …], since each query head has its own table then."""
        repeats = self.layers.heads // self.layers.kv_heads if self.kernel.decay == "retnet" else 1
        return x if repeats == 1 else x.repeat_interleave(repeats, 1)

    # ---------------------------------------------------------------------------- queries and keys as features see them

    def _shifted(self, new: Tokens, trail: Tensor | None, documents: Tensor | None) -> tuple[Tokens, Tensor | None]:
        """Adds μ times the previous token's query and key to those that features see; a document's first token has no
        previous one. Also returns the trail: the last real token's query and key, [B, H + G, 1, D], without a share."""
        if not (self.kernel.far and self.kernel.shift):
            return new, None
        far_k = new.keys.far_k
        assert far_k is not None
        both = torch.cat([new.far_q, far_k], 1)
        before, last = preceding(both, torch.zeros_like(both[:, :, :1]) if trail is None else trail, new.valid)
        if documents is not None:
            starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            before = before.masked_fill(starts[:, None, :, None], 0)
        q_before, k_before = before.split([new.far_q.shape[1], far_k.shape[1]], 1)
        far_q = new.far_q + (self.q_shift * q_before).to(new.far_q.dtype)
        far_k = far_k + (self.k_shift * k_before).to(far_k.dtype)
        return new._replace(far_q=far_q, keys=new.keys._replace(far_k=far_k)), last.clone()

    def _gated(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """out [B, H, N, V] after group norm of each head, times the gate SiLU(x W_G) of the published formulation."""
        assert hidden_states is not None
        out = F.layer_norm(out, out.shape[-1:])
        shape = (self.layers.heads, 1, self.layers.value_dim)
        out = out * self.norm_weight.view(shape) + self.norm_bias.view(shape)
        x = accumulated(hidden_states)
        gate = F.silu(x @ self.gate.to(x.dtype).mT)
        return out * gate.unflatten(-1, (self.layers.heads, -1)).transpose(1, 2)
