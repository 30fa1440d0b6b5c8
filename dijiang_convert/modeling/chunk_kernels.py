"""Prefill in two Triton kernels: what `chunked` computes, without gradients and without intermediate tensors.

The first goes along the keys, chunk by chunk, and writes the far state that each chunk starts from. The second has one
program a chunk and query head: near keys by a running softmax as flash attention has it, far keys of the chunk by
their features, all earlier ones by the state, and all three under one denominator. It writes the output alone.

Keys are delayed by the window, as in `chunked`: place n of the far part is that of query n and key past + n − window.
Products are of the inputs' own precision: exact float32 for float32 models, TF32 (10 bits, float32 sums) for half
precision ones, whose values have no more; bfloat16 would be too coarse for features, whose exponents are inside.

Shape legend: B batch, H query heads, G key/value heads, N queries, K keys, D head_dim, V value head_dim, F features,
C chunk.
"""

from typing import Any

import torch
from torch import Tensor

from .linear_attention import FLOOR, FarState, absorb

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("chunk_kernels needs triton: ask accelerated.triton_available before importing it") from error

LOWEST = tl.constexpr(FLOOR)


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
) -> tuple[Tensor, FarState]:
    """Arguments as in `chunked`, causal and normalised.

    Returns the output [B, H, N, V] in v's dtype, and the far state after all keys but the last ``window``.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    features, first = fk.shape[-1], keys - queries - window
    if state is None:
        state = FarState.empty(batch, kv_heads, features, value_dim, v)
    if log_decay is not None:
        log_decay = (log_decay[:, None] if log_decay.dim() == 1 else log_decay).expand(batch, kv_heads, keys)
    if first > 0:  # before the first delayed key
        before = slice(0, first)
        state = absorb(
            state, fk[:, :, before], gk[:, :, before], v[:, :, before],
            None if log_decay is None else log_decay[..., before],
            None if feature_decay is None else feature_decay[:, :, before],
            None if mask is None else mask.bool()[:, before],
        )  # fmt: skip
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    fq, gq, fk, gk = (x.contiguous() for x in (fq, gq, fk, gk))
    feature_decay = None if feature_decay is None else feature_decay.contiguous()
    mask = None if mask is None else mask.to(torch.int8).contiguous()

    chunk = chunk_size(v.dtype)
    chunks = triton.cdiv(queries, chunk)
    last = FarState(torch.empty_like(state.s, memory_format=torch.contiguous_format), torch.empty_like(state.m))
    starts = fk.new_empty(batch, kv_heads, chunks, features, value_dim, dtype=torch.float32)
    start_z = fk.new_empty(batch, kv_heads, chunks, features, dtype=torch.float32)
    start_m = fk.new_empty(batch, kv_heads, chunks, dtype=torch.float32)
    out = v.new_empty(batch, queries, heads, value_dim).transpose(1, 2)  # as the model goes on with it
    far: dict[str, Any] = {
        "fk": fk, "gk": gk, "lam": log_decay, "delta": feature_decay, "v": v, "valid": mask, "starts": starts,
        "start_z": start_z, "start_m": start_m, "queries": queries, "keys": keys, "first": first,
        "lam_b": 0 if log_decay is None else log_decay.stride(0),
        "lam_g": 0 if log_decay is None else log_decay.stride(1),
        "lam_t": 0 if log_decay is None else log_decay.stride(2),
        "v_b": v.stride(0), "v_g": v.stride(1), "v_t": v.stride(2),
        "FEATURES": features, "VALUES": value_dim, "CHUNK": chunk,
        "PRECISION": precision(v),
    }  # fmt: skip
    block_f, block_v = min(padded(features), 32), min(padded(value_dim), 64)
    with torch.cuda.device_of(q):  # where kernels start: a model may be spread over several
        along_chunks[triton.cdiv(features, block_f), triton.cdiv(value_dim, block_v), batch * kv_heads](
            **far, s=state.s.contiguous(), m=state.m.contiguous(), last_s=last.s, last_m=last.m,
            kv_heads=kv_heads, chunks=chunks, BLOCK_F=block_f, BLOCK_V=block_v, num_stages=2,
        )  # fmt: skip
        attend_chunk[chunks, heads, batch](
            **far, q=q, k=k, fq=fq, gq=gq, sink=sink, out=out, scaling=scaling, softcap=softcap,
            q_b=q.stride(0), q_h=q.stride(1), q_t=q.stride(2), k_b=k.stride(0), k_g=k.stride(1), k_t=k.stride(2),
            heads=heads, kv_heads=kv_heads, past=keys - queries, WINDOW=window, DIM=dim,
            BLOCK_D=padded(dim), BLOCK_V=padded(value_dim), BLOCK_F=16 if v.dtype == torch.float32 else 32,
            BLOCK_K=chunk if max(dim, value_dim) <= 64 else 32,
            num_warps=4 if padded(value_dim) <= 64 and v.dtype != torch.float32 else 8, num_stages=2,
        )  # fmt: skip
    return out, last


def chunk_size(dtype: torch.dtype) -> int:
    """Products of float32 go without tensor cores and need more registers. (Features that decay by FASTEST over a
    whole chunk stay within e^32.)"""
    return 32 if dtype == torch.float32 else 64


def precision(x: Tensor) -> str:
    """How products take float32 factors: as they are for a float32 model, else with 10 bits of their own."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def padded(size: int) -> int:
    """The smallest power of two from 16, the least that a matrix product takes."""
    return max(triton.next_power_of_2(size), 16)


