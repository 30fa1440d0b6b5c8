"""The DiJiang feature map: positive features in the frequency domain (arXiv 2403.19928, section 3, generalised).

    x̂ = √s · x                                   s the attention's scaling, so that q̂·k̂ = s·q·k
    y = [T C x̂ + W x̂, −(T C x̂ + W x̂)] + D        C the DCT-II, T = diag(t), W learned from zero
    g(x) = lse(y) − log F − a‖x̂‖²                how much x weighs in all
    log e^{g(q)} φ(q) = y − log F − a‖q̂‖² + c    of queries
    log e^{b g(k)} φ(k) = y − lse(y) + b g(k)    of keys, b learned from zero

Features are handled as logarithms: those of queries are logits, and those of keys what they write to the state with.

Shape legend: B batch, H heads, N tokens, D head_dim, F features (2·D, or D if not signed).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dijiang import Kernel
from .state import accumulated


def dct_matrix(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The orthonormal DCT-II: C[k, n] = α_k cos(π (n + ½) k / d), α_0 = √(1/d), α_k = √(2/d). Shape [D, D]."""
    n = torch.arange(dim, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / dim) * math.sqrt(2 / dim)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(dtype)


def quasi_random_normal(heads: int, dim: int, seed: int) -> Tensor:
    """t = Φ⁻¹(u), u a scrambled Sobol sequence, one of its dimensions a head (the paper's T). Shape [H, D]."""
    points = torch.quasirandom.SobolEngine(heads, scramble=True, seed=seed).draw(dim, dtype=torch.float32).T
    return torch.special.ndtri(points.double().clamp(1e-6, 1 - 1e-6)).float()


def augmented(x: Tensor) -> Tensor:
    """[x, ‖x‖², 1] in the accumulation dtype: [B, H, N, D] → [B, H, N, D + 2]. A product with it has all terms of y."""
    x = accumulated(x)
    norm = x.square().sum(-1, keepdim=True)
    return torch.cat([x, norm, torch.ones_like(norm)], -1)


class FeatureMap(nn.Module):
    """y and a‖x̂‖² of queries or keys. `QueryFeatures` and `KeyFeatures` make log-features of them.

    scaled: False where the log-scale g cancels or is none: it has no parameter then.
    """

    frequency: Tensor
    dct: Tensor

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled and kernel.learned_features
        self.heads, self.head_dim, self.kernel = heads, head_dim, kernel
        self.features = head_dim * (2 if kernel.signed else 1)
        if kernel.frequency == "quasi-random":  # drawn once, not learned
            self.register_buffer("frequency", torch.empty(heads, head_dim, dtype=torch.float32))
        else:
            self.frequency = nn.Parameter(torch.empty(heads, head_dim, dtype=torch.float32))
        self.register_buffer("dct", torch.empty(head_dim, head_dim, dtype=torch.float32), persistent=False)
        if kernel.projection:
            self.projection = nn.Parameter(torch.empty(heads, head_dim, head_dim, dtype=torch.float32))
        if kernel.learned_features:
            self.bias = nn.Parameter(torch.empty(heads, self.features, dtype=torch.float32))
        if self.scaled:
            self.norm_weight = nn.Parameter(torch.empty(heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Starts from one consistent pair: a = t² / 2d makes e^{g(q)+g(k)} φ(q)·φ(k) estimate e^{(t²/d) q̂·k̂}."""
        kernel = self.kernel
        init.copy_(self.dct, dct_matrix(self.head_dim))
        if isinstance(kernel.frequency, str):
            init.copy_(self.frequency, quasi_random_normal(self.heads, self.head_dim, kernel.seed))
        else:
            init.constant_(self.frequency, kernel.frequency)
        if kernel.projection:
            init.zeros_(self.projection)
        if kernel.learned_features:
            init.zeros_(self.bias)
        if self.scaled:
            init.constant_(self.norm_weight, float(kernel.frequency) ** 2 / (2 * self.head_dim))

    def weights(self, scaling: float, dtype: torch.dtype, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """What x is multiplied with: y = x · matrix + bias, a‖x̂‖² = norm · ‖x‖². Of shape [H, D, F], [H, 1, F] and
        [H, 1, 1], of these heads alone; norm is 0 where there is no log-scale."""
        matrix = self.frequency[heads].to(dtype)[..., None] * self.dct.to(dtype)
        if self.kernel.projection:
            matrix = matrix + self.projection[heads].to(dtype)
        matrix = matrix.mT * math.sqrt(scaling)
        if self.kernel.signed:
            matrix = torch.cat([matrix, -matrix], -1)
        bias = self.bias[heads].to(dtype)[:, None] if self.kernel.learned_features else torch.zeros_like(matrix[:, :1])
        norm = torch.zeros_like(matrix[:, :1, :1])
        return matrix, bias, scaling * self.norm_weight[heads].to(dtype)[:, None, None] if self.scaled else norm


class QueryFeatures(FeatureMap):
    """log e^{g(q)} φ(q) of queries [B, H, N, D], or log φ(q) if not scaled: [B, H, N, F] in float32 (float64 if they
    are)."""

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool) -> None:
        super().__init__(heads, head_dim, kernel, scaled)
        if self.scaled:
            self.offset = nn.Parameter(torch.empty(heads, dtype=torch.float32))  # c

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.scaled:
            init.zeros_(self.offset)

    def forward(
        self, x: Tensor, scaling: float, heads: slice = slice(None), known: dict[str, Any] | None = None
    ) -> Tensor:
        """heads: those that x has. known: where the weight is kept between calls, or None."""
        x = augmented(x)
        weight = None if known is None else known.get("weight")
        if weight is None:
            matrix, bias, norm = self.weights(scaling, x.dtype, heads)
            if self.scaled:
                bias = bias + (self.offset[heads].to(x.dtype)[:, None, None] - math.log(self.features))
            weight = torch.cat([matrix, -norm.expand_as(bias), bias], 1)
            if known is not None:
                known["weight"] = weight
        y = x @ weight
        return y if self.scaled else y.log_softmax(-1)


class KeyFeatures(FeatureMap):
    """log φ(k) of keys [B, G, N, D]: [B, G, N, F], and b g(k): [B, G, N, 1], in float32 (float64 if they are)."""

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool = True) -> None:
        super().__init__(heads, head_dim, kernel, scaled)
        if self.scaled:
            self.strength = nn.Parameter(torch.empty(heads, dtype=torch.float32))  # b

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.scaled:
            init.zeros_(self.strength)

    def forward(self, x: Tensor, scaling: float, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """heads: those that x has."""
        x = augmented(x)
        matrix, bias, norm = self.weights(scaling, x.dtype, heads)
        y = x @ torch.cat([matrix, torch.zeros_like(bias), bias], 1)
        features = y.log_softmax(-1)
        if not self.scaled:
            return features, torch.zeros_like(features[..., :1])
        total = y[..., :1] - features[..., :1]  # lse(y), of any feature
        scale = total - math.log(self.features) - x[..., -2:-1] * norm
        return features, scale * self.strength[heads].to(y.dtype)[:, None, None]
