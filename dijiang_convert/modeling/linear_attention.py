"""Linear attention with an exact window, in three forms: naive, chunked, recurrent.

For query i the last ``window`` keys weigh exp(s·q·k) exactly (near), all earlier ones weigh
exp(g(q) + g(k)) φ(q)·φ(k) times γ for every key absorbed since (far), under one denominator (each feature may have a γ
of its own besides):

    o_i = (Σ_near e^{s q_i·k_j} v_j + Σ_far φ(q_i)·φ(k_j) e^{g(q_i) + g(k_j)} γ^{n_ij} v_j) / (the same sums without v)

Near logits may be soft-capped, t·tanh(s q·k / t), and a sink, one more logit a head that has no value, may share in the
denominator, as sources have them; both need a window.

The far sum needs only a state of fixed size. Features φ, log-scales g and log γ come from outside: this file knows
nothing of how they are made. Keys may outnumber queries: the last key belongs to the last query, and keys before the
first query are the recent past that a cache carried over. ``state`` summarises everything before the first key.

A row may hold several documents one after the other (``segments`` numbers them): a query sees the keys of its own
alone, near and far. The state then holds keys of one document at a time, and is emptied where the next one begins.

Shape legend: B batch, H query heads, G key/value heads, R = H / G, N queries, K keys (K ≥ N), D head_dim, V value
head_dim, F features, C chunk. All sums are accumulated in float32 (float64 if the inputs are).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .accelerated import chunked_form

# Stands for −∞ where a difference of two of them must be 0, not NaN.
FLOOR = -1e30
# −log of what a feature may keep at least of its sums when a key enters. Over a chunk it adds up to a power of e that
# features can be multiplied with, and the reverse, without leaving float32.
FASTEST = 0.5
LONGEST_CHUNK = 128  # of keys whose features decay


class FarState(NamedTuple):
    """What the far part remembers of all absorbed keys.

    s: [B, G, F, V + 1], Σ_j e^{g(k_j) − m} φ(k_j) [v_j, 1]ᵀ: the last column is the denominator's sum (z).
    m: [B, G], a running maximum of g (less the decay) that only guards the numbers: results don't depend on it.
    """

    s: Tensor
    m: Tensor

    @classmethod
    def empty(cls, batch: int, kv_heads: int, features: int, value_dim: int, like: Tensor) -> "FarState":
        """A state that has seen no key, on the device of ``like`` and in its accumulation dtype."""
        dtype = accumulation_dtype(like)
        s = torch.zeros(batch, kv_heads, features, value_dim + 1, dtype=dtype, device=like.device)
        return cls(s, torch.full((batch, kv_heads), FLOOR, dtype=dtype, device=like.device))


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 model."""
    return torch.promote_types(x.dtype, torch.float32)


def accumulated(x: Tensor) -> Tensor:
    """x in its accumulation dtype."""
    return x.to(accumulation_dtype(x))


