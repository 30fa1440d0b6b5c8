"""One decoded token of a layer in three Triton kernels, in place in a static cache: what `DiJiangAttention` does in
some seventy small operations of torch, each of which costs a launch.

    gates      what the token's hidden state does to its key: numbers that a ring keeps until the key leaves the window
    features   φ and g of the queries and of the key that leaves; the new key takes its place in the ring; m and z
    attend     the state S takes the key in and is read; the window; both merged under one denominator

A kernel ends where others need all it wrote: within one, no program reads what another writes.

Shape legend: B batch, H query heads, G key/value heads, S state heads (G, or H where each query head decays on its
own), W window, D head_dim, V value head_dim, F features, R rank of the code.
"""

import math
import zlib
from typing import Any

import torch
from torch import Tensor

from .accelerated import _is_recent
from .cache import StaticDiJiangCacheLayer
from .linear_attention import FASTEST, FLOOR
from .rotary import Turn

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("decode_kernels needs triton: ask accelerated.triton_available before importing it") from error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 256  # head dimension
DECAYS = ("none", "learned", "retnet")
LOWEST, LARGEST_LOSS = tl.constexpr(FLOOR), tl.constexpr(FASTEST)
# What a checkpoint's code registers must not meet that of another checkpoint.
OPERATOR = f"dijiang::decode_{zlib.crc32(__name__.encode()):08x}"


def decodes(child: Any, q: Tensor) -> bool:
    """Whether `decode` can take one token q [B, H, 1, D] of the layer whose child this is."""
    sizes = (child.layers.head_dim, child.layers.value_dim)
    if not child.kernel.far or q.dtype not in DTYPES or max(sizes) > LARGEST or torch.is_grad_enabled():
        return False
    return not q.is_cuda or _is_recent(q.device)


def decode(
    child: Any, cache: StaticDiJiangCacheLayer, q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor] | None,
    turn: Turn | None, real: Tensor | None, call: Any,
) -> Tensor:  # fmt: skip
    """Attention of one token of each row, which enters the cache.

    Args:
        child, call: a `DiJiangAttention` that `decodes`, and what its caller said.
        q, k, v: [B, H, 1, D], [B, G, 1, D], [B, G, 1, V].
        far: queries and keys of the far part, where they are others; or None.
        turn: `rotation` of the layer, where it is for the kernels to undo; then far is None.
        real: [B, 1], False for padding, or None.

    Returns:
        [B, H, 1, V], in float32 for an output gate, else in v's dtype.
    """
    kernel, recent, state = child.kernel, cache.recent, cache.state
    assert recent is not None and state is not None
    far_q, far_k = (q, k) if far is None else far
    kept = [state.s, state.m, cache.count, recent.k, recent.v, recent.valid]
    kept += [x for x in (recent.far_k, recent.gates, recent.code) if x is not None]
    inputs = [call.hidden_states if kernel.selective or kernel.decay_rank else None, real]
    inputs += [None, None, None] if turn is None else [*call.cos_sin, turn.pairing]
    numbers = [call.scaling, 0.0 if call.softcap is None else call.softcap]
    decay = DECAYS.index(kernel.decay)
    switches = [recent.far_k is not None, kernel.selective, kernel.normalize, kernel.gate]
    parameters = [*_parameters(child), call.sink]
    return _decode(q, k, v, far_q, far_k, inputs, parameters, kept, numbers, decay, switches)


def _parameters(child: Any) -> list[Tensor | None]:
    """In the order in which `_decode` unpacks them; None for what the kernel is without."""
    own = ("frequency", "projection", "bias", "norm_weight")
    found = [child.q_features.dct]
    found += [getattr(of, name, None) for of in (child.q_features, child.k_features) for name in own]
    decay = "log_decay" if child.kernel.decay == "retnet" else "decay"
    names = ("q_offset", "k_strength", decay, "selection", "decay_down", "decay_up", "feature_decay")
    return found + [getattr(child, name, None) for name in names]


# -------------------------------------------------------------------------------------------------------- the launch

Optionals = list[Tensor | None]


