"""The chunked and the recurrent form without gradients, in few passes: `prefill` for prompts on the CPU,
`absorptions` for decoding.

With a window w and chunks of C, the queries of a chunk see the w + C keys that end with the chunk. Among the first C
of these, key j weighs as far for query i where j ≤ i; all other weights are near ones. So near and far share one
matrix of weights [C, w + C], one product with the values and one denominator. All keys before are in the state.

Far weights have one scale for all queries of a piece, where `chunked` has a running maximum for each, and near weights
are masked only after the exponential. That is exact unless they span more than float32 does: then decays or a
denominator tell, it is tried again with pieces of one chunk, and at last `prefill` gives up.

Shape legend as in `linear_attention`; L queries, C to a chunk, R = H / G queries a key/value head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import FLOOR, FarState, accumulated, per_key, rescaled, with_ones

# What a query's weights add up to at least, where what float32 can't hold of the smallest does not count.
LEAST_TOTAL = 1e-28
# The most that the state may decay by in a piece, as a power of e: keys' features grow by as much in between.
MOST_DECAY = 40.0


def prefill(
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
    state: FarState | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, FarState] | None:
    """`chunked` for a piece of a prompt, without gradients.

    Arguments are those of `chunked`, but for this: k, v and mask are of w + L keys, w of them before the first query
    (those that don't exist are masked), and what belongs to the far part (fk, gk and decays) of the first L of these
    alone. L is at most chunk_size, or a multiple of it.

    Returns the output [B, H, L, V] (accumulation dtype) and the state after the first L keys, or None where the scales
    of keys span too much for this form.
    """
    queries, kv_heads = q.shape[2], k.shape[1]
    if state is None:
        state = FarState.empty(q.shape[0], kv_heads, fk.shape[-1], v.shape[-1], v)
    if log_decay is not None:
        log_decay = per_key(log_decay, gk)

    def piece(start: int, end: int, state: FarState) -> tuple[Tensor, FarState] | None:
        now, seen = slice(start, end), slice(start, end + window)
        return _piece(
            q[:, :, now], k[:, :, seen], v[:, :, seen], fq[:, :, now], gq[:, :, now], fk[:, :, now], gk[:, :, now],
            scaling=scaling, window=window, softcap=softcap, sink=sink,
            log_decay=None if log_decay is None else log_decay[:, :, now],
            feature_decay=None if feature_decay is None else feature_decay[:, :, now],
            mask=None if mask is None else mask[:, seen], state=state, chunk_size=chunk_size,
        )  # fmt: skip

    whole = piece(0, queries, state)
    if whole is not None or queries <= chunk_size:
        return whole
    outs = []
    for start in range(0, queries, chunk_size):
        done = piece(start, start + chunk_size, state)
        if done is None:
            return None
        outs.append(done[0])
        state = done[1]
    return torch.cat(outs, 2), state


def _piece(
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
    softcap: float | None,
    sink: Tensor | None,
    log_decay: Tensor | None,
    feature_decay: Tensor | None,
    mask: Tensor | None,
    state: FarState,
    chunk_size: int,
) -> tuple[Tensor, FarState] | None:
    """`prefill` with one scale. log_decay: of each key."""
    batch, heads, queries, _ = q.shape
    kv_heads, size = k.shape[1], min(chunk_size, queries)
    repeats = heads // kv_heads

    def of_state(x: Tensor) -> Tensor:
        """A head's row, [B, G, …], beside others, [B · G, …]."""
        return x.flatten(0, 1)

    q, k, v = accumulated(q) * scaling, of_state(accumulated(k)), of_state(with_ones(v))
    (s, m), fk, gk = map(of_state, state), of_state(fk), of_state(gk.to(v.dtype))
    log_decay, feature_decay = (None if x is None else of_state(x) for x in (log_decay, feature_decay))
    real = None if mask is None else mask.bool().repeat_interleave(kv_heads, 0)
    absorbed = None if real is None else real[:, :queries]
    if absorbed is not None:
        gk = gk.masked_fill(~absorbed, FLOOR)
        log_decay = None if log_decay is None else log_decay * absorbed
        feature_decay = None if feature_decay is None else feature_decay * absorbed[..., None]

    # Scales: key j weighs e^{gq_i + h_j − Λ_i} for query i, Λ what the state has decayed by since the piece began.
    lam = torch.zeros_like(gk) if log_decay is None else log_decay.cumsum(1).neg_()
    left = None if feature_decay is None else _cumulative(feature_decay, size)
    if lam[:, -1].amax() > MOST_DECAY or (left is not None and left[:, -1].amin() < -MOST_DECAY):
        return None
    h = gk + lam
    top = torch.maximum(m, h.amax(1))
    weight = (h - top[:, None]).exp_()  # of each key
    if absorbed is not None:
        weight *= absorbed
    far_scale = gq.unflatten(1, (kv_heads, repeats)) + (top[:, None] - lam).view(batch, kv_heads, 1, queries)
    far_scale = far_scale.flatten(1, 2)
    s = s * (m - top).exp()[:, None, None]
    v_far = v[:, :queries] * weight[..., None]

    # Features: a query's shrink by what each has lost so far, a key's grow.
    kept = None if left is None else left[:, -1, :, None].exp()
    if left is not None:
        left.exp_()
        fq = (fq.unflatten(1, (kv_heads, repeats)) * left.view(batch, kv_heads, 1, queries, -1)).flatten(1, 2)
        fk = torch.div(fk, left, out=left)

    of_sink = None
    if sink is not None:
        of_sink = sink.to(v.dtype).view(1, heads, 1).expand(batch, -1, size).reshape(-1, repeats * size)
    lower, band = _masks(window, size, repeats, v.dtype)
    out, least = v.new_empty(batch, heads, queries, v.shape[-1] - 1), v.new_ones(())
    for start in range(0, queries, size):
        keys, seen = slice(start, start + size), slice(start, start + size + window)
        q_n, fq_n, scale_n = (
            x[:, :, keys].reshape(batch * kv_heads, repeats * size, *x.shape[3:]) for x in (q, fq, far_scale)
        )
        read = fq_n @ s  # [B · G, R · C, V + 1]
        far = (fq_n @ fk[:, keys].mT).mul_(weight[:, None, keys])
        if window == 0:
            read.baddbmm_(far.mul_(lower), v[:, seen])
        else:
            near = q_n @ k[:, seen].mT
            if softcap is not None:
                near = near.div_(softcap).tanh_().mul_(softcap)
            scale = torch.maximum(near.amax(-1), scale_n)
            if of_sink is not None:
                scale = torch.maximum(scale, of_sink)
            weights = near.sub_(scale[..., None]).exp_().mul_(band)
            if real is not None:
                weights *= real[:, None, seen]
            share = (scale_n - scale).exp_()[..., None]
            weights[..., :size].addcmul_(far, lower * share)
            read.mul_(share).baddbmm_(weights, v[:, seen])
            if of_sink is not None:
                read[..., -1] += (of_sink - scale).exp_()
        s.baddbmm_(fk[:, keys].mT, v_far[:, keys])
        least = torch.minimum(least, read[..., -1].amin())
        read = read.view(batch, heads, size, -1)
        torch.div(read[..., :-1], read[..., -1:], out=out[:, :, keys])

    if not least >= LEAST_TOTAL:
        return None
    if kept is not None:
        s *= kept
    shape = (batch, kv_heads)
    return out, rescaled(s.unflatten(0, shape), top.view(shape), lam[:, -1].view(shape))


class Absorption(NamedTuple):
    """What one key does to a state: s · factor + key valueᵀ, and the maximum that this s has."""

    factor: Tensor
    key: Tensor
    value: Tensor
    m: Tensor

    def apply(self, state: FarState) -> None:
        """In place."""
        state.s.mul_(self.factor).flatten(0, 1).baddbmm_(self.key, self.value)
        state.m.copy_(self.m)


def absorptions(
    m: Tensor,
    fk: Tensor,
    gk: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    valid: Tensor | None = None,
) -> list[Absorption]:
    """`absorb` of some keys, one after the other, into a state with the maximum m. Arguments as there."""
    gk = gk.to(m.dtype)
    if log_decay is not None:
        log_decay = per_key(log_decay, gk)
    if valid is not None:
        gk = gk.masked_fill(~valid[:, None], FLOOR)
        log_decay = None if log_decay is None else log_decay * valid[:, None]
        feature_decay = None if feature_decay is None else feature_decay * valid[:, None, :, None]
    tops, losses = [], []
    for i in range(gk.shape[-1]):
        top = torch.maximum(m if log_decay is None else m + log_decay[..., i], gk[..., i])
        losses.append(m - top)  # exact, so that what rounding takes from m + log γ ends up in the factor
        tops.append(m := top)
    loss = torch.stack(losses, -1) if log_decay is None else torch.stack(losses, -1) + log_decay
    weight = (gk - torch.stack(tops, -1)).exp_()
    if valid is not None:
        weight *= valid[:, None]
    factor = (loss[..., None] if feature_decay is None else loss[..., None] + feature_decay).exp()
    key, value = fk.to(m.dtype) * weight[..., None], with_ones(v)
    return [
        Absorption(
            factor[:, :, i, :, None], key[:, :, i, :, None].flatten(0, 1), value[:, :, i : i + 1].flatten(0, 1), top
        )
        for i, top in enumerate(tops)
    ]


def _cumulative(x: Tensor, size: int) -> Tensor:
    """x.cumsum(1) of [A, L, F], L whole chunks, as products with chunks of so many: several times as fast."""
    lower = torch.ones(size, size, dtype=x.dtype).tril_()
    sums = lower @ x.unflatten(1, (-1, size))  # [A, L / C, C, F]
    before = F.pad(sums[:, :-1, -1].cumsum(1), (0, 0, 1, 0))
    return sums.add_(before[:, :, None]).flatten(1, 2)


def _masks(window: int, size: int, repeats: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 where a chunk's query i sees one of its w + C keys j, else 0: the far ones among the first C (j ≤ i),
    [R · C, C], and the near ones (i < j ≤ i + w), [R · C, w + C]."""
    i, j = torch.arange(size)[:, None], torch.arange(window + size)
    near = (j > i) & (j <= i + window)
    return (j[:size] <= i).to(dtype).repeat(repeats, 1), near.to(dtype).repeat(repeats, 1)