# ------------------------------------------------------------------------------------------------- naive (reference)


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    gq: Tensor,
    fk: Tensor,
    gk: Tensor,
    *,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink: Tensor | None = None,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    state: FarState | None = None,
    causal: bool = True,
    normalize: bool = True,
) -> Tensor:
    """The definition, N × K, for tests to compare with. Shapes as in `chunked`; returns [B, H, N, V]."""
    groups, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    dtype = accumulation_dtype(fq)
    k, v, fk = (x.to(dtype).repeat_interleave(groups, 1) for x in (k, v, fk))
    gk = gk.to(dtype).repeat_interleave(groups, 1)
    valid = torch.ones(q.shape[0], keys, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)[None, :]
    distance = i - j if causal else (i - j).abs()
    near = (distance >= 0) & (distance < window)
    far = distance >= window
    near, far = near & valid[:, None], far & valid[:, None]  # [B, N, K]
    if segments is not None:
        own = segments[:, keys - queries :, None] == segments[:, None]
        near, far = near & own, far & own
    # A key decays by the log γ of each key absorbed after it. (All of its own document, wherever it is seen.)
    log_gamma = torch.zeros_like(gk)[..., None]  # [B, H, K, 1], or of each feature [B, H, K, F]
    if log_decay is not None:
        log_gamma = per_key(log_decay, gk[:, ::groups]).to(dtype).repeat_interleave(groups, 1)[..., None]
    if feature_decay is not None:
        log_gamma = log_gamma + feature_decay.to(dtype).repeat_interleave(groups, 1)
    log_gamma = log_gamma * valid[:, None, :, None]
    absorbed = F.pad(log_gamma.cumsum(2), (0, 0, 1, 0))  # [B, H, K + 1, F]: at t that of all keys before index t
    passed = absorbed[:, :, (i - window + 1).clamp(min=0)[:, 0]]  # [B, H, N, F]
    decay = passed[:, :, :, None] - absorbed[:, :, None, 1:]
    if not causal:
        first = (i + max(window, 1)).clamp(max=keys)[:, 0]
        behind = absorbed[:, :, None, :-1] - absorbed[:, :, first][:, :, :, None]
        decay = torch.where((j > i)[..., None], behind, decay)
    decay = decay.clamp(max=0)  # [B, H, N, K, F]
    if feature_decay is None:
        log_far = (fq.to(dtype) @ fk.mT).log() + gk[:, :, None] + decay[..., 0]
    else:
        log_far = torch.einsum("bhnf,bhkf,bhnkf->bhnk", fq.to(dtype), fk, decay.exp()).log() + gk[:, :, None]
    log_far = log_far.masked_fill(~far[:, None], -torch.inf)
    if not normalize:
        return log_far.exp() @ v
    log_far = log_far + gq.to(dtype)[..., None]
    log_near = _capped((q.to(dtype) @ k.mT) * scaling, softcap)
    log_near = log_near.masked_fill(~near[:, None], -torch.inf)
    logits, values = torch.cat([log_far, log_near], -1), torch.cat([v, v], -2)
    if sink is not None:
        of_sink = sink.to(dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        logits, values = torch.cat([logits, of_sink], -1), F.pad(values, (0, 0, 0, 1))
    if state is not None:
        s, m = state.s.to(dtype).repeat_interleave(groups, 1), state.m.to(dtype).repeat_interleave(groups, 1)
        read = (fq.to(dtype) * passed.exp()) @ s  # [B, H, N, V + 1]
        log_state = read[..., -1:].log() + (gq + m[..., None])[..., None]
        if segments is not None:
            log_state = log_state.masked_fill(~own[:, None, :, :1], -torch.inf)
        logits = torch.cat([logits, log_state], -1)
        weights = logits.softmax(-1)
        return weights[..., :-1] @ values + weights[..., -1:] * (read[..., :-1] / read[..., -1:])
    return logits.softmax(-1) @ values


# --------------------------------------------------------------------------------------------------- chunked (linear)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    gq: Tensor | None,
    fk: Tensor | None,
    gk: Tensor | None,
    *,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink: Tensor | None = None,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    state: FarState | None = None,
    causal: bool = True,
    normalize: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, FarState | None]:
    """For training and prefill: time and memory linear in length, a few large matrix products a chunk.

    Args:
        q, k, v: [B, H, N, D], [B, G, K, D], [B, G, K, V], for the exact window (rotary embedding applied).
        fq, fk: positive features [B, H, N, F], [B, G, K, F], for the far part. None deletes the far part.
        gq, gk: log-scales [B, H, N], [B, G, K].
        scaling: s, the factor of q·k.
        window: how many of the last keys, the token's own included, are exact; 0 for none.
        softcap: bound t of near logits, which become t·tanh(logit / t). None is no bound.
        sink: a logit of each head [H] that takes its share of the weights and has no value, or None.
        log_decay: log γ ≤ 0, [G] or of each key [B, G, K]: what the state decays by when the key enters. None is γ = 1.
        feature_decay: [B, G, K, F], what each feature's sums decay by besides, from −FASTEST to 0.
        mask: [B, K], True for real keys; others contribute nothing and don't decay the state.
        segments: [B, K], the number of each key's document, not decreasing along a row. None is one document a row.
        state: the far state before the first key (causal only); it is of that key's document.
        causal: False lets each query see both sides: |i − j| < window near, all else far.
        normalize: False drops the denominator (the published formulation); needs window = 0.

    Returns:
        The output [B, H, N, V] (accumulation dtype; kernels of `accelerated` give v's) and the far state after all keys
        but the last ``window``: of the last key's document.
    """
    if fq is not None and causal and normalize and segments is None:
        form = chunked_form(q, v, k, fq, gq, fk, gk, sink, log_decay, feature_decay)
        if form is not None:
            return form(
                q, k, v, fq, gq, fk, gk, scaling=scaling, window=window, softcap=softcap, sink=sink,
                log_decay=log_decay, feature_decay=feature_decay, mask=mask, state=state,
            )  # fmt: skip
    queries, keys = q.shape[2], k.shape[2]
    valid = torch.ones(q.shape[0], keys, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    past = keys - queries
    near = None
    if window > 0:
        near = near_attention(
            q, k, v, scaling=scaling, window=window, softcap=softcap, sink=sink, valid=valid, causal=causal,
            segments=segments,
        )  # fmt: skip
    if fq is None or gq is None or fk is None or gk is None:
        if near is None:
            raise ValueError("without a far part the window must be at least 1")
        return near[0], None

    if state is None:
        state = FarState.empty(q.shape[0], k.shape[1], fk.shape[-1], v.shape[-1], v)
    # Query n reads the state once key past + n − window is in: delay the keys by the window, then it is plain
    # causal attention. What lies before the first delayed key is absorbed at once.
    first = past - window
    if first > 0:
        before, of_state = slice(0, first), valid[:, :first]
        if segments is not None:
            state = _if_same(state, segments[:, 0], segments[:, first - 1])
            of_state = of_state & (segments[:, before] == segments[:, first - 1 : first])
        decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[..., before]
        of_features = None if feature_decay is None else feature_decay[:, :, before]
        state = absorb(state, fk[:, :, before], gk[:, :, before], v[:, :, before], decay, of_features, of_state)
    gk = gk.to(state.m.dtype)
    lam = None if log_decay is None else -per_key(log_decay, gk)
    all_keys = _Keys(fk, gk, v, lam, None if feature_decay is None else -feature_decay, valid)
    documents = None if segments is None else _Documents.of(segments, first, queries)
    read, log_m, state = _far_chunks(fq, all_keys.shift(first, queries), state, chunk_size, documents)
    if documents is not None and segments is not None:
        state = _if_same(state, documents.keys[:, -1], segments[:, -1])
    if not causal:
        # The other side: the same from right to left; without a window the token itself was counted already.
        first = keys - queries + max(window, 1)
        late = all_keys.shift(first, queries).flip()
        empty = FarState.empty(q.shape[0], k.shape[1], fk.shape[-1], v.shape[-1], v)
        documents = None if segments is None else _Documents.of(segments, first, queries).flip()
        back, log_back, _ = _far_chunks(fq.flip(2), late, empty, chunk_size, documents)
        read, log_m = _add_reads((read, log_m), (back.flip(2), log_back.flip(2)))
    if not normalize:
        return read[..., :-1] * log_m[..., None].exp(), state
    return merge((read, gq + log_m), near), state


def near_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink: Tensor | None = None,
    valid: Tensor,
    causal: bool = True,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention over the last ``window`` keys (both sides if not causal), block by block.

    Returns the output [B, H, N, V] and the log-sum-exp [B, H, N] that merging needs.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, past = k.shape[1], k.shape[2] - queries
    size = min(max(window, 16), 128, max(queries, 1))
    blocks = -(-queries // size)
    before, after = window - 1, 0 if causal else window - 1
    length = before + size + after  # of the keys that a block of queries may see
    end = past + blocks * size + after
    k, v = _slice_keys(k, past - before, end), _slice_keys(v, past - before, end)
    seen = _slice_keys(valid[:, None, :, None], past - before, end)[:, 0, :, 0]
    k_blocks, v_blocks = k.unfold(2, length, size), v.unfold(2, length, size)  # [B, G, blocks, D, length]
    allowed = seen.unfold(1, length, size)[:, None, :, None, None, :]
    reach = torch.arange(length, device=q.device) - torch.arange(size, device=q.device)[:, None]
    allowed = allowed & (reach >= 0) & (reach <= before + after)
    if segments is not None:
        of_keys = _slice_keys(segments[:, None, :, None], past - before, end)[:, 0, :, 0].unfold(1, length, size)
        of_queries = _to_chunks(segments[:, None, past:, None], 1, size)  # [B, 1, blocks, 1, size, 1]
        allowed = allowed & (of_queries == of_keys[:, None, :, None, None, :])

    q_blocks = _to_chunks(q, kv_heads, size)  # [B, G, blocks, R, size, D]
    scores = (q_blocks.flatten(3, 4) @ k_blocks).unflatten(3, (-1, size))
    scores = _capped(accumulated(scores) * scaling, softcap)
    weights, lse = softmax_with_lse(scores.masked_fill(~allowed, FLOOR))
    weights = weights.to(v.dtype)
    out = (weights.flatten(3, 4) @ v_blocks.mT).unflatten(3, (-1, size))
    return _with_sink(_from_chunks(out.to(lse.dtype), queries), _from_chunks(lse[..., None], queries)[..., 0], sink)


def absorb(
    state: FarState,
    fk: Tensor,
    gk: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    valid: Tensor | None = None,
) -> FarState:
    """The state after some more keys. fk [B, G, K, F], gk [B, G, K], v [B, G, K, V], decays as in `chunked`, valid
    [B, K] or None for all."""
    v1 = with_ones(v)
    fk, gk, s = fk.to(v1.dtype), gk.to(v1.dtype), state.s
    if feature_decay is not None:
        lost = -feature_decay if valid is None else -feature_decay * valid[:, None, :, None]
        lost_n = lost.cumsum(2)
        fk, s = fk * (lost_n - lost_n[:, :, -1:]).exp(), s * (-lost_n[:, :, -1, :, None]).exp()
    total: Tensor | float = 0.0
    if log_decay is not None:  # a key decays with every key after it
        lam = -per_key(log_decay, gk)
        lam_n = (lam if valid is None else lam * valid[:, None]).cumsum(-1)
        total = lam_n[..., -1]
        gk = gk - (lam_n[..., -1:] - lam_n)
    if valid is not None:
        gk = gk.masked_fill(~valid[:, None], FLOOR)
    m = torch.maximum(state.m - total, gk.amax(-1)).detach()
    # (m' − m) first: it is exact, so that the rounding of m' − λn ends up in the gate and is not lost.
    gate, weight = (state.m - m - total).exp(), (gk - m[..., None]).exp()
    if valid is not None:
        weight = weight * valid[:, None]
    return FarState(s * gate[..., None, None] + (fk * weight[..., None]).mT @ v1, m)


def _far_chunks(
    fq: Tensor,
    keys: "_Keys",
    state: FarState,
    chunk_size: int,
    documents: "_Documents | None" = None,
) -> tuple[Tensor, Tensor, FarState]:
    """Σ_{j ≤ i} of the far part in chunks: inside a chunk C × C, between chunks through the state.

    All exponents are differences from a running maximum (H below), so none is positive, whatever the span of g.
    With documents both are a document's own. The state before a chunk has keys of one document alone, that of the last
    key before it: queries of others don't read it, and the chunk adds to it only keys of the document it ends in.
    Returns [B, H, N, V + 1] (numerator, denominator), its log-scale [B, H, N], and the state after all keys.
    """
    kv_heads, queries = keys.fk.shape[1], fq.shape[2]
    size = min(chunk_size, queries, chunk_size if keys.delta is None else LONGEST_CHUNK)

    def chunks(x: Tensor) -> Tensor:
        """[B, G, N, …] → [B, G, n, C, …]."""
        return _to_chunks(x, x.shape[1], size)[:, :, :, 0]

    v = chunks(with_ones(keys.v))
    q = _to_chunks(fq.to(v.dtype), kv_heads, size)  # [B, G, n, R, C, F]
    k = chunks(keys.fk.to(v.dtype))  # [B, G, n, C, F]
    g = chunks(keys.gk[..., None])[..., 0]  # [B, G, n, C]
    lam = None if keys.lam is None else chunks(keys.lam[..., None])[..., 0]
    live = chunks(keys.valid[:, None, :, None])[..., 0]  # [B, 1, n, C]

    kept = None
    if keys.delta is not None:  # a key's features grow by what its chunk has lost before it, a query's shrink
        delta = chunks(keys.delta) * live[..., None]
        q, k = _DecayedFeatures.apply(q, k, delta)
        kept = (-delta.sum(3)).exp()[..., None]  # of a feature's sums, over the whole chunk, [B, G, n, F, 1]

    visible = torch.ones(size, size, dtype=torch.bool, device=q.device).tril() & live[..., None, :]
    adds, keeps, reads = live, None, None
    if documents is not None:
        visible, adds, keeps, reads = documents.masks(visible, live)

    h, lam_n = _decayed_scales(g, live, lam)
    total = lam_n[..., -1]  # what a whole chunk decays, [B, G, n]
    with torch.no_grad():  # H guards the numbers; its own value cancels
        if keeps is None or reads is None:
            cumulative = total.cumsum(-1)
            peaks = torch.cat([state.m[..., None], h.amax(-1) + cumulative - total], -1).cummax(-1).values
            m_before = peaks[..., :-1] - (cumulative - total)
            top = torch.maximum(m_before[..., None], h.cummax(-1).values)  # H, [B, G, n, C]
            end = top[..., -1]  # of the state after the chunk, [B, G, n]
        else:
            top, end = _document_peaks(h, total, state.m, visible, adds, keeps, reads)
    # m before a chunk is last_top − last_total. They stay apart until subtracted from a number of their own size:
    # rounding m itself would add up over the chunks to a wrong decay.
    last_top = torch.cat([state.m[..., None], end[..., :-1]], -1)
    last_total = F.pad(total[..., :-1], (1, 0))

    # Between chunks: what each adds to the state, and the state that each starts from.
    weight = _masked_exp(h - end[..., None], adds)
    added = (k * weight[..., None]).mT @ v  # [B, G, n, F, V + 1]
    gate = _masked_exp(last_top - end - last_total, keeps)[..., None, None]
    if kept is not None:
        added, gate = added * kept, gate * kept
    start, s = _along_chunks(state.s, gate, added)

    # Inside a chunk.
    inside = _masked_exp(h[..., None, :] - top[..., :, None], visible)
    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, (-1, size)) * inside[:, :, :, None]
    read = (scores.flatten(3, 4) @ v).unflatten(3, (-1, size))
    carried = (q.flatten(3, 4) @ start).unflatten(3, (-1, size))
    carry = _masked_exp(last_top[..., None] - top - last_total[..., None], reads)
    read = read + carried * carry[:, :, :, None, :, None]
    log_m = (top - lam_n)[:, :, :, None, :, None].expand(*read.shape[:-1], 1)
    state = rescaled(s, end[..., -1], total[..., -1])
    return _from_chunks(read, queries), _from_chunks(log_m, queries)[..., 0], state


def _along_chunks(s: Tensor, gate: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [B, G, n, F, V + 1], and the one after all, s · gate + added from chunk to chunk."""
    if isinstance(added.shape[2], torch.SymInt):  # exported for any length: the loop is in the graph
        from torch._higher_order_ops.scan import scan

        def step(s: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return s * chunk[0] + chunk[1], s.clone()

        s, starts = scan(step, s, (gate.movedim(2, 0), added.movedim(2, 0)))
        return starts.movedim(0, 2), s
    starts = []
    # Not by index: the gradient of each index is as large as all chunks together, and so the time would be quadratic.
    for gate_n, added_n in zip(gate.unbind(2), added.unbind(2), strict=True):
        starts.append(s)
        s = s * gate_n + added_n
    return torch.stack(starts, 2), s


class _Documents(NamedTuple):
    """Whose keys and queries meet in `_far_chunks`: document numbers along the N places of the delayed keys.

    keys, queries: [B, N], of the key and of the query at each place. state: [B], of the state before them.
    """

    keys: Tensor
    queries: Tensor
    state: Tensor

    @classmethod
    def of(cls, segments: Tensor, start: int, length: int) -> "_Documents":
        """Of the last ``length`` queries and the keys from index ``start`` on; keys that don't exist are of the
        document that is next to them."""
        places = torch.arange(start, start + length, device=segments.device).clamp(0, segments.shape[1] - 1)
        return cls(segments[:, places], segments[:, -length:], segments[:, max(start - 1, 0)])

    def flip(self) -> "_Documents":
        return self._replace(keys=self.keys.flip(1), queries=self.queries.flip(1))

    def masks(self, visible: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``visible`` [B, 1, n, C, C] and ``live`` [B, 1, n, C] cut down to what is of one document: which keys a query
        sees, and which the chunk adds to the state; whether the state lives on through the chunk [B, 1, n], and which
        queries read the state before it [B, 1, n, C]."""
        chunks, size = live.shape[2:]
        places = torch.arange(chunks * size, device=live.device).clamp(max=self.keys.shape[1] - 1)
        keys, queries = (x[:, places].unflatten(1, (1, chunks, size)) for x in (self.keys, self.queries))
        before = torch.cat([self.state[:, None, None], keys[:, :, :-1, -1]], -1)
        visible = visible & (queries[..., :, None] == keys[..., None, :])
        return visible, live & (keys == keys[..., -1:]), before == keys[..., -1], queries == before[..., None]


def _document_peaks(
    h: Tensor, total: Tensor, m: Tensor, visible: Tensor, adds: Tensor, keeps: Tensor, reads: Tensor
) -> tuple[Tensor, Tensor]:
    """The running maximum over a query's own document, [B, G, n, C], and over that of each chunk's end, [B, G, n].
    (One over all documents would let the scales of one bury those of the next.)"""
    added, before, end = h.masked_fill(~adds, FLOOR).amax(-1), [], []
    for n in range(added.shape[2]):
        before.append(m)
        end.append(torch.maximum(torch.where(keeps[:, :, n], m, FLOOR), added[:, :, n]))
        m = end[-1] - total[:, :, n]
    carried = torch.where(reads, torch.stack(before, 2)[..., None], FLOOR)
    return torch.maximum(carried, h[..., None, :].masked_fill(~visible, FLOOR).amax(-1)), torch.stack(end, 2)


# --------------------------------------------------------------------------------------------- recurrent (one token)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    gq: Tensor,
    fk: Tensor,
    gk: Tensor,
    *,
    scaling: float,
    window: int,
    softcap: float | None = None,
    sink: Tensor | None = None,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    state: FarState | None = None,
    normalize: bool = True,
) -> tuple[Tensor, FarState]:
    """Token by token, as decoding does it with `absorb` and `attend_one`. Arguments as in `chunked`, causal."""
    batch, _, queries, _ = q.shape
    past = k.shape[2] - queries
    valid = torch.ones(batch, k.shape[2], dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    if state is None:
        state = FarState.empty(batch, k.shape[1], fk.shape[-1], v.shape[-1], v)
    outputs, absorbed = [], 0
    for i in range(past, past + queries):
        while absorbed <= i - window:
            t = slice(absorbed, absorbed + 1)
            if segments is not None:
                state = _if_same(state, segments[:, max(absorbed - 1, 0)], segments[:, absorbed])
            decay = log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[..., t]
            of_features = None if feature_decay is None else feature_decay[:, :, t]
            state = absorb(state, fk[:, :, t], gk[:, :, t], v[:, :, t], decay, of_features, valid[:, t])
            absorbed += 1
        recent = slice(max(i - window + 1, 0), i + 1)
        n = slice(i - past, i - past + 1)
        of_query, seen = state, valid[:, recent]
        if segments is not None:
            of_query = _if_same(state, segments[:, max(absorbed - 1, 0)], segments[:, i])
            seen = seen & (segments[:, recent] == segments[:, i : i + 1])
        outputs.append(
            attend_one(
                q[:, :, n],
                k[:, :, recent],
                v[:, :, recent],
                fq[:, :, n],
                gq[:, :, n],
                of_query,
                scaling=scaling,
                softcap=softcap,
                sink=sink,
                valid=seen,
                normalize=normalize,
            )  # fmt: skip
        )
    return torch.cat(outputs, 2), of_query


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    gq: Tensor,
    state: FarState,
    *,
    scaling: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """One query against the window's keys [B, G, W, D] (in any order) and the state. Returns [B, H, 1, V]."""
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    read = fq.to(state.s.dtype).reshape(batch, kv_heads, -1, fq.shape[-1]) @ state.s  # [B, G, R, V + 1]
    read = read.reshape(batch, heads, 1, -1)
    log_m = state.m[..., None]
    if heads > kv_heads:
        log_m = log_m.repeat_interleave(heads // kv_heads, 1)
    if not normalize:
        return read[..., :-1] * log_m.exp()[..., None]
    near = attend_window(q, k, v, scaling=scaling, softcap=softcap, sink=sink, valid=valid) if k.shape[2] else None
    return merge((read, gq + log_m), near)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sink: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query [B, H, 1, D] over all W given keys: the output [B, H, 1, V] and the log-sum-exp [B, H, 1]."""
    batch, heads = q.shape[:2]
    weights, lse = softmax_with_lse(near_logits(q, k, scaling, softcap, valid))
    out = weights.to(v.dtype) @ v
    return _with_sink(out.to(lse.dtype).reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1), sink)


def near_logits(q: Tensor, k: Tensor, scaling: float, softcap: float | None, valid: Tensor | None) -> Tensor:
    """What one query [B, H, 1, D] makes of all W given keys, [B, G, R, W]."""
    scores = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]) @ k.mT
    scores = _capped(accumulated(scores) * scaling, softcap)
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], FLOOR)


# ---------------------------------------------------------------------------------------------------------- helpers


def merge(far: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor] | None) -> Tensor:
    """One softmax over far and near parts from their pieces, like two blocks of flash attention.

    far: numerator and denominator [B, H, N, V + 1], and their log-scale [B, H, N]. near: output and log-sum-exp.
    """
    read, log_scale = far
    total = read[..., -1].clamp_min(torch.finfo(read.dtype).tiny)
    out = read[..., :-1] / total[..., None]
    if near is None:
        return out
    share = torch.sigmoid(log_scale + total.log() - near[1])[..., None]
    return share * out + (1 - share) * near[0]


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """Exact attention [B, H, N, V] and its log-sum-exp [B, H, N], once the sink has its share of the weights."""
    if sink is None:
        return out, lse
    total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
    return out * (lse - total).exp()[..., None], total


def with_ones(v: Tensor) -> Tensor:
    """v in the accumulation dtype with a last column of ones, which sums the denominator."""
    return F.pad(accumulated(v), (0, 1), value=1.0)


def _if_same(state: FarState, document: Tensor, other: Tensor) -> FarState:
    """The state of one document [B] as another [B] sees it: empty in the rows where they differ."""
    same = document == other
    return FarState(torch.where(same[:, None, None, None], state.s, 0.0), torch.where(same[:, None], state.m, FLOOR))


def _masked_exp(x: Tensor, mask: Tensor | None) -> Tensor:
    """e^x, and 0 (with gradient 0, however large x) where the mask is False."""
    return x.exp() if mask is None else x.masked_fill(~mask, -torch.inf).exp()


def rescaled(s: Tensor, top: Tensor, total: Tensor) -> FarState:
    """The state s e^{top − total} with its maximum in one number; what that rounds away goes into s."""
    m = (top - total).detach()
    return FarState(s * (top - m - total).exp()[..., None, None], m)


def softmax_with_lse(x: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax, log-sum-exp) over the last dimension."""
    if torch.is_grad_enabled():
        return _SoftmaxWithLse.apply(x)
    weights = x.softmax(-1)
    return weights, x.amax(-1) - weights.amax(-1).log_()  # as of any element; two passes less


class _SoftmaxWithLse(torch.autograd.Function):
    """Both gradients from the softmax alone, where autograd would keep x as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = x.softmax(-1)
        ctx.save_for_backward(weights)
        return weights, x.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, of_weights: Tensor, of_lse: Tensor) -> Tensor:  # type: ignore[override]
        (weights,) = ctx.saved_tensors
        return weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True) + of_lse[..., None])


class _DecayedFeatures(torch.autograd.Function):
    """(q e^−Λ, k e^Λ), Λ the sums of delta over a chunk so far: q [B, G, n, R, C, F], k and delta [B, G, n, C, F].
    Gradients come from the results, which matrix products keep anyway; autograd would keep five tensors more."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        lost = delta.cumsum(3)
        q, k = q * (-lost).exp()[:, :, :, None], k * lost.exp()
        ctx.save_for_backward(q, k, lost)
        return q, k

    @staticmethod
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, lost = ctx.saved_tensors
        of_lost = of_k * k - (of_q * q).sum(3)
        of_delta = of_lost.flip(3).cumsum(3).flip(3)
        return of_q * (-lost).exp()[:, :, :, None], of_k * lost.exp(), of_delta


def _add_reads(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of two (read, log-scale) pairs, at the scale of the larger one."""
    top = torch.maximum(a[1], b[1]).detach()
    return a[0] * (a[1] - top).exp()[..., None] + b[0] * (b[1] - top).exp()[..., None], top


def _decayed_scales(gk: Tensor, valid: Tensor, lam: Tensor | None) -> tuple[Tensor, Tensor]:
    """(h, Λ) with h_j = g_j + Λ_j, where Λ sums λ = −log γ over the valid keys so far: then the weight of key j at i
    is e^{h_j − Λ_i}. gk and lam [B, G, n, C], valid [B, 1, n, C]."""
    if lam is None:
        return gk.masked_fill(~valid, FLOOR), torch.zeros_like(gk)
    lam_n = (lam * valid).cumsum(-1)
    return (gk + lam_n).masked_fill(~valid, FLOOR), lam_n


def per_key(log_decay: Tensor, gk: Tensor) -> Tensor:
    """log γ of every key, [B, G, K], in the dtype of gk."""
    return (log_decay[:, None] if log_decay.dim() == 1 else log_decay).to(gk.dtype).expand_as(gk)


class _Keys(NamedTuple):
    """All that `_far_chunks` needs of each key: fk [B, G, K, F], gk and λ = −log γ [B, G, K], v [B, G, K, V], each
    feature's own −log γ, delta [B, G, K, F], and valid [B, K]."""

    fk: Tensor
    gk: Tensor
    v: Tensor
    lam: Tensor | None
    delta: Tensor | None
    valid: Tensor

    def shift(self, start: int, length: int) -> "_Keys":
        """Those from index ``start`` on; what lies outside is an invalid key."""
        end = start + length
        gk, valid = self.gk[..., None], self.valid[:, None, :, None]
        lam = None if self.lam is None else _slice_keys(self.lam[..., None], start, end)[..., 0]
        delta = None if self.delta is None else _slice_keys(self.delta, start, end)
        fk, gk, v, valid = (_slice_keys(x, start, end) for x in (self.fk, gk, self.v, valid))
        return _Keys(fk, gk[..., 0], v, lam, delta, valid[:, 0, :, 0])

    def flip(self) -> "_Keys":
        """From right to left."""
        return _Keys(*(None if x is None else x.flip(1 if x.dim() == 2 else 2) for x in self))  # type: ignore[arg-type]


def _slice_keys(x: Tensor, start: int, end: int) -> Tensor:
    """x[:, :, start:end] of [B, G, K, …], where indices outside [0, K) give zeros (False, an invalid key)."""
    inside = x[:, :, max(start, 0) : max(end, 0)]
    left = min(max(-start, 0), end - start)
    return F.pad(inside, (0, 0, left, end - start - left - inside.shape[2]))


def _to_chunks(x: Tensor, kv_heads: int, size: int) -> Tensor:
    """[B, H, N, D] → [B, G, n, R, C, D], padded with zeros to whole chunks."""
    batch, heads, length, dim = x.shape
    chunks = -(-length // size)
    x = F.pad(x, (0, 0, 0, chunks * size - length))
    return x.view(batch, kv_heads, heads // kv_heads, chunks, size, dim).transpose(2, 3)


def _from_chunks(x: Tensor, length: int) -> Tensor:
    """[B, G, n, R, C, D] → [B, H, N, D], the inverse of `_to_chunks`."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :length]