def _launch(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, inputs: Optionals, parameters: Optionals,
    kept: list[Tensor], numbers: list[float], decay_kind: int, switches: list[bool],
) -> Tensor:  # fmt: skip
    hidden, real, cos, sin, turn = inputs
    (dct, q_frequency, q_projection, q_bias, q_norm, k_frequency, k_projection, k_bias, k_norm,
     q_offset, k_strength, decay, selection, down, up, feature_decay, sink) = parameters  # fmt: skip
    s, m, count, ring_k, ring_v, ring_valid, *others = kept
    scaling, softcap = numbers
    has_far_keys, has_gates, normalize, gated = switches
    ring_far = others.pop(0) if has_far_keys else None
    ring_gates = others.pop(0) if has_gates else None
    ring_code = others.pop(0) if others else None

    q, k, v, far_q, far_k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, far_q, far_k))
    (batch, heads, _, dim), (kv_heads, value_dim) = q.shape, (v.shape[1], v.shape[3])
    state_heads, features, window = s.shape[1], s.shape[2], ring_k.shape[2]
    rank = 0 if ring_code is None else ring_code.shape[-1]
    selected = 2 * kv_heads if has_gates else 0
    block_d = max(triton.next_power_of_2(dim), 16)
    block_v = min(max(triton.next_power_of_2(value_dim), 16), 32)
    assert k_frequency is not None

    def scratch(*shape: int) -> Tensor:
        return torch.empty(batch, *shape, dtype=torch.float32, device=q.device)

    new = scratch(max(selected + rank, 1))
    if hidden is not None:
        x = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        gates[(batch, triton.cdiv(selected + rank, 4))](
            x, selection, down, new, x.stride(0), x.shape[-1],
            SELECTED=selected, RANK=rank, ROWS=4, BLOCK=min(triton.next_power_of_2(x.shape[-1]), 1024),
        )  # fmt: skip

    fq, gq = scratch(heads, features), scratch(heads)
    keep, add = scratch(state_heads, features), scratch(state_heads, features)
    old_v, place = scratch(kv_heads, value_dim), torch.empty(batch, dtype=torch.int32, device=q.device)
    if real is not None:
        real = real.contiguous().view(torch.uint8)
    is_valid = ring_valid.view(torch.uint8)
    if turn is not None:
        assert cos is not None and sin is not None
        cos, sin = (x.reshape(-1, x.shape[-1]).contiguous() for x in (cos, sin))
    of_rotation = 0 if cos is None or cos.shape[0] == 1 else cos.shape[1]
    sizes: dict[str, Any] = {
        "H": heads, "G": kv_heads, "S": state_heads, "W": window, "D": dim, "V": value_dim, "F": features,
    }  # fmt: skip
    find_features[(batch, heads + kv_heads)](
        k, v, far_q, far_k, cos, sin, turn, real, new, dct,
        q_frequency, q_projection, q_bias, q_norm, k_frequency, k_projection, k_bias, k_norm,
        q_offset, k_strength, decay, up, feature_decay,
        s, m, count, ring_k, ring_v, is_valid, ring_far, ring_gates, ring_code,
        fq, gq, keep, add, old_v, place,
        far_q.stride(0), far_q.stride(1), far_k.stride(0), far_k.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), of_rotation, math.sqrt(scaling), math.log(features),
        **sizes, SELECTED=selected, RANK=rank, ROTARY=0 if turn is None else turn.shape[0],
        DECAY=decay_kind,
        BLOCK_D=block_d, BLOCK_V=max(triton.next_power_of_2(value_dim), 16), BLOCK_C=min(block_d, 32),
        BLOCK_R=max(triton.next_power_of_2(rank), 1), num_warps=4 if block_d <= 128 else 8,
    )  # fmt: skip
    out = torch.empty(batch, heads, 1, value_dim, dtype=torch.float32 if gated else v.dtype, device=q.device)
    block_f = triton.next_power_of_2(features)
    attend[(batch, state_heads, triton.cdiv(value_dim, block_v))](
        q, sink, real, new, s, m, count, ring_k, ring_v, is_valid, ring_code, fq, gq, keep, add, old_v, place, out,
        q.stride(0), q.stride(1), scaling, softcap if softcap > 0 else None,
        **sizes, SELECTED=selected, RANK=rank, NORMALIZE=normalize,
        BLOCK_D=block_d, BLOCK_F=block_f, BLOCK_V=block_v, BLOCK_W=min(max(triton.next_power_of_2(window), 16), 64),
        BLOCK_R=max(triton.next_power_of_2(rank), 1), num_warps=4 if block_f * block_v <= 8192 else 8,
    )  # fmt: skip
    return out


def _launch_there(q: Tensor, *others: Any) -> Tensor:
    """On the GPU that q is on, which need not be the current one."""
    with torch.cuda.device_of(q):
        return _launch(q, *others)


