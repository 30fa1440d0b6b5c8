"""The feature map in one Triton kernel, without gradients: torch makes a dozen passes over float32 features for it.

What is multiplied ends in exponents: TF32 alone would be too coarse, so each product is three of them (tf32x3), as
exact as float32.

Shape legend: B batch, H heads, N tokens, D head_dim, F features (2·D, or D if not signed).
"""

import torch
from torch import Tensor

from .linear_attention import FLOOR

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("feature_kernels needs triton: ask accelerated.triton_available before importing it") from error

from .chunk_kernels import padded

LOWEST = tl.constexpr(FLOOR)


def feature_map(
    x: Tensor, matrix: Tensor, bias: Tensor | None, norm_weight: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor]:
    """softmax(x Mᵀ + D) [B, H, N, F] and its log-scale less a‖x‖² [B, H, N], both in float32.

    x [B, H, N, D], matrix M [H, F, D], its second half the negative of the first if signed, bias D [H, F] or None for
    0, norm_weight a [H] or None, and then the log-scale is 0.
    """
    batch, heads, length, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    features = x.new_empty(batch, heads, length, 2 * dim if signed else dim, dtype=torch.float32)
    scale = (x.new_zeros if norm_weight is None else x.new_empty)(batch, heads, length, dtype=torch.float32)
    rows = 64 if dim <= 128 else 32
    with torch.cuda.device_of(x):
        map_features[triton.cdiv(length, rows), heads, batch](
            x, matrix.contiguous(), bias, norm_weight, features, scale, length, heads,
            x.stride(0), x.stride(1), x.stride(2),
            DIM=dim, SIGNED=signed, ROWS=rows, BLOCK_D=padded(dim), BLOCK_I=min(padded(dim), 32),
            num_warps=4 if dim <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return features, scale


@triton.jit
def map_features(  # type: ignore[no-untyped-def]
    x, matrix, bias, norm_weight, features, scale, length, heads, x_b, x_h, x_t,
    DIM: tl.constexpr, SIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 2 * DIM if SIGNED else DIM
    row_h, row_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    is_token, at_d = at < length, d < DIM
    y = tl.zeros([ROWS, BLOCK_D], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for block in range(0, DIM, BLOCK_I):
        i = block + tl.arange(0, BLOCK_I)
        at_x = row_b * x_b + row_h * x_h + at[:, None] * x_t + i[None, :]
        x_c = tl.load(x + at_x, mask=is_token[:, None] & (i < DIM)[None, :], other=0.0).to(tl.float32)
        at_m = (row_h * COUNT + d[:, None]) * DIM + i[None, :]
        m_c = tl.load(matrix + at_m, mask=at_d[:, None] & (i < DIM)[None, :], other=0.0)
        y = tl.dot(x_c, tl.trans(m_c), y, input_precision="tf32x3")
        norm += tl.sum(x_c * x_c, 1)
    of_bias = row_h * COUNT + d
    plus = y
    if bias is not None:
        plus += tl.load(bias + of_bias, mask=at_d, other=0.0)[None, :]
    plus = tl.where(at_d[None, :], plus, LOWEST)
    peak = tl.max(plus, 1)
    at_f = ((row_b * heads + row_h) * length + at[:, None]) * COUNT + d[None, :]
    seen = is_token[:, None] & at_d[None, :]
    if SIGNED:
        minus = -y
        if bias is not None:
            minus += tl.load(bias + of_bias + DIM, mask=at_d, other=0.0)[None, :]
        minus = tl.where(at_d[None, :], minus, LOWEST)
        peak = tl.maximum(peak, tl.max(minus, 1))
        plus, minus = tl.exp(plus - peak[:, None]), tl.exp(minus - peak[:, None])
        total = tl.sum(plus, 1) + tl.sum(minus, 1)
        tl.store(features + at_f + DIM, minus / total[:, None], mask=seen)
    else:
        plus = tl.exp(plus - peak[:, None])
        total = tl.sum(plus, 1)
    tl.store(features + at_f, plus / total[:, None], mask=seen)
    if norm_weight is not None:
        log_scale = peak + tl.log(total / COUNT) - norm * tl.load(norm_weight + row_h)
        tl.store(scale + (row_b * heads + row_h) * length + at, log_scale, mask=is_token)
