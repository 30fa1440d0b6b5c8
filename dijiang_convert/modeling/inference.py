"""The chunked and the recurrent form without gradients, in few passes: `prefill` for prompts on the CPU,
`absorb_one` for one token.

With a window w and chunks of C, the queries of a chunk see the w + C keys that end with the chunk. Among the first C
of these, key j weighs as far for query i where j ≤ i; all other weights are near ones. So near and far share one
matrix of weights [C, w + C], one product with the values and one denominator. All keys before are in the state.

The far weights of a chunk have one scale, where `chunked` has a running maximum for each query. That is exact unless
they span more than float32 does: then the denominator tells, and `prefill` gives up.

Shape legend as in `linear_attention`; L queries, n chunks of C = L / n, R = H / G queries a key/value head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import FLOOR, FarState, accumulated, per_key, rescaled, with_ones

# Weights below e^−87 leave float32's normal numbers, where the processor is slow. They count as so much instead, which
# is lost in rounding if a query's weights add up to LEAST_TOTAL. (The largest is about 1.)
LEAST_EXPONENT, LEAST_TOTAL = -87.0, 1e-28


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
    batch, heads, queries, _ = q.shape
    kv_heads, size = k.shape[1], min(chunk_size, queries)
    repeats, chunks = heads // kv_heads, queries // size
    q, k, v = accumulated(q), accumulated(k), accumulated(v)
    real = None if mask is None else mask.bool()
    absorbed = None if real is None else real[:, None, :queries].unflatten(2, (chunks, size))  # [B, 1, n, C]
    if state is None:
        state = FarState.empty(batch, kv_heads, fk.shape[-1], v.shape[-1], v)

    def of_keys(x: Tensor) -> Tensor:
        """[B, G, L, …] → [B, G, n, C, …]."""
        return x.unflatten(2, (chunks, size))

    def of_queries(x: Tensor) -> Tensor:
        """[B, H, L, …] → [B, G, n, R · C, …]."""
        return x.unflatten(2, (chunks, size)).unflatten(1, (kv_heads, repeats)).transpose(2, 3).flatten(3, 4)

    def repeated(x: Tensor) -> Tensor:
        """What belongs to a place in the chunk, [B, G, n, C, …], for each query there, [B, G, n, R · C, …]."""
        return x if repeats == 1 else torch.cat([x] * repeats, 3)

    # Scales: key j weighs e^{gq_i + h_j − Λ_i} for query i, Λ what the state has decayed by since the chunk began.
    h, far_scale = of_keys(gk.to(v.dtype)), of_queries(gq)
    total = torch.zeros_like(h[..., -1])
    if log_decay is not None:
        lam = of_keys(-per_key(log_decay, gk.to(v.dtype)))
        lam = (lam if absorbed is None else lam * absorbed).cumsum(-1)
        h, far_scale, total = h + lam, far_scale - repeated(lam), lam[..., -1]
    if absorbed is not None:
        h = h.masked_fill(~absorbed, FLOOR)
    end, gate, rest = _scales(h.amax(-1), total, state.m)
    far_scale = far_scale + end[..., None]
    weight = (h - end[..., None]).exp_()  # of each key
    if absorbed is not None:
        weight *= absorbed

    # Features: a query's shrink by what the chunk has lost so far, a key's grow.
    fq, fk, left = of_queries(fq), of_keys(fk), None
    lower = torch.ones(size, size, dtype=v.dtype).tril()
    if feature_decay is not None:
        lost = of_keys(feature_decay)
        left = (lower @ (lost if absorbed is None else lost * absorbed[..., None])).exp_()  # cumsum would be slower
        fq, fk = fq * repeated(left), fk / left

    # The state that each chunk starts from, and what its queries read there.
    v_windows = v.new_empty(batch, kv_heads, chunks, window + size, v.shape[-1] + 1)
    v_windows[..., :-1] = v.unfold(2, window + size, size).mT
    v_windows[..., -1] = 1
    added = fk.mT @ (v_windows[..., :size, :] * weight[..., None])
    factor = gate[..., None, None]
    if left is not None:  # and what features lost in the chunk before
        factor = factor * F.pad(left[:, :, :-1, -1], (0, 0, 1, 0), value=1.0)[..., None]
    starts, s = torch.empty_like(added), state.s
    for n in range(chunks):
        s = torch.mul(s, factor[:, :, n], out=starts[:, :, n]) + added[:, :, n]
    if left is not None:
        s *= left[:, :, -1, -1, :, None]
    read = fq @ starts  # [B, G, n, R · C, V + 1]

    # The keys at hand.
    far = (fq @ fk.mT).mul_(weight[..., None, :])
    seen = repeated(lower.expand(1, 1, 1, size, size))
    if window == 0:
        read.flatten(0, 2).baddbmm_(far.mul_(seen).flatten(0, 2), v_windows.flatten(0, 2))
    else:
        k_windows = k.unfold(2, window + size, size).mT.contiguous()  # [B, G, n, w + C, D]
        near = of_queries(q * scaling) @ k_windows.mT
        if softcap is not None:
            near = near.div_(softcap).tanh_().mul_(softcap)
        near += repeated(_beyond(window, size, v.dtype).expand(1, 1, 1, size, -1))
        if real is not None:
            near.masked_fill_(~real.unfold(1, window + size, size)[:, None, :, None], FLOOR)
        scale = torch.maximum(near.amax(-1), far_scale)
        if sink is not None:
            of_sink = sink.to(v.dtype).view(kv_heads, 1, repeats, 1).expand(-1, chunks, -1, size).flatten(2)
            scale = torch.maximum(scale, of_sink)
        weights = near.sub_(scale[..., None]).clamp_(min=LEAST_EXPONENT).exp_()
        share = (far_scale - scale).exp_()[..., None]
        weights[..., :size].addcmul_(far, seen * share)
        read *= share
        read.flatten(0, 2).baddbmm_(weights.flatten(0, 2), v_windows.flatten(0, 2))
        if sink is not None:
            read[..., -1] += (of_sink - scale).exp_()

    total = read[..., -1:]
    if not total.amin() >= LEAST_TOTAL:
        return None
    out = (read[..., :-1] / total).unflatten(3, (repeats, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out, rescaled(s, *rest)


def absorb_one(
    state: FarState,
    fk: Tensor,
    gk: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    valid: Tensor | None = None,
) -> None:
    """`absorb` of one key, in place. fk [B, G, 1, F], gk [B, G, 1], v [B, G, 1, V], valid [B, 1] or None where it is
    real in every row."""
    s, m = state
    decays = (log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[..., 0], feature_decay)
    gk = gk[..., 0].to(m.dtype)
    if valid is not None:
        gk = gk.masked_fill(~valid, FLOOR)
        decays = (
            None if decays[0] is None else decays[0] * valid,
            None if decays[1] is None else decays[1] * valid[:, :, None, None],
        )
    top = torch.maximum(m if decays[0] is None else m + decays[0], gk)
    weight = (gk - top).exp_()
    if valid is not None:
        weight *= valid
    loss = m - top  # first: it is exact, so that what rounding took from m + log γ ends up here
    loss = (loss if decays[0] is None else loss + decays[0])[..., None, None]
    loss = loss if decays[1] is None else loss + decays[1]
    s *= loss.exp().mT
    key = fk.to(s.dtype).mT * weight[..., None, None]
    s.flatten(0, 1).baddbmm_(key.flatten(0, 1), with_ones(v).flatten(0, 1))
    m.copy_(top)


def _scales(peaks: Tensor, total: Tensor, m: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The largest scale of each chunk's keys and the state before it, [B, G, n]; what the state is multiplied by to get
    there; and after the last chunk that scale and what it has lost since.

    peaks: the largest of a chunk's own keys. total: what it loses. m: the scale of the state before all."""
    end, gate, lost = [], [], torch.zeros_like(m)
    for peak, total_n in zip(peaks.unbind(-1), total.unbind(-1), strict=True):
        top = torch.maximum(m - lost, peak)
        gate.append((m - top - lost).exp())  # m − top first: it is exact
        end.append(top)
        m, lost = top, total_n
    return torch.stack(end, -1), torch.stack(gate, -1), (m, lost)


def _beyond(window: int, size: int, dtype: torch.dtype) -> Tensor:
    """−∞ where key j of w + C is not among the window's of query i: i < j ≤ i + w. [C, w + C]."""
    i, j = torch.arange(size)[:, None], torch.arange(window + size)[None]
    return torch.zeros(size, window + size, dtype=dtype).masked_fill_((j <= i) | (j > i + window), FLOOR)