_decode = torch.library.custom_op(
    OPERATOR, _launch_there, mutates_args=("kept",),
    schema="(Tensor q, Tensor k, Tensor v, Tensor far_q, Tensor far_k, Tensor?[] inputs, Tensor?[] parameters, "
    "Tensor(a!)[] kept, float[] numbers, int decay_kind, bool[] switches) -> Tensor",
)  # fmt: skip


@_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, inputs: Optionals, parameters: Optionals,
    kept: list[Tensor], numbers: list[float], decay_kind: int, switches: list[bool],
) -> Tensor:  # fmt: skip
    dtype = torch.float32 if switches[-1] else v.dtype
    return q.new_empty(q.shape[0], q.shape[1], 1, v.shape[3], dtype=dtype)


# ------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def gates(  # type: ignore[no-untyped-def]
    x, selection, down, out, x_b, hidden,
    SELECTED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The products of x / √(mean x²) [B, hidden] with the rows of selection and of decay_down → out [B, SELECTED + R].
    A program is a row of the batch and ROWS of the products."""
    row_b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total, squares = tl.zeros([ROWS], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x_c = tl.load(x + row_b.to(tl.int64) * x_b + c, mask=c < hidden, other=0.0).to(tl.float32)
        weight = tl.zeros([ROWS, BLOCK], tl.float32)
        if SELECTED > 0:
            is_one = (row < SELECTED)[:, None] & (c < hidden)[None, :]
            weight += tl.load(selection + row[:, None] * hidden + c[None, :], mask=is_one, other=0.0).to(tl.float32)
        if RANK > 0:
            is_one = ((row >= SELECTED) & (row < SELECTED + RANK))[:, None] & (c < hidden)[None, :]
            of_down = (row - SELECTED)[:, None] * hidden + c[None, :]
            weight += tl.load(down + of_down, mask=is_one, other=0.0).to(tl.float32)
        total += tl.sum(weight * x_c[None, :], 1)
        squares += x_c * x_c
    total = total / tl.sqrt(tl.sum(squares, 0) / hidden + 1e-6)
    tl.store(out + row_b * (SELECTED + RANK) + row, total, mask=row < SELECTED + RANK)


@triton.jit
def without_rotation(x, c, cos, sin, turn, D: tl.constexpr, ROTARY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers c of the vector at x, turned back where ROTARY > 0, in float32; rounded as a tensor of x's dtype is."""
    x_c = tl.load(x + c, mask=c < D, other=0.0).to(tl.float32)
    if ROTARY > 0:
        inside = c < ROTARY
        pair = tl.load(turn + c, mask=inside, other=1)
        other = tl.load(x + tl.abs(pair) - 1, mask=inside, other=0.0).to(tl.float32)
        cos_0, sin_0 = tl.load(cos).to(tl.float32), tl.load(sin).to(tl.float32)
        length = cos_0 * cos_0 + sin_0 * sin_0
        cos_c = tl.load(cos + c, mask=inside, other=0.0).to(tl.float32) / length
        sin_c = tl.load(sin + c, mask=inside, other=0.0).to(tl.float32) / length
        turned = x_c * cos_c - tl.where(pair > 0, other, -other) * sin_c
        x_c = tl.where(inside, turned, x_c).to(x.dtype.element_ty).to(tl.float32)
    return x_c


