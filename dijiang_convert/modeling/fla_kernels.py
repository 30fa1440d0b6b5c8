"""Training on a GPU: the far part by flash-linear-attention's chunk kernels, the near part by `near_kernels`.

Far keys are those of `chunked`: delayed by the window, e^{g − M} φ(k) under gates M' + log γ − M, M the running maximum
of g less the decay. It guards the numbers alone: no gradient flows through it, and in the merge it cancels. Without
decays a feature that is simple gated linear attention, with them gated linear attention. A column of ones beside the
values sums the denominator. For bfloat16 models the kernels take bfloat16 features and keep the state before each chunk
so, although they add it up in float32; otherwise all of it is float32, with products in TF32.

Shape legend: B batch, H query heads, G key/value heads, N queries, V value head_dim, F features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_attention import FLOOR, FarState, _Keys, _masked_exp, _with_sink, absorb, merge, per_key
from .near_kernels import near_attention

try:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla
except ImportError as error:
    raise ImportError("fla_kernels needs flash-linear-attention: ask accelerated.fla_available first") from error


def train(
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
    """Arguments and results as in `linear_attention.chunked`, causal and normalised."""
    batch, kv_heads, keys = gk.shape
    queries = q.shape[2]
    first = keys - queries - window
    near = None
    if window > 0:
        near = near_attention(q, k, v, scaling=scaling, window=window, softcap=softcap, mask=mask)
        near = _with_sink(*near, sink)
    valid = torch.ones(batch, keys, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    gk = gk.float()
    lam = torch.zeros_like(gk) if log_decay is None else -per_key(log_decay, gk)
    if state is None:
        state = FarState.empty(batch, kv_heads, fk.shape[-1], v.shape[-1], v)
    if first > 0:  # before the first delayed key
        before = slice(0, first)
        of_features = None if feature_decay is None else feature_decay[:, :, before]
        state = absorb(
            state, fk[:, :, before], gk[:, :, before], v[:, :, before], -lam[..., before], of_features, valid[:, before]
        )
    delta = None if feature_decay is None else -feature_decay
    read, log_m, state = far_attention(fq, _Keys(fk, gk, v, lam, delta, valid).shift(first, queries), state)
    return merge((read, gq + log_m), near), state


def far_attention(fq: Tensor, keys: _Keys, state: FarState) -> tuple[Tensor, Tensor, FarState]:
    """Σ_{j ≤ i} φ(q)·φ(k) e^{g(k)} γ… (v, 1) over as many keys as queries: [B, H, N, V + 1], its log-scale [B, H, N],
    and the state after all keys."""
    groups, valid = fq.shape[1] // keys.fk.shape[1], keys.valid[:, None]
    lam = keys.lam * valid  # type: ignore[operator]
    with torch.no_grad():
        lost = lam.cumsum(-1)
        h = (keys.gk + lost).masked_fill(~valid, FLOOR)
        m = torch.cat([state.m[..., None], h], -1).cummax(-1).values
        m = torch.cat([m[..., :1], m[..., 1:] - lost], -1)  # M before the first key, and at each
    # Where there was no key before there is nothing to decay: no difference from −∞ enters the kernel's sums.
    gate = torch.where(m[..., :-1] > FLOOR / 2, m[..., :-1] - m[..., 1:] - lam, 0.0)
    k = keys.fk * _masked_exp(keys.gk - m[..., 1:], valid)[..., None]
    width = keys.v.shape[-1] + 1
    unused = -width % 16  # kernels load rows of whole vectors, and refuse odd widths in half precision
    v1 = F.pad(F.pad(keys.v, (0, 1), value=1.0), (0, unused))
    dtype = torch.bfloat16 if keys.v.dtype == torch.bfloat16 else torch.float32

    def of_heads(x: Tensor) -> Tensor:
        """[B, G, N, …] → [B, N, H, …]."""
        return x.repeat_interleave(groups, 1).transpose(1, 2).contiguous()

    given = fq.transpose(1, 2).to(dtype), of_heads(k.to(dtype)), of_heads(v1.to(dtype))
    start = F.pad(state.s.float(), (0, unused)).repeat_interleave(groups, 1)
    if keys.delta is None:
        read, s = chunk_simple_gla(
            *given, g=of_heads(gate), scale=1.0, initial_state=start, output_final_state=True
        )  # fmt: skip
    else:
        gates = gate[..., None] - keys.delta * valid[..., None]
        read, s = chunk_gla(*given, g=of_heads(gates), scale=1.0, initial_state=start, output_final_state=True)
    log_m = m[..., 1:].repeat_interleave(groups, 1)
    return read[..., :width].float().transpose(1, 2), log_m, FarState(s[:, ::groups, :, :width], m[..., -1])
