"""Exact attention over a window in Triton, with its log-sum-exp and the gradients of both: for training.

Flash attention's log-sum-exp has no gradient, and merging needs one. Weights are computed anew in the backward pass, so
that only outputs and log-sum-exps are kept. With s = q·k and p = e^{s − lse}: ∂s = p (∂o·v − o·∂o + ∂lse).

Shape legend: B batch, H query heads, G key/value heads, N queries, K keys, D head_dim, V value head_dim, C block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear_attention import FLOOR

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("near_kernels needs triton: ask accelerated.triton_available before importing it") from error

from .chunk_kernels import chunk_size, padded, precision

LOWEST = tl.constexpr(FLOOR)


def near_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int, softcap: float | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output [B, H, N, V] and the log-sum-exp [B, H, N] in float32; arguments as in `linear_attention.chunked`."""
    return _NearAttention.apply(q, k, v, scaling, window, softcap, mask)


class _NearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int,
        softcap: float | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        mask = None if mask is None else mask.to(torch.int8).contiguous()
        batch, heads, queries, _ = q.shape
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32)
        lse = q.new_empty(*q.shape[:3], dtype=torch.float32)
        ctx.options = _options(q, k, v, scaling, window, softcap)
        with torch.cuda.device_of(q):
            near_forward[triton.cdiv(queries, ctx.options["BLOCK"]), heads, batch](
                q, k, v, mask, out, lse, **ctx.options
            )
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor, of_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, out, lse = ctx.saved_tensors
        of_out = of_out.contiguous()
        shift = (out * of_out).sum(-1) - of_lse  # what ∂s has in common for all keys of a query
        of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (q, k, v, mask, lse, of_out, shift)
        for kernel, rows, results in ((near_backward_q, q, (of_q,)), (near_backward_kv, k, (of_k, of_v))):
            batch, heads, length, _ = rows.shape
            with torch.cuda.device_of(q):
                kernel[triton.cdiv(length, ctx.options["BLOCK"]), heads, batch](*given, *results, **ctx.options)
        return of_q, of_k, of_v, None, None, None, None


def _options(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int, softcap: float | None) -> dict[str, Any]:
    return {
        "scaling": scaling, "softcap": softcap, "queries": q.shape[2], "keys": k.shape[2], "heads": q.shape[1],
        "kv_heads": k.shape[1], "WINDOW": window, "DIM": q.shape[3], "VALUES": v.shape[3], "PRECISION": precision(v),
        "BLOCK": chunk_size(v.dtype) if max(q.shape[3], v.shape[3]) <= 64 else 32, "BLOCK_D": padded(q.shape[3]),
        "BLOCK_V": padded(v.shape[3]), "num_warps": 8 if v.dtype == torch.float32 else 4, "num_stages": 1,
    }  # fmt: skip