@triton.jit
def _key_scales(gk, lam, valid, row, row_b, row_g, lam_b, lam_g, lam_t, at, inside, keys):  # type: ignore[no-untyped-def]
    """(h [C], Λ [C], total, valid [C]) of keys ``at``: the weight of key j at place i is e^{h_j − Λ_i}."""
    if valid is not None:
        inside = inside & (tl.load(valid + row_b * keys + at, mask=inside, other=0) != 0)
    g = tl.load(gk + row * keys + at, mask=inside, other=0.0).to(tl.float32)
    lost = tl.zeros_like(g)
    if lam is not None:
        lost -= tl.load(lam + row_b * lam_b + row_g * lam_g + at * lam_t, mask=inside, other=0.0).to(tl.float32)
    lost_n = tl.cumsum(lost, 0)
    return tl.where(inside, g + lost_n, LOWEST), lost_n, tl.sum(lost, 0), inside


@triton.jit
def along_chunks(  # type: ignore[no-untyped-def]
    fk, gk, lam, delta, v, valid, starts, start_z, start_m, s, m, last_s, last_m,
    queries, keys, first, lam_b, lam_g, lam_t, v_b, v_g, v_t, kv_heads, chunks,
    FEATURES: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The far state that each chunk starts from, and the one after all: a block of features by one of values."""
    row = tl.program_id(2).to(tl.int64)  # b · G + g
    row_b, row_g = row // kv_heads, row % kv_heads
    c = tl.arange(0, CHUNK)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    of_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at_f, at_v = f < FEATURES, of_v < VALUES
    at_fv = at_f[:, None] & at_v[None, :]
    state_at = row * FEATURES * (VALUES + 1) + f * (VALUES + 1)
    total_s = tl.load(s + state_at[:, None] + of_v[None, :], mask=at_fv, other=0.0)
    total_z = tl.load(s + state_at + VALUES, mask=at_f, other=0.0)
    top = tl.load(m + row)
    for n in range(chunks):
        before = row * chunks + n
        tl.store(starts + (before * FEATURES + f[:, None]) * VALUES + of_v[None, :], total_s, mask=at_fv)
        if tl.program_id(1) == 0:
            tl.store(start_z + before * FEATURES + f, total_z, mask=at_f)
            if tl.program_id(0) == 0:
                tl.store(start_m + before, top)
        place = n * CHUNK + c.to(tl.int64)
        at = first + place
        inside = (place < queries) & (at >= 0) & (at < keys)
        h, _, total, live = _key_scales(
            gk, lam, valid, row, row_b, row_g, lam_b, lam_g, lam_t, at, inside, keys
        )  # fmt: skip
        new_top = tl.maximum(top - total, tl.max(h, 0) - total)
        # The difference first: it is exact, so what rounding takes from the top ends up in the gate.
        gate = tl.exp((top - new_top) - total)
        weight = tl.where(live, tl.exp((h - total) - new_top), 0.0)
        at_cf = live[:, None] & at_f[None, :]
        of_k = (row * keys + at[:, None]) * FEATURES + f[None, :]
        features = tl.load(fk + of_k, mask=at_cf, other=0.0).to(tl.float32)
        if delta is not None:  # a feature decays by what the chunk loses after its key
            lost = -tl.load(delta + of_k, mask=at_cf, other=0.0).to(tl.float32)
            all_lost = tl.sum(lost, 0)
            features *= tl.exp(tl.cumsum(lost, 0) - all_lost[None, :])
            kept = tl.exp(-all_lost)
            total_s, total_z = total_s * kept[:, None], total_z * kept
        features *= weight[:, None]
        values = tl.load(
            v + row_b * v_b + row_g * v_g + at[:, None] * v_t + of_v[None, :],
            mask=live[:, None] & at_v[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total_s = total_s * gate + tl.dot(tl.trans(features), values, input_precision=PRECISION)
        total_z = total_z * gate + tl.sum(features, 0)
        top = new_top
    tl.store(last_s + state_at[:, None] + of_v[None, :], total_s, mask=at_fv)
    if tl.program_id(1) == 0:
        tl.store(last_s + state_at + VALUES, total_z, mask=at_f)
        if tl.program_id(0) == 0:
            tl.store(last_m + row, top)


@triton.jit
def attend_chunk(  # type: ignore[no-untyped-def]
    q, k, v, fq, gq, fk, gk, lam, delta, valid, sink, starts, start_z, start_m, out, scaling, softcap,
    queries, keys, first, past, lam_b, lam_g, lam_t, q_b, q_h, q_t, k_b, k_g, k_t, v_b, v_g, v_t, heads, kv_heads,
    FEATURES: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of one chunk of queries of one head."""
    n, row_h, row_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row_g = row_h * kv_heads // heads
    row, row_q = row_b * kv_heads + row_g, row_b * heads + row_h
    c, of_v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_V)
    place = n * CHUNK + c.to(tl.int64)
    is_query, at_v = place < queries, of_v < VALUES
    v += row_b * v_b + row_g * v_g

    # Far: Σ φ(q)·φ(k) e^{h − Λ} (v, 1), at the scale of a running maximum.
    at = first + place
    h, lost_n, _, live = _key_scales(
        gk, lam, valid, row, row_b, row_g, lam_b, lam_g, lam_t, at,
        is_query & (at >= 0) & (at < keys), keys,
    )  # fmt: skip
    visible = (c[:, None] >= c[None, :]) & live[None, :]
    before = tl.load(start_m + row * tl.num_programs(0) + n)
    top = tl.maximum(tl.max(tl.where(visible, h[None, :], LOWEST), 1), before)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    far = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    far_total = tl.zeros([CHUNK], tl.float32)
    first_state = row * tl.num_programs(0) + n
    for block in range(0, FEATURES, BLOCK_F):
        f = block + tl.arange(0, BLOCK_F)
        at_f = f < FEATURES
        of_q = (row_q * queries + place[:, None]) * FEATURES + f[None, :]
        of_k = (row * keys + at[:, None]) * FEATURES + f[None, :]
        at_cf = live[:, None] & at_f[None, :]
        features_q = tl.load(fq + of_q, mask=is_query[:, None] & at_f[None, :], other=0.0).to(tl.float32)
        features_k = tl.load(fk + of_k, mask=at_cf, other=0.0).to(tl.float32)
        if delta is not None:  # a key's features grow by what the chunk has lost before it, a query's shrink
            lost = tl.cumsum(-tl.load(delta + of_k, mask=at_cf, other=0.0).to(tl.float32), 0)
            features_q, features_k = features_q * tl.exp(-lost), features_k * tl.exp(lost)
        of_state = (first_state * FEATURES + f[:, None]) * VALUES + of_v[None, :]
        start = tl.load(starts + of_state, mask=at_f[:, None] & at_v[None, :], other=0.0)
        z = tl.load(start_z + first_state * FEATURES + f, mask=at_f, other=0.0)
        scores = tl.dot(features_q, tl.trans(features_k), scores, input_precision=PRECISION)
        far = tl.dot(features_q, start, far, input_precision=PRECISION)
        far_total += tl.sum(features_q * z[None, :], 1)
    carry = tl.exp(before - top)
    scores = tl.where(visible, scores * tl.exp(tl.minimum(h[None, :] - top[:, None], 0.0)), 0.0)
    values = tl.load(v + at[:, None] * v_t + of_v[None, :], mask=live[:, None] & at_v[None, :], other=0.0)
    far = far * carry[:, None] + tl.dot(scores, values.to(tl.float32), input_precision=PRECISION)
    far_total = tl.maximum(far_total * carry + tl.sum(scores, 1), 1.1754944e-38)

    if WINDOW == 0:
        far = far / far_total[:, None]
    else:
        far_scale = tl.load(gq + row_q * queries + place, mask=is_query, other=0.0).to(tl.float32) + (top - lost_n)
        # Near: the running softmax starts from the far part, as if that were one key.
        peak = far_scale + tl.log(far_total)
        total = tl.full([CHUNK], 1.0, tl.float32)
        far = far / far_total[:, None]
        d = tl.arange(0, BLOCK_D)
        at_d = d < DIM
        of_q = row_b * q_b + row_h * q_h + place[:, None] * q_t + d[None, :]
        queries_c = tl.load(q + of_q, mask=is_query[:, None] & at_d[None, :], other=0.0)
        lowest = past + n * CHUNK - WINDOW + 1 + tl.arange(0, BLOCK_K).to(tl.int64)
        for block in range(0, CHUNK + WINDOW - 1, BLOCK_K):
            near = lowest + block
            inside = (near >= 0) & (near < keys)
            of_k = row_b * k_b + row_g * k_g + near[:, None] * k_t + d[None, :]
            keys_c = tl.load(k + of_k, mask=inside[:, None] & at_d[None, :], other=0.0)
            of_near = near[:, None] * v_t + of_v[None, :]
            values_c = tl.load(v + of_near, mask=inside[:, None] & at_v[None, :], other=0.0)
            if valid is not None:
                inside = inside & (tl.load(valid + row_b * keys + near, mask=inside, other=0) != 0)
            logits = tl.dot(queries_c, tl.trans(keys_c), input_precision=PRECISION) * scaling
            if softcap is not None:
                logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
            distance = past + place[:, None] - near[None, :]
            seen = (distance >= 0) & (distance < WINDOW) & inside[None, :]
            logits = tl.where(seen, logits, LOWEST)
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            weights = tl.where(seen, tl.exp(logits - new_peak[:, None]), 0.0)
            shrunk = tl.exp(peak - new_peak)
            far = far * shrunk[:, None]
            far = tl.dot(weights.to(values_c.dtype), values_c, far, input_precision=PRECISION)
            total, peak = total * shrunk + tl.sum(weights, 1), new_peak
        if sink is not None:
            logit = tl.load(sink + row_h).to(tl.float32)
            new_peak = tl.maximum(peak, logit)
            shrunk = tl.exp(peak - new_peak)
            far, total = far * shrunk[:, None], total * shrunk + tl.exp(logit - new_peak)
        far = far / total[:, None]
    of_out = ((row_b * queries + place[:, None]) * heads + row_h) * VALUES + of_v[None, :]
    tl.store(out + of_out, far.to(out.dtype.element_ty), mask=is_query[:, None] & at_v[None, :])
