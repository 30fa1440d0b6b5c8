"""The chunked form without gradients, in few passes, for prompts on the CPU.

Near and far part have one denominator: that of the near one, which its log-sum-exp tells. What the far part adds to it
is e^{l_qf + M − Λ_q − lse} φ_f(k) e^{h_k − M}, summed over features and keys (l the logarithm of e^g φ), so that

    o = (o_near + Σ w_far v) / (1 + Σ w_far)

Far weights have one scale for all keys of a piece, where `chunked` has a running maximum. That is exact unless they
span more than float32 does: then decays or weights tell, it is tried again with pieces of one chunk, and at last
`prefill` gives up.

Shape legend as in `linear_attention`; L queries, C to a chunk, R = H / G queries a key/value head, W = w + block.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .linear_attention import FLOOR, FarState, accumulated, per_key, rescaled, softmax_with_lse

# What a query's weights add up to at least, where what float32 can't hold of the smallest does not count (not of a
# prompt with a window), and at most.
LEAST_TOTAL, MOST_TOTAL = 1e-28, 1e28
# The most that the state may decay by in a piece, or lack of decay, as a power of e: keys' features grow by as much.
MOST_DECAY = 40.0
BLOCK = 32  # queries that see one stretch of near keys

flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # tells the log-sum-exp


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    xq: Tensor,
    weight: Tensor,
    gq: Tensor | None,
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
    out: Tensor | None = None,
) -> tuple[Tensor, FarState] | None:
    """`chunked` for a piece of a prompt, without gradients.

    Arguments are those of `chunked`, but for this: k, v and mask are of w + L keys, w of them before the first query
    (those that don't exist are masked), and what belongs to the far part (fk, gk and decays) of the first L of these
    alone. The logarithm of e^gq fq is [xq, 1, gq] times weight [H, E + 2, F], for xq [B, H, L, E] and gq [B, H, L] or
    None for 0; fk and gk need only be right in e^gk fk. L is at most chunk_size, or a multiple of it.

    Returns the output [B, H, L, V] (accumulation dtype; ``out`` if given) and the state after the first L keys, or None
    where the scales of keys span too much for this form.
    """
    queries, kv_heads = q.shape[2], k.shape[1]
    if state is None:
        state = FarState.empty(q.shape[0], kv_heads, fk.shape[-1], v.shape[-1], v)
    if log_decay is not None:
        log_decay = per_key(log_decay, gk)
    mask = None if mask is None else mask.bool()
    if out is None:
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=state.s.dtype)
    weight = weight.expand(q.shape[0], -1, -1, -1).flatten(0, 1)

    options: dict[str, Any] = {"scaling": scaling, "window": window, "softcap": softcap, "sink": sink}
    piece = Piece(out, q, xq, gq, fk, gk, log_decay, feature_decay, k, v, mask)
    whole = _attend(piece, weight, state, min(chunk_size, queries), **options)
    if whole is not None or queries <= chunk_size:
        return None if whole is None else (out, whole)
    for start in range(0, queries, chunk_size):
        done = _attend(piece.part(start, chunk_size, window), weight, state, chunk_size, **options)
        if done is None:
            return None
        state = done
    return out, state


class Piece(NamedTuple):
    """What `prefill` gets, and writes to: of L queries, of as many keys, and of w + L keys."""

    out: Tensor
    q: Tensor
    xq: Tensor
    gq: Tensor | None
    fk: Tensor
    gk: Tensor
    log_decay: Tensor | None  # of each key
    feature_decay: Tensor | None
    k: Tensor
    v: Tensor
    mask: Tensor | None

    def part(self, start: int, count: int, window: int) -> "Piece":
        """For ``count`` of the queries."""
        seen = slice(start, start + count + window)
        of_both: Any = {
            name: None if x is None else x.narrow(2, start, count)
            for name, x in zip(self._fields[:8], self[:8], strict=True)
        }
        return self._replace(
            **of_both,
            k=self.k[:, :, seen],
            v=self.v[:, :, seen],
            mask=None if self.mask is None else self.mask[:, seen],
        )


def _attend(
    piece: Piece,
    weight: Tensor,
    state: FarState,
    size: int,
    *,
    scaling: float,
    window: int,
    softcap: float | None,
    sink: Tensor | None,
) -> FarState | None:
    """`prefill` with one scale and chunks of one size. weight: [B · H, E + 2, F]."""
    out, q, xq, gq, fk, gk, log_decay, feature_decay, k, v, mask = piece
    batch, heads, queries, _ = q.shape
    kv_heads = k.shape[1]
    repeats, chunks = heads // kv_heads, queries // size

    def of_state(x: Tensor) -> Tensor:
        """A head's row, [B, G, …], beside others, [B · G, …]."""
        return x.flatten(0, 1)

    (s, m), fk, gk = map(of_state, state), of_state(fk), of_state(gk.to(state.s.dtype))
    log_decay, feature_decay = (None if x is None else of_state(x) for x in (log_decay, feature_decay))
    absorbed = None if mask is None else mask[:, :queries].repeat_interleave(kv_heads, 0)
    if absorbed is not None:
        log_decay = None if log_decay is None else log_decay * absorbed
        feature_decay = None if feature_decay is None else feature_decay * absorbed[..., None]
        gk = gk.masked_fill(~absorbed, FLOOR)

    # Scales: key j weighs e^{l_i + h_j − Λ_i} for query i, Λ what the state has decayed by since the piece began.
    lam = torch.zeros_like(gk) if log_decay is None else log_decay.cumsum(1).neg_()
    lost = None if feature_decay is None else _lost(feature_decay)  # by each feature alone
    if lam[:, -1].amax() > MOST_DECAY or (lost is not None and lost[:, -1].amax() > MOST_DECAY):
        return None
    h = gk + lam
    top = torch.maximum(m, h.amax(1))
    of_key = (h - top[:, None]).exp_()
    if absorbed is not None:
        of_key *= absorbed
    s = s * (m - top).exp()[:, None, None]
    v_far = torch.empty(*of_key.shape, v.shape[-1] + 1, dtype=s.dtype)  # the last column sums the denominator
    torch.mul(of_state(v[:, :, :queries]), of_key[..., None], out=v_far[..., :-1])
    v_far[..., -1] = of_key

    near, scale = None, (top[:, None] - lam).view(batch, kv_heads, 1, queries)
    scale = scale.expand(-1, -1, repeats, -1).reshape(batch, heads, queries)
    if gq is not None:
        scale = scale + gq
    if window > 0:
        near, lse = near_part(q, k, v, scaling, window, softcap, mask, BLOCK if size % BLOCK == 0 else size)
        if sink is not None:
            total = torch.logaddexp(lse, sink.to(lse.dtype)[:, None])
            near, lse = near.mul_((lse - total).exp_()[..., None]), total
        scale = scale - lse

    # Features: a query's shrink by what each has lost so far, a key's grow.
    kept = None
    if lost is not None:
        grown = lost.exp()
        kept = grown[:, -1, :, None].reciprocal()
        fk = grown.mul_(fk)
    one = scale.new_ones(()).expand(*scale.shape, 1)
    rows = torch.cat([xq.to(scale.dtype), one, scale[..., None]], -1).flatten(0, 1)
    if lost is not None and repeats == 1:
        lq = lost.baddbmm_(rows, weight, beta=-1)
    else:
        lq = rows @ weight
        if lost is not None:
            lq.unflatten(0, (-1, repeats)).sub_(lost[:, None])
    if window == 0:
        lq -= lq.amax(-1, keepdim=True)
    fq = lq.exp_().unflatten(0, (-1, repeats)).unflatten(2, (chunks, size)).transpose(1, 2)
    fq = fq.reshape(-1, repeats * size, lq.shape[-1])  # [B · G · L / C, R · C, F]

    # All chunks at once but for the state, which each finds as the one before leaves it.
    fk, v_far = (x.reshape(-1, size, x.shape[-1]) for x in (fk, v_far))  # [B · G · L / C, C, …]
    read = (fq @ fk.mT).mul_(_lower(size, repeats, fk.dtype)) @ v_far
    added = (fk.mT @ v_far).unflatten(0, (-1, chunks)).flatten(2)  # [B · G, L / C, F · (V + 1)]
    states = torch.baddbmm(s.flatten(1)[:, None], _before(chunks, s.dtype).expand(s.shape[0], -1, -1), added)
    s = (states[:, -1] + added[:, -1]).unflatten(1, s.shape[1:])
    read.baddbmm_(fq, states.view(-1, *s.shape[1:]))
    read = read.unflatten(0, (batch, kv_heads, chunks)).unflatten(3, (repeats, size)).transpose(2, 3)
    read = read.reshape(batch, heads, queries, -1)
    of_far, total = read[..., :-1], read[..., -1:]
    if near is not None:
        of_far, total = near.add_(of_far), total + 1
    least, most = total.aminmax()
    if not (least >= LEAST_TOTAL and most <= MOST_TOTAL):
        return None
    torch.div(of_far, total, out=out)
    if kept is not None:
        s = s * kept
    shape = (batch, kv_heads)
    return rescaled(s.unflatten(0, shape), top.view(shape), lam[:, -1].view(shape))


def near_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    window: int,
    softcap: float | None,
    mask: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Softmax over each query's last w keys: [B, H, L, V] and the log-sum-exp [B, H, L], which is 0 for padding.

    k, v and mask have w keys before the first query. Torch's own kernel does it where it can.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, blocks = k.shape[1], queries // block
    repeats = heads // kv_heads
    q, k, v = accumulated(q), accumulated(k), accumulated(v)

    def stretches(x: Tensor) -> Tensor:
        """[B, G, w + L, D] → [B · blocks, G, W, D], without a copy for a single row."""
        return x.unfold(2, window + block, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    rows = q.view(batch, kv_heads, repeats, blocks, block, dim).permute(0, 3, 1, 2, 4, 5)
    rows = rows.reshape(batch * blocks, kv_heads, repeats * block, dim)
    band = _band(block, window, repeats, q.dtype)
    if mask is not None:
        seen = mask.unfold(1, window + block, block).flatten(0, 1)[:, None, None]
        band = torch.where(seen, band, torch.finfo(q.dtype).min)
    if flash is not None and softcap is None and v.shape[-1] == dim:
        out, lse = flash(rows, stretches(k), stretches(v), attn_mask=band, scale=scaling)
    else:
        scores = (rows @ stretches(k).mT) * scaling
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        weights, lse = softmax_with_lse(scores.add_(band))
        out = weights @ stretches(v)

    def of_heads(x: Tensor) -> Tensor:
        return (
            x.reshape(batch, blocks, kv_heads, repeats, block, -1).permute(0, 2, 3, 1, 4, 5).reshape(*q.shape[:3], -1)
        )

    out, lse = of_heads(out), of_heads(lse)[..., 0]
    return out, lse if mask is None else lse.masked_fill(~mask[:, None, window:], 0.0)


def _lost(decay: Tensor) -> Tensor:
    """−decay.cumsum(1) of [A, L, F], as products with blocks of few numbers: several times as fast."""
    block = math.gcd(decay.shape[1], 16)
    sums = -_lower(block, 1, decay.dtype) @ decay.unflatten(1, (-1, block))  # [A, L / block, block, F]
    before = _before(sums.shape[1], decay.dtype) @ sums[:, :, -1]
    return sums.add_(before[:, :, None]).flatten(1, 2)


@functools.lru_cache(maxsize=8)
def _lower(size: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """1 where one of R · C queries sees one of C keys of its chunk, else 0."""
    return torch.ones(size, size, dtype=dtype).tril_().repeat(repeats, 1)


@functools.lru_cache(maxsize=8)
def _before(size: int, dtype: torch.dtype) -> Tensor:
    """1 for those before: [size, size]."""
    return torch.ones(size, size, dtype=dtype).tril_(-1)


@functools.lru_cache(maxsize=8)
def _band(block: int, window: int, repeats: int, dtype: torch.dtype) -> Tensor:
    """0 where one of R · block queries sees one of the W keys, else the lowest number: [1, 1, R · block, W]."""
    i, j = torch.arange(block)[:, None], torch.arange(window + block)
    hidden = (j <= i) | (j > i + window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min).repeat(1, 1, repeats, 1)
