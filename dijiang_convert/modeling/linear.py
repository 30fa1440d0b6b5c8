"""Linear attention, for the recipes `pure` and `paper`: every key weighs φ(q)·φ(k), the nearest ones as well.

    o_i = Σ_j φ(q_i)·φ(k_j) e^{b g(k_j)} γ_ij v_j / (the sum without v_j),    γ_ij: what decays from j to i

A token enters the state at once. A text is computed in chunks only for the sake of matrix products: each key of a
query's own chunk has a logit, the logarithm of its weight, and the keys of other chunks are read from the state. There
is no window, no memory and no softmax over q·k; `kernel` has these.

Shape legend: B batch, H query heads, G key/value heads, R = H / G, T slots, n chunks, C tokens of a chunk, V value
head_dim, F features.
"""

import torch
from torch import Tensor

from .layout import Layout
from .state import NEVER, Decay, State, Written, block_states, recurrent_dtype


def attend_chunks(
    features: Tensor, written: Written, layout: Layout, state: State | None, normalize: bool
) -> tuple[Tensor, State]:
    """Attention of all tokens of a text: the output, [B, H, T, V], and the state after each row's last token.

    features: [B, H, T, F], log φ(q). written: [B, G, n, C, …], what the keys write. state: before the first token, or
    None. normalize: False leaves out the denominator.
    """
    q = _by_head(features, written, layout)
    if state is not None:
        state = State(state.log_weight.to(q.dtype), state.value)
    states = block_states([written.map(lambda x: x[:, :, :-1])], layout.age, 0, state)
    passed = written.decay.map(lambda x: x.cumsum(3))
    causal = torch.ones(layout.block, layout.block, dtype=torch.bool, device=q.device).tril()
    own = _own_chunk(q, written.logits(), passed, passed).masked_fill(~causal, NEVER)
    out = _weighted([own, _far(q, states, passed)], [written.values, states.value], normalize)
    before = State(*(layout.last_block(x) for x in states))
    last, lost = written.map(layout.last_block).summary()
    after = before.then(last, lost)
    return _from_heads(out, layout), State(after.log_weight.to(recurrent_dtype(q)), after.value)


def attend_chunks_both_sides(features: Tensor, written: Written, layout: Layout, normalize: bool) -> Tensor:
    """Attention of an encoder's tokens, [B, H, T, V], to the keys on both sides. Arguments as of `attend_chunks`."""
    q = _by_head(features, written, layout)
    own, far, values = [], [], [written.values]
    for flip in (False, True):
        given, around = written, layout
        if flip:
            given, around = written.map(lambda x: x.flip(2, 3)), layout.flip()
        states = block_states([given.map(lambda x: x[:, :, :-1])], around.age, 0, None)
        passed = given.decay.map(lambda x: x.cumsum(3))
        # The query's own token decays the sum of the keys before it, but not the sum of the keys after it.
        reads = Decay(
            *(x if x is None or y is None or not flip else x - y for x, y in zip(passed, given.decay, strict=True))
        )
        asked = q.flip(2, 4) if flip else q
        inside, outside = _own_chunk(asked, given.logits(), reads, passed), _far(asked, states, reads)
        own.append(inside.flip(2, 4, 5) if flip else inside)
        far.append(outside.flip(2, 4) if flip else outside)
        values.append(states.value.flip(2) if flip else states.value)
    causal = torch.ones(layout.block, layout.block, dtype=torch.bool, device=q.device).tril()
    return _from_heads(_weighted([torch.where(causal, own[0], own[1]), *far], values, normalize), layout)


def attend_one(features: Tensor, written: Written, state: State, normalize: bool) -> tuple[Tensor, State]:
    """Attention of one new token: the output, [B, H, 1, V], and the state with the token.

    features: [B, H, 1, F], log φ(q). written: [B, G, 1, …], what the key writes. state: before the token. normalize:
    False leaves out the denominator.
    """
    decay = written.decay.total()
    value = written.values.to(state.value.dtype).expand_as(state.value)
    state = state.then(State(written.logits()[:, :, 0], value), decay)
    q = features.unflatten(1, (state.log_weight.shape[1], -1)).squeeze(3)
    out = _weighted([q + state.log_weight.to(q.dtype)[:, :, None]], [state.value], normalize)
    return out.flatten(1, 2)[:, :, None], state


def _by_head(features: Tensor, written: Written, layout: Layout) -> Tensor:
    """features: [B, H, T, F] → [B, G, n, R, C, F], for the heads of ``written``."""
    batch, kv_heads = written.features.shape[:2]
    q = layout.to_blocks(features, kv_heads)
    return q.unflatten(0, (batch, kv_heads)).unflatten(3, (-1, layout.block))


def _from_heads(out: Tensor, layout: Layout) -> Tensor:
    """out: [B, G, n, R, C, V] → [B, H, T, V], the inverse of `_by_head`."""
    return layout.from_blocks(out.flatten(3, 4).flatten(0, 1), out.shape[0])


def _own_chunk(q: Tensor, k: Tensor, reads: Decay, passed: Decay) -> Tensor:
    """Logits of the keys of each query's own chunk, [B, G, n, R, C, C]: log Σ_f φ_f(q) φ_f(k), and the decay between.

    q: [B, G, n, R, C, F], log features of queries. k: [B, G, n, C, F], of keys. reads, passed: [B, G, n, C, 1 or F],
    log γ summed from the start of the chunk to each query and to each key."""
    if reads.features is not None and passed.features is not None:
        q, k = q + reads.features[:, :, :, None], k - passed.features
    top_q, top_k = (x.detach().amax(-1, keepdim=True) for x in (q, k))
    product = (q - top_q).exp().flatten(3, 4) @ (k - top_k).exp().mT
    logits = product.clamp_min(torch.finfo(product.dtype).tiny).log().unflatten(3, q.shape[3:5])
    logits = logits + top_q + top_k.mT[:, :, :, None]
    if reads.head is not None and passed.head is not None:
        logits = logits + (reads.head - passed.head.mT)[:, :, :, None]
    return logits


def _far(q: Tensor, states: State, reads: Decay) -> Tensor:
    """Logits of the state before each query's chunk, [B, G, n, R, C, F]. Arguments as of `_own_chunk`."""
    q = q + states.log_weight[:, :, :, None, None]
    for lost in reads:
        q = q if lost is None else q + lost[:, :, :, None]
    return q


def _weighted(logits: list[Tensor], values: list[Tensor], normalize: bool) -> Tensor:
    """Σ e^logit · value, divided by Σ e^logit if ``normalize``, over the rows of all parts. logits: of each part,
    [B, G, n, R, C, rows] or [B, G, R, rows]. values: of each part, [B, G, n, rows, V] or [B, G, rows, V]."""
    rows = torch.cat(logits, -1)
    weights = rows.softmax(-1) if normalize else rows.exp()
    parts = weights.split([x.shape[-1] for x in logits], -1)
    grouped = weights.dim() > values[0].dim()  # query heads and tokens are one dimension of the product
    out: Tensor | float = 0.0
    for part, value in zip(parts, values, strict=True):
        out = out + (part.flatten(-3, -2) if grouped else part) @ value.to(part.dtype)
    assert isinstance(out, Tensor)
    return out.unflatten(-2, weights.shape[-3:-1]) if grouped else out
