"""The chunked form as it is written down, in plain PyTorch, for `benchmarks/speed.py` to time `prefill` beside.

`plain` does all chunks in one product and goes from chunk to chunk for the state alone, as flash-linear-attention's
naive references do. `loop` does everything chunk by chunk, so that what it works on stays in the processor's cache.
In neither is there a running maximum to guard the exponentials, a state from before, or padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def loop(
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
    """Chunk by chunk. Arguments as in `chunked`, with as many key/value heads as query heads; the window is 0 or one
    chunk, and the length whole chunks. Returns [B, H, N, V]."""
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
    """All chunks at once. Arguments as in `loop`."""
    assert window in (0, CHUNK) and q.shape[2] % CHUNK == 0 and q.shape[1] == k.shape[1]
    v1 = F.pad(v, (0, 1), value=1.0)
    fq, fk, lost = fq * gq.exp()[..., None], fk * gk.exp()[..., None], log_decay[..., None] + feature_decay
    late = [F.pad(x, (0, 0, window, -window)) for x in (fk, v1, lost)]  # keys reach the state a window later
    q, k, v1, fq, fk, v_far, lost = (x.unflatten(2, (-1, CHUNK)) for x in (q * scaling, k, v1, fq, *late))
    lost = lost.cumsum(3)  # log of what is kept so far, [B, H, n, C, F]
    added = (fk * (lost[:, :, :, -1:] - lost).exp()).mT @ v_far
    states = torch.zeros_like(added)
    for n in range(1, states.shape[2]):
        states[:, :, n] = states[:, :, n - 1] * lost[:, :, n - 1, -1, :, None].exp() + added[:, :, n - 1]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    queries = fq * lost.exp()
    total = queries @ states + (queries @ (fk * (-lost).exp()).mT).masked_fill(~causal, 0) @ v_far
    if window:
        k_before, v_before = (F.pad(x, (0, 0, 0, 0, 1, -1)) for x in (k, v1))  # the chunk before, of zeros at first
        total = total + (q @ k.mT).exp().masked_fill(~causal, 0) @ v1
        total = total + (q @ k_before.mT).exp().masked_fill(causal, 0) @ v_before
    return (total[..., :-1] / total[..., -1:]).flatten(2, 3)
