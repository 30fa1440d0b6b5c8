"""The chunked form as it is written down: a loop over chunks, a few small products each.

It is what plain PyTorch makes of the formulas, as flash-linear-attention's naive references do; `benchmarks/speed.py`
times `chunked` beside it. There is no running maximum to guard the exponentials, no state from before, no padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def plain(
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
    log_decay: Tensor,
    feature_decay: Tensor,
) -> Tensor:
    """Arguments as in `chunked`, with as many key/value heads as query heads; the window is 0 or one chunk, and the
    length whole chunks. Returns [B, H, N, V]."""
    assert window in (0, CHUNK) and q.shape[2] % CHUNK == 0 and q.shape[1] == k.shape[1]
    v1 = F.pad(v, (0, 1), value=1.0)  # the last column sums the denominator
    fq, fk = fq * gq.exp()[..., None], fk * gk.exp()[..., None]
    q, k, v1, fq, fk = (x.unflatten(2, (-1, CHUNK)) for x in (q * scaling, k, v1, fq, fk))  # [B, H, n, C, …]
    lost = (log_decay[..., None] + feature_decay).unflatten(2, (-1, CHUNK)).cumsum(3)  # log of what is kept so far
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    state = torch.zeros(*fk.shape[:2], fk.shape[-1], v1.shape[-1], device=q.device, dtype=v1.dtype)
    out = torch.empty_like(v1[..., :-1])
    for n in range(q.shape[2]):
        total = torch.zeros_like(v1[:, :, n])
        far = n - window // CHUNK  # the chunk of keys that leaves the window while these queries come
        if window:
            total = total + (q[:, :, n] @ k[:, :, n].mT).exp().masked_fill(~causal, 0) @ v1[:, :, n]
            if far >= 0:
                total = total + (q[:, :, n] @ k[:, :, far].mT).exp().masked_fill(causal, 0) @ v1[:, :, far]
        if far >= 0:
            kept, end = lost[:, :, far].exp(), lost[:, :, far, -1:]
            queries = fq[:, :, n] * kept
            scores = (queries @ (fk[:, :, far] / kept).mT).masked_fill(~causal, 0)
            total = total + scores @ v1[:, :, far] + queries @ state
            keys = fk[:, :, far] * (end - lost[:, :, far]).exp()
            state = state * end.exp().mT + keys.mT @ v1[:, :, far]
        out[:, :, n] = total[..., :-1] / total[..., -1:]
    return out.flatten(2, 3)
