"""The DiJiang feature map: positive features in the frequency domain (arXiv 2403.19928, section 3, extended).

    x̂ = √s · x                                   s the attention's scaling, so that q̂·k̂ = s·q·k
    y = [T C x̂ + W x̂, −(T C x̂ + W x̂)] + D        C the DCT-II, T = diag(t), W learned from zero
    g(x) = lse(y) − log F − a‖x̂‖²                the log-scale: how much x weighs in all; lse is log Σ exp
    log e^{g(q)} φ(q) = y − log F − a‖q̂‖² + c    of queries
    log e^{b g(k)} φ(k) = y − lse(y) + b g(k)    of keys, b learned from zero

Features are kept as logarithms. A query's are its logits for the rows of the state, a key's are the logarithms of the
weights by which `state` adds its value to these rows. Products of the two are taken elsewhere.

Shape legend: B batch, H heads of queries or keys, N tokens, D head_dim, F features (2·D, or D if not signed).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_dijiang import Kernel
from .state import accumulated


def dct_matrix(dim: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """The orthonormal DCT-II, [D, D]: C[k, n] = α_k cos(π (n + ½) k / D), α_0 = √(1/D), α_k = √(2/D)."""
    n = torch.arange(dim, dtype=torch.float64, device=device)
    matrix = torch.cos(math.pi * (n[None, :] + 0.5) * n[:, None] / dim) * math.sqrt(2 / dim)
    matrix[0] *= math.sqrt(0.5)
    return matrix.to(dtype)


def quasi_random_normal(heads: int, dim: int, seed: int) -> Tensor:
    """The paper's T, [H, D]: t = Φ⁻¹(u), where u is a scrambled Sobol sequence with a dimension for each head."""
    points = torch.quasirandom.SobolEngine(heads, scramble=True, seed=seed).draw(dim, dtype=torch.float32).T
    return torch.special.ndtri(points.double().clamp(1e-6, 1 - 1e-6)).float()


def augmented(x: Tensor) -> Tensor:
    """x: [B, H, N, D] → [x, ‖x‖², 1]: [B, H, N, D + 2], in the accumulation dtype. One product then has all terms of y
    and a‖x̂‖²."""
    x = accumulated(x)
    norm = x.square().sum(-1, keepdim=True)
    return torch.cat([x, norm, torch.ones_like(norm)], -1)


class FeatureMap(nn.Module):
    """The weights of y and a‖x̂‖², from which `QueryFeatures` and `KeyFeatures` compute log features.

    heads: of queries or keys. scaled: whether there is a log-scale g. A query's cancels without a window, in numerator
    and denominator; then g has no parameters.
    """

    frequency: Tensor
    dct: Tensor

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool) -> None:
        super().__init__()
        self.scaled = scaled and kernel.learned_features
        self.heads, self.head_dim, self.kernel = heads, head_dim, kernel
        self.features = head_dim * (2 if kernel.signed else 1)
        if kernel.frequency == "quasi-random":  # T is drawn once and not learned
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
        """Initialises the parameters: with a = t² / 2D, F e^{g(q)+g(k)} φ(q)·φ(k) estimates e^{(t²/D) q̂·k̂}."""
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
        """matrix [H, D, F], bias [H, 1, F] and norm [H, 1, 1] for which y = x · matrix + bias and a‖x̂‖² = norm · ‖x‖²;
        norm is 0 without a log-scale. scaling: the attention's s. heads: for which of the heads."""
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
    """Log features of queries: log e^{g(q)} φ(q), or log φ(q) if not scaled."""

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
        """Log features, [B, H, N, F], in the accumulation dtype.

        x: [B, H, N, D], queries. scaling: the attention's s. heads: which of the module's heads x has. known: a
        dictionary that keeps the weight between calls, or None.
        """
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
    """Log features of keys, log φ(k), and their log-scale b g(k)."""

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool = True) -> None:
        super().__init__(heads, head_dim, kernel, scaled)
        if self.scaled:
            self.strength = nn.Parameter(torch.empty(heads, dtype=torch.float32))  # b

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.scaled:
            init.zeros_(self.strength)

    def forward(self, x: Tensor, scaling: float, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Log features, [B, H, N, F], and log-scales, [B, H, N, 1], in the accumulation dtype.

        x: [B, H, N, D], keys. scaling: the attention's s. heads: which of the module's heads x has.
        """
        x = augmented(x)
        matrix, bias, norm = self.weights(scaling, x.dtype, heads)
        y = x @ torch.cat([matrix, torch.zeros_like(bias), bias], 1)
        features = y.log_softmax(-1)
        if not self.scaled:
            return features, torch.zeros_like(features[..., :1])
        total = y[..., :1] - features[..., :1]  # lse(y), the same by any feature
        scale = total - math.log(self.features) - x[..., -2:-1] * norm
        return features, scale * self.strength[heads].to(y.dtype)[:, None, None]