@triton.jit
def _rows(x, row, length, at, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[row, at] of x [rows, length, size], zeros where that is outside."""
    i = tl.arange(0, SIZE)
    inside = ((at >= 0) & (at < length))[:, None] & (i < size)[None, :]
    return tl.load(x + (row * length + at[:, None]) * size + i[None, :], mask=inside, other=0.0)


@triton.jit
def _put_rows(x, row, length, at, size, values, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    inside = ((at >= 0) & (at < length))[:, None] & (i < size)[None, :]
    tl.store(x + (row * length + at[:, None]) * size + i[None, :], values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _logits(q, k, scaling, softcap, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    if softcap is not None:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
    return logits


@triton.jit
def _seen(of_query, of_key, mask, row_b, keys, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which keys [C] the queries at key indices ``of_query`` [C] see."""
    live = (of_key >= 0) & (of_key < keys)
    if mask is not None:
        live = live & (tl.load(mask + row_b * keys + of_key, mask=live, other=0) != 0)
    distance = of_query[:, None] - of_key[None, :]
    return (distance >= 0) & (distance < WINDOW) & live[None, :] & (of_query < keys)[:, None]


@triton.jit
def near_forward(  # type: ignore[no-untyped-def]
    q, k, v, mask, out, lse, scaling, softcap, queries, keys, heads, kv_heads,
    WINDOW: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row_h, row_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, row_k = row_b * heads + row_h, row_b * kv_heads + row_h * kv_heads // heads
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    past = keys - queries
    q_c = _rows(q, row, queries, at, DIM, BLOCK_D)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    lowest = past + tl.program_id(0) * BLOCK - WINDOW + 1 + tl.arange(0, BLOCK).to(tl.int64)
    for block in range(0, BLOCK + WINDOW - 1, BLOCK):
        of_key = lowest + block
        logits = _logits(q_c, _rows(k, row_k, keys, of_key, DIM, BLOCK_D), scaling, softcap, PRECISION)
        seen = _seen(past + at, of_key, mask, row_b, keys, WINDOW)
        logits = tl.where(seen, logits, LOWEST)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(seen, tl.exp(logits - new_peak[:, None]), 0.0)
        shrunk = tl.exp(peak - new_peak)
        values = _rows(v, row_k, keys, of_key, VALUES, BLOCK_V)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrunk[:, None], input_precision=PRECISION)
        total, peak = total * shrunk + tl.sum(weights, 1), new_peak
    total = tl.maximum(total, 1.1754944e-38)  # of padding
    _put_rows(out, row, queries, at, VALUES, sums / total[:, None], BLOCK_V)
    tl.store(lse + row * queries + at, peak + tl.log(total), mask=at < queries)


@triton.jit
def _weights_and_gradient(  # type: ignore[no-untyped-def]
    q_c, k_c, v_c, of_out_c, lse_c, shift_c, seen, scaling, softcap, PRECISION: tl.constexpr
):
    """p and ∂s, both [queries, keys]; ∂s is that of q·k before scaling."""
    logits = _logits(q_c, k_c, scaling, softcap, PRECISION)
    weights = tl.where(seen, tl.exp(tl.where(seen, logits, LOWEST) - lse_c[:, None]), 0.0)
    of_weights = tl.dot(of_out_c, tl.trans(v_c.to(tl.float32)), input_precision=PRECISION)
    of_logits = weights * (of_weights - shift_c[:, None]) * scaling
    if softcap is not None:
        of_logits *= 1 - (logits / softcap) * (logits / softcap)
    return weights, of_logits


@triton.jit
def near_backward_q(  # type: ignore[no-untyped-def]
    q, k, v, mask, lse, of_out, shift, of_q, scaling, softcap, queries, keys, heads, kv_heads,
    WINDOW: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row_h, row_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, row_k = row_b * heads + row_h, row_b * kv_heads + row_h * kv_heads // heads
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    past = keys - queries
    q_c, of_out_c = _rows(q, row, queries, at, DIM, BLOCK_D), _rows(of_out, row, queries, at, VALUES, BLOCK_V)
    lse_c = tl.load(lse + row * queries + at, mask=at < queries, other=0.0)
    shift_c = tl.load(shift + row * queries + at, mask=at < queries, other=0.0)
    of_q_c = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    lowest = past + tl.program_id(0) * BLOCK - WINDOW + 1 + tl.arange(0, BLOCK).to(tl.int64)
    for block in range(0, BLOCK + WINDOW - 1, BLOCK):
        of_key = lowest + block
        k_c, v_c = _rows(k, row_k, keys, of_key, DIM, BLOCK_D), _rows(v, row_k, keys, of_key, VALUES, BLOCK_V)
        seen = _seen(past + at, of_key, mask, row_b, keys, WINDOW)
        _, of_logits = _weights_and_gradient(
            q_c, k_c, v_c, of_out_c, lse_c, shift_c, seen, scaling, softcap, PRECISION
        )  # fmt: skip
        of_q_c = tl.dot(of_logits, k_c.to(tl.float32), of_q_c, input_precision=PRECISION)
    _put_rows(of_q, row, queries, at, DIM, of_q_c, BLOCK_D)


@triton.jit
def near_backward_kv(  # type: ignore[no-untyped-def]
    q, k, v, mask, lse, of_out, shift, of_k, of_v, scaling, softcap, queries, keys, heads, kv_heads,
    WINDOW: tl.constexpr, DIM: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Of one block of keys, from all query heads that share them."""
    row_g, row_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row_k = row_b * kv_heads + row_g
    of_key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    past = keys - queries
    k_c, v_c = _rows(k, row_k, keys, of_key, DIM, BLOCK_D), _rows(v, row_k, keys, of_key, VALUES, BLOCK_V)
    of_k_c = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    of_v_c = tl.zeros([BLOCK, BLOCK_V], tl.float32)
    for r in range(heads // kv_heads):
        row = row_b * heads + row_g * (heads // kv_heads) + r
        for block in range(0, BLOCK + WINDOW - 1, BLOCK):
            at = of_key - past + block
            is_query = (at >= 0) & (at < queries)
            q_c, of_out_c = _rows(q, row, queries, at, DIM, BLOCK_D), _rows(of_out, row, queries, at, VALUES, BLOCK_V)
            lse_c = tl.load(lse + row * queries + at, mask=is_query, other=0.0)
            shift_c = tl.load(shift + row * queries + at, mask=is_query, other=0.0)
            seen = _seen(past + at, of_key, mask, row_b, keys, WINDOW) & is_query[:, None]
            weights, of_logits = _weights_and_gradient(
                q_c, k_c, v_c, of_out_c, lse_c, shift_c, seen, scaling, softcap, PRECISION
            )  # fmt: skip
            of_k_c = tl.dot(tl.trans(of_logits), q_c.to(tl.float32), of_k_c, input_precision=PRECISION)
            of_v_c = tl.dot(tl.trans(weights), of_out_c, of_v_c, input_precision=PRECISION)
    _put_rows(of_k, row_k, keys, of_key, DIM, of_k_c, BLOCK_D)
    _put_rows(of_v, row_k, keys, of_key, VALUES, of_v_c, BLOCK_V)