@triton.jit
def feature_map(  # type: ignore[no-untyped-def]
    x, cos, sin, turn, frequency, dct, projection, bias, norm_weight, root, log_features,
    D: tl.constexpr, F: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`FeatureMap` of the vector at x: features of y and of −y, each [BLOCK_D], and their log-scale. The parameters
    are those of its head."""
    d = tl.arange(0, BLOCK_D)
    y, squares = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    t = tl.load(frequency + d, mask=d < D, other=0.0).to(tl.float32)
    for start in range(0, D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x_c = without_rotation(x, c, cos, sin, turn, D, ROTARY) * root
        at, inside = d[:, None] * D + c[None, :], (d < D)[:, None] & (c < D)[None, :]
        matrix = t[:, None] * tl.load(dct + at, mask=inside, other=0.0).to(tl.float32)
        if projection is not None:
            matrix += tl.load(projection + at, mask=inside, other=0.0).to(tl.float32)
        y += tl.sum(matrix * x_c[None, :], 1)
        squares += x_c * x_c
    up, down = y, -y
    if bias is not None:
        up += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
        if F > D:
            down += tl.load(bias + D + d, mask=d < D, other=0.0).to(tl.float32)
    up, down = tl.where(d < D, up, float("-inf")), tl.where(d < D, down, float("-inf"))
    if F == D:
        down = tl.full([BLOCK_D], float("-inf"), tl.float32)
    top = tl.maximum(tl.max(up, 0), tl.max(down, 0))
    up, down = tl.exp(up - top), tl.exp(down - top)
    total = tl.sum(up, 0) + tl.sum(down, 0)
    scale = total * 0.0
    if norm_weight is not None:
        scale = top + tl.log(total) - log_features - tl.sum(squares, 0) * tl.load(norm_weight).to(tl.float32)
    return up / total, down / total, scale


@triton.jit
def bounded_exp(x, BOUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """e^x where it is small, never more than BOUND."""
    return 1.0 / (tl.exp(-x) + 1.0 / BOUND)


@triton.jit
def find_features(  # type: ignore[no-untyped-def]
    k, v, far_q, far_k, cos, sin, turn, real, new, dct,
    q_frequency, q_projection, q_bias, q_norm, k_frequency, k_projection, k_bias, k_norm,
    q_offset, k_strength, decay, decay_up, feature_decay,
    s, m, count, ring_k, ring_v, ring_valid, ring_far, ring_gates, ring_code,
    fq, gq, keep, add, old_v, place,
    far_q_b, far_q_h, far_k_b, far_k_h, k_b, k_h, v_b, v_h, of_rotation, root, log_features,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, SELECTED: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, DECAY: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program is a row of the batch and a query head, or a key/value head (the last G).

    Of a query: features fq [B, H, F] and log-scale gq [B, H]. Of the key that leaves: what each feature's sums are
    multiplied by and what is added to them (times a value), keep and add [B, S, F], its value old_v [B, G, V], and its
    place [B]; the state's m and last column z are brought up to date, and the new key takes its place, unless it is
    padding. (The ring's code and valid, which all heads share, are left to `attend`.)"""
    row_b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    if ROTARY > 0:
        cos += row_b * of_rotation
        sin += row_b * of_rotation
    if head < H:
        fq_up, fq_down, log_scale = feature_map(
            far_q + row_b * far_q_b + head * far_q_h, cos, sin, turn,
            q_frequency + head * D, dct, None if q_projection is None else q_projection + head * D * D,
            None if q_bias is None else q_bias + head * F, None if q_norm is None else q_norm + head,
            root, log_features, D, F, ROTARY, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        if q_offset is not None:
            log_scale += tl.load(q_offset + head).to(tl.float32)
        of_q = (row_b * H + head) * F + d
        tl.store(fq + of_q, fq_up, mask=d < D)
        if F > D:
            tl.store(fq + of_q + D, fq_down, mask=d < D)
        tl.store(gq + row_b * H + head, log_scale)
    else:
        g = head - H
        value = tl.arange(0, BLOCK_V)
        seen = tl.load(count + row_b)
        is_real = 1
        if real is not None:
            is_real = tl.load(real + row_b).to(tl.int32)
        new_v, new_far = v + row_b * v_b + g * v_h, far_k + row_b * far_k_b + g * far_k_h
        # The key that leaves: what the ring has in the new one's place; without a window the new one itself.
        if W > 0:
            t = seen % W
            slot = (row_b * G + g) * W + t
            is_valid = is_real * tl.load(ring_valid + row_b * W + t) > 0
            of_value = tl.load(ring_v + slot * V + value, mask=value < V, other=0.0)
            gates_at, code_at = slot * 2, (row_b * W + t) * RANK
            old_gates, old_code = ring_gates, ring_code
            old_far = ring_k + slot * D if ring_far is None else ring_far + slot * D
            if g == 0:
                tl.store(place + row_b, t.to(tl.int32))
        else:
            is_valid = is_real > 0
            of_value = tl.load(new_v + value, mask=value < V, other=0.0)
            gates_at = row_b * (SELECTED + RANK) + 2 * g
            code_at = row_b * (SELECTED + RANK) + SELECTED
            old_gates, old_code, old_far = new, new, new_far
        fk_up, fk_down, scale = feature_map(
            old_far, cos, sin, turn,
            k_frequency + g * D, dct, None if k_projection is None else k_projection + g * D * D,
            None if k_bias is None else k_bias + g * F, None if k_norm is None else k_norm + g,
            root, log_features, D, F, ROTARY if W == 0 else 0, BLOCK_D, BLOCK_C,
        )  # fmt: skip
        if k_strength is not None:
            scale *= tl.load(k_strength + g).to(tl.float32)
        lost = scale * 0.0  # what all sums lose: −log γ
        if DECAY == 1:
            log_lost = tl.load(decay + g).to(tl.float32)
            lost = tl.exp(log_lost)
            if SELECTED > 0:
                scale += tl.load(old_gates + gates_at)
                lost = bounded_exp(log_lost + tl.load(old_gates + gates_at + 1), 4.0)
        keep_up, keep_down = tl.full([BLOCK_D], 1.0, tl.float32), tl.full([BLOCK_D], 1.0, tl.float32)
        if RANK > 0:
            r = tl.arange(0, BLOCK_R)
            code = tl.load(old_code + code_at + r, mask=r < RANK, other=0.0)
            of_up = decay_up + (g * F + d)[:, None] * RANK + r[None, :]
            inside = (d < D)[:, None] & (r < RANK)[None, :]
            moved = tl.sum(tl.load(of_up, mask=inside, other=0.0).to(tl.float32) * code[None, :], 1)
            moved += tl.load(feature_decay + g * F + d, mask=d < D, other=0.0).to(tl.float32)
            keep_up = tl.where(is_valid, tl.exp(-bounded_exp(moved, LARGEST_LOSS)), 1.0)
            if F > D:
                moved = tl.sum(tl.load(of_up + D * RANK, mask=inside, other=0.0).to(tl.float32) * code[None, :], 1)
                moved += tl.load(feature_decay + g * F + D + d, mask=d < D, other=0.0).to(tl.float32)
                keep_down = tl.where(is_valid, tl.exp(-bounded_exp(moved, LARGEST_LOSS)), 1.0)
        scale = tl.where(is_valid, scale, LOWEST)
        for i in tl.static_range(S // G):  # state heads of this key/value head
            at = row_b * S + g * (S // G) + i
            if DECAY == 2:
                lost = -tl.load(decay + g * (S // G) + i).to(tl.float32)
            lost_i = tl.where(is_valid, lost, 0.0)
            before = tl.load(m + at)
            after = tl.maximum(before - lost_i, scale)
            gate = tl.exp(before - after - lost_i)
            weight = tl.where(is_valid, tl.exp(scale - after), 0.0)
            of_f = at * F + d
            z = s + of_f * (V + 1) + V
            tl.store(keep + of_f, keep_up * gate, mask=d < D)
            tl.store(add + of_f, fk_up * weight, mask=d < D)
            z_up = tl.load(z, mask=d < D, other=0.0) * (keep_up * gate) + fk_up * weight
            tl.store(z, z_up, mask=d < D)
            if F > D:
                tl.store(keep + of_f + D, keep_down * gate, mask=d < D)
                tl.store(add + of_f + D, fk_down * weight, mask=d < D)
                z_down = tl.load(z + D * (V + 1), mask=d < D, other=0.0) * (keep_down * gate) + fk_down * weight
                tl.store(z + D * (V + 1), z_down, mask=d < D)
            tl.debug_barrier()  # every thread has read m
            tl.store(m + at, after)
        tl.store(old_v + (row_b * G + g) * V + value, of_value.to(tl.float32), mask=value < V)
        if W > 0:
            tl.debug_barrier()  # every thread has read what leaves
            new_k = tl.load(k + row_b * k_b + g * k_h + d, mask=d < D, other=0.0)
            tl.store(ring_k + slot * D + d, new_k, mask=d < is_real * D)
            of_new = tl.load(new_v + value, mask=value < V, other=0.0)
            tl.store(ring_v + slot * V + value, of_new, mask=value < is_real * V)
            if ring_far is not None:
                turned = without_rotation(new_far, d, cos, sin, turn, D, ROTARY)
                tl.store(ring_far + slot * D + d, turned, mask=d < is_real * D)
            if SELECTED > 0:
                two = tl.arange(0, 2)
                of_new = tl.load(new + row_b * (SELECTED + RANK) + 2 * g + two)
                tl.store(ring_gates + slot * 2 + two, of_new, mask=two < is_real * 2)


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q, sink, real, new, s, m, count, ring_k, ring_v, ring_valid, ring_code,
    fq, gq, keep, add, old_v, place, out, q_b, q_h, scaling, softcap,
    H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    F: tl.constexpr, SELECTED: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A program is a row of the batch, a state head and a block of values: it brings S up to date there, and reads it
    and the window for each query head → out [B, H, 1, V]. The first of a row does what all heads share."""
    row_b, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = head // (S // G)
    f, d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    value = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    at_f, at_d, at_v = f < F, d < D, value < V
    is_real, t = 1, 0
    if real is not None:
        is_real = tl.load(real + row_b).to(tl.int32)
    if W > 0:
        t = tl.load(place + row_b) * is_real + (is_real - 1)  # or no place, −1

    of_state = (row_b * S + head) * F + f
    state_at = s + of_state[:, None] * (V + 1) + value[None, :]
    inside = at_f[:, None] & at_v[None, :]
    kept = tl.load(keep + of_state, mask=at_f, other=0.0)
    added = tl.load(add + of_state, mask=at_f, other=0.0)
    v_old = tl.load(old_v + (row_b * G + g) * V + value, mask=at_v, other=0.0)
    state = tl.load(state_at, mask=inside, other=0.0) * kept[:, None] + added[:, None] * v_old[None, :]
    tl.store(state_at, state, mask=inside)
    z = tl.load(s + of_state * (V + 1) + V, mask=at_f, other=0.0)
    peak = tl.load(m + row_b * S + head)

    for i in range(H // S):
        query = row_b * H + head * (H // S) + i
        of_q = tl.load(fq + query * F + f, mask=at_f, other=0.0)
        read = tl.sum(of_q[:, None] * state, 0)
        if NORMALIZE:
            total = tl.maximum(tl.sum(of_q * z, 0), 1.1754943508222875e-38)
            result = read / total
            if W > 0:
                of_head = head * (H // S) + i
                q_d = tl.load(q + row_b * q_b + of_head * q_h + d, mask=at_d, other=0.0).to(tl.float32)
                near, lse = window(
                    q_d, sink, of_head, ring_k + (row_b * G + g) * W * D, ring_v + (row_b * G + g) * W * V,
                    ring_valid + row_b * W, t, value, scaling, softcap, W, D, V, BLOCK_D, BLOCK_V, BLOCK_W,
                )  # fmt: skip
                share = tl.sigmoid(tl.load(gq + query) + peak + tl.log(total) - lse)
                result = share * result + (1 - share) * near
        else:
            result = read * tl.exp(peak)
        tl.store(out + query * V + value, result, mask=at_v)

    if W > 0 and (head == 0) & (tl.program_id(2) == 0):
        seen = tl.load(count + row_b)
        tl.debug_barrier()  # every thread has read it
        tl.store(count + row_b, seen + is_real)
        tl.store(ring_valid + row_b * W + t, 1, mask=t >= 0)
        if RANK > 0:
            r = tl.arange(0, BLOCK_R)
            code = tl.load(new + row_b * (SELECTED + RANK) + SELECTED + r, mask=r < RANK, other=0.0)
            tl.store(ring_code + (row_b * W + t) * RANK + r, code, mask=r < is_real * RANK)


@triton.jit
def window(  # type: ignore[no-untyped-def]
    q_d, sink, of_head, ring_k, ring_v, ring_valid, t, value, scaling, softcap,
    W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`attend_window` of one query over its head's ring: the block of values, and the log-sum-exp. Place t, the new
    key's, is not marked valid yet (−1 for padding)."""
    d = tl.arange(0, BLOCK_D)
    near, total, peak = tl.zeros([BLOCK_V], tl.float32), tl.sum(q_d * 0.0, 0), tl.sum(q_d * 0.0, 0) + LOWEST
    for start in range(0, W, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        keys = tl.load(ring_k + w[:, None] * D + d[None, :], mask=(w < W)[:, None] & (d < D)[None, :], other=0.0)
        logits = tl.sum(keys.to(tl.float32) * q_d[None, :], 1) * scaling
        if softcap is not None:
            logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)
        is_there = (tl.load(ring_valid + w, mask=w < W, other=0) != 0) | (w == t)
        logits = tl.where(is_there, logits, LOWEST)
        top = tl.maximum(peak, tl.max(logits, 0))
        weights, shrunk = tl.where(w < W, tl.exp(logits - top), 0.0), tl.exp(peak - top)
        of_w = w[:, None] * V + value[None, :]
        values = tl.load(ring_v + of_w, mask=(w < W)[:, None] & (value < V)[None, :], other=0.0)
        near = near * shrunk + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        total, peak = total * shrunk + tl.sum(weights, 0), top
    if sink is not None:
        logit = tl.load(sink + of_head).to(tl.float32)
        top = tl.maximum(peak, logit)
        near, total, peak = near * tl.exp(peak - top), total * tl.exp(peak - top) + tl.exp(logit - top), top
    return near / total, peak + tl.log(total)
