"""The decay of the state: how much of the state each token keeps, by head and by feature.

    log γ = −λ − δ_f,    λ = 4 σ(r − log 4 + w·x) of a head,    δ_f = ½ σ(p_f − log ½ + (B A x)_f) of a feature

x is the token's hidden state, scaled to a root mean square of 1, and σ the logistic function: λ is about e^r and δ_f
about e^{p_f} while both are small. The hidden state also adds u·x to the log-scale of the token's key. Without
``selective`` λ is e^r and u is 0, without ``decay_rank`` δ_f is 0; ``decay: retnet`` has RetNet's fixed γ instead.

This module only computes decays; `state` applies them. Rates that depend on the token are those of gated linear
attention (arXiv 2312.06635).

Shape legend: B batch, H query heads, G key/value heads, N tokens, D head_dim, F features, X numbers of a token's gates.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dijiang import Kernel
from .state import Decay, accumulated

FASTEST_HEAD = 4.0  # largest λ: a single token can leave less than a fiftieth of a head's state
FASTEST = 0.5  # largest δ_f: a sum over 64 tokens is at most 32, and float32 holds e^32 and e^−32


class TokenGates(nn.Module):
    """A token's gates: X numbers, projections of its hidden state x. With ``selective`` each key/value head has two of
    them, u·x and w·x; the last ``decay_rank`` are A x."""

    def __init__(self, kv_heads: int, hidden_size: int, kernel: Kernel) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        if kernel.selective:
            self.selection = nn.Parameter(torch.empty(2 * kv_heads, hidden_size, dtype=torch.float32))
        if kernel.decay_rank:
            self.down = nn.Parameter(torch.empty(kernel.decay_rank, hidden_size, dtype=torch.float32))  # A

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name == "selection":
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=self.hidden_size**-0.5)

    def forward(self, hidden_states: Tensor, known: dict[str, Any] | None = None) -> Tensor:
        """The gates, [B, 1, N, X], in the accumulation dtype. hidden_states: [B, N, hidden]. known: a dictionary that
        keeps the weight between calls, or None."""
        x = accumulated(hidden_states)
        weight = None if known is None else known.get("weight")
        if weight is None:
            weight = torch.cat([parameter.to(x.dtype) for parameter in self.parameters()])
            if known is not None:
                known["weight"] = weight
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.hidden_size**-0.5
        return (F.linear(x, weight) / (norm + 1e-6))[:, None]


class StateDecay(nn.Module):
    """Turns the gates of `TokenGates` into decays of the state and additions to the log-scales of keys."""

    log_decay: Tensor

    def __init__(self, heads: int, kv_heads: int, features: int, kernel: Kernel) -> None:
        super().__init__()
        self.kernel, self.heads, self.kv_heads = kernel, heads, kv_heads
        if kernel.decay == "learned":
            self.decay = nn.Parameter(torch.empty(kv_heads, dtype=torch.float32))  # r
        elif kernel.decay == "retnet":
            self.register_buffer("log_decay", torch.empty(heads, dtype=torch.float32))
        if kernel.decay_rank:
            self.up = nn.Parameter(torch.empty(kv_heads * features, kernel.decay_rank, dtype=torch.float32))  # B
            self.feature_decay = nn.Parameter(torch.empty(kv_heads, features, dtype=torch.float32))  # p

    def reset_parameters(self) -> None:
        if self.kernel.decay == "learned":
            init.constant_(self.decay, math.log(1 / 256))
        elif self.kernel.decay == "retnet":
            spread = torch.linspace(math.log(1 / 32), math.log(1 / 512), self.heads, dtype=torch.float32)
            init.copy_(self.log_decay, torch.log1p(-spread.exp()))
        if self.kernel.decay_rank:
            init.normal_(self.up, std=0.1)
            init.constant_(self.feature_decay, math.log(1 / 256))

    def forward(self, k: Tensor, gates: Tensor | None, heads: slice = slice(None)) -> tuple[Decay, Tensor | None]:
        """The decay, [B, G, N, 1 or F] in each part ([B, H, N, 1] with ``decay: retnet``), and what is added to
        log-scales, [B, G, N, 1], or None.

        k: [B, G, N, D], keys, of which only the shape counts. gates: [B, 1, N, X], from `TokenGates`, or None. heads:
        which of the layer's key/value heads k has.
        """
        head, features, log_scale, moved = None, None, None, None
        if gates is not None and self.kernel.selective:
            both = gates[:, 0, :, : 2 * self.kv_heads].unflatten(-1, (-1, 2)).transpose(1, 2)
            log_scale, moved = both[:, heads].split(1, -1)
        if self.kernel.decay == "retnet":
            head = accumulated(self.log_decay)[:, None, None].expand(k.shape[0], -1, k.shape[2], 1)
        elif self.kernel.decay == "learned":
            decay = accumulated(self.decay[heads])[:, None, None]
            if moved is None:
                head = -decay.exp().expand(k.shape[0], -1, k.shape[2], 1)
            else:
                head = _bounded(moved + (decay - math.log(FASTEST_HEAD)), FASTEST_HEAD)
        if gates is not None and self.kernel.decay_rank:
            code = gates[..., -self.kernel.decay_rank :]
            up = self.up.to(code.dtype).unflatten(0, self.feature_decay.shape)[heads].mT  # [G, rank, F]
            start = accumulated(self.feature_decay[heads])[:, None] - math.log(FASTEST)
            features = _bounded(F.pad(code, (0, 1), value=1.0) @ torch.cat([up, start], 1), FASTEST)
        return Decay(head, features), log_scale


def _bounded(x: Tensor, bound: float) -> Tensor:
    """−bound · σ(x), which is about −e^{x + log bound} where that is small."""
    return x.sigmoid() * -bound
