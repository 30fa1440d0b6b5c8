"""The recurrent form without gradients, in few operations, for decoding on the CPU.

A token's attention is one softmax over two kinds of logits: those of the window's keys, whose values are in the window,
and the logarithms of e^g φ(q), one a feature, whose values are the rows of the state:

    o = (Σ_j e^{s q·k_j} v_j + Σ_f e^{g_f + Λ_f + M} S_f) / (the same with 1 for v_j, and z_f for S_f)

Keys that leave the window next are known before they do: what some of them will do to the state is worked out for all
at once (`absorptions`), and the state lacks the decay Λ since, which takes part as a logit until it is made up for.

Shape legend as in `linear_attention`; R = H / G queries a key/value head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .inference import LEAST_TOTAL, MOST_DECAY
from .linear_attention import FLOOR, per_key, with_ones


class Absorption(NamedTuple):
    """What one key does to a state that lacks decay: s · factor + key valueᵀ, after which it has the maximum m and
    lacks the decay e^lag (None for 1).

    factor: [B, G, F or 1, 1], or None for 1. key: [B · G, F, 1]. value: [B · G, 1, V + 1]. m: [B, G]. lag: [B, G, F or
    1]. scale: lag + m, as a query's logits take it, [B, H, 1, F or 1].
    """

    factor: Tensor | None
    key: Tensor
    value: Tensor
    m: Tensor
    lag: Tensor | None
    scale: Tensor | None

    def apply(self, s: Tensor) -> None:
        """In place. s: [B, G, F, V + 1]"""
        if self.factor is not None:
            s.mul_(self.factor)
        s.flatten(0, 1).baddbmm_(self.key, self.value)


def absorptions(
    m: Tensor,
    lag: Tensor | None,
    fk: Tensor,
    gk: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    feature_decay: Tensor | None = None,
    valid: Tensor | None = None,
    repeats: int = 1,
    bias: Tensor | None = None,
    lazy: bool = True,
) -> list[Absorption]:
    """`absorb` of some keys, one after the other, into a state with the maximum m that lacks the decay e^lag.

    Arguments as there; bias [H, 1, F] is added to what queries take, for R = repeats of them. Returns one for each key,
    or for the first of them alone where decays are too strong to lack those of all. lazy: False where no value may be
    looked at; then the state lacks nothing.
    """
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
        losses.append(m - top)  # exact, so that what rounding takes from m + log γ ends up in the loss
        tops.append(m := top)
    loss = torch.stack(losses, -1) if log_decay is None else torch.stack(losses, -1) + log_decay
    loss = loss[..., None] if feature_decay is None else loss[..., None] + feature_decay  # [B, G, K, F or 1]
    weight = (gk - torch.stack(tops, -1)).exp_()
    if valid is not None:
        weight *= valid[:, None]
    key, value = fk.to(m.dtype) * weight[..., None], with_ones(v)
    if not lazy:
        steps = enumerate(zip(loss.exp()[..., None].unbind(2), tops, strict=True))
        return [Absorption(factor, *_flat(key, value, i), top, None, None) for i, (factor, top) in steps]

    if lag is not None:
        loss[:, :, 0] += lag
    lags, factor = loss.cumsum(2), None
    if lags.amin() < -MOST_DECAY:  # the first one's is made up for now
        factor = loss[:, :, 0, :, None].exp()
        loss[:, :, 0] = 0
        lags = loss.cumsum(2)
        if lags.amin() < -MOST_DECAY:
            lags, tops = lags[:, :, :1], tops[:1]
    keys = lags.shape[2]
    key = key[:, :, :keys] * lags.neg().exp_()
    scales = lags + torch.stack(tops, -1)[..., None]
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, 1)
    if bias is not None:
        scales = scales + bias
    each = zip(tops, lags.unbind(2), scales[..., None, :].unbind(2), strict=True)
    return [Absorption(None if i else factor, *_flat(key, value, i), *rest) for i, rest in enumerate(each)]


def _flat(key: Tensor, value: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Of key number i: [B · G, F, 1] and [B · G, 1, V + 1]."""
    return key[:, :, i, :, None].flatten(0, 1), value[:, :, i : i + 1].flatten(0, 1)


def attend(near: Tensor, v: Tensor, far: Tensor, s: Tensor, sink: Tensor | None = None) -> Tensor | None:
    """One query against the window and a state by its logits: `attend_one` in one softmax.

    near: [B, G, R, W], of the window's keys. v: [B, G, W, V]. far: [B, H, 1, F], of features. s: [B, G, F, V + 1].
    sink: [H]. Returns [B, H, 1, V], or None where float32 can't hold what the weights span.
    """
    batch, heads, _, features = far.shape
    logits = [near, far.view(*near.shape[:3], features)]
    if sink is not None:
        logits.append(sink.to(far.dtype).view(1, *near.shape[1:3], 1).expand(batch, -1, -1, -1))
    weights = torch.cat(logits, -1).softmax(-1)
    of_near, of_far = weights[..., : near.shape[-1]], weights[..., near.shape[-1] : near.shape[-1] + features]
    read = of_far @ s
    out, total = read[..., :-1], read[..., -1:]
    if v.shape[2]:
        out, total = out + of_near @ v.to(out.dtype), total + of_near.sum(-1, keepdim=True)
    if sink is not None:
        total = total + weights[..., -1:]
    if not total.amin().item() >= LEAST_TOTAL:
        return None
    return (out / total).view(batch, heads, 1, -1)
