"""The DiJiang feature map: positive features in the frequency domain (arXiv 2403.19928, section 3, generalised).

    x̂ = √s · x                                s the attention's scaling, so that q̂·k̂ = s·q·k
    y = T C x̂ + W x̂                           C the DCT-II, T = diag(t), W learned from zero
    φ(x) = softmax([y, −y] + D)               2·head_dim features that sum to 1
    g(x) = lse([y, −y] + D) − log 2d − a‖x̂‖²  the log-scale that the softmax took away

Shape legend: B batch, H heads, N tokens, D head_dim, F features (2·D, or D if not signed).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .accelerated import feature_form
from .configuration_dijiang import Kernel
from .linear_attention import accumulated, accumulation_dtype, softmax_with_lse


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


class Preparation(NamedTuple):
    """Asks a `FeatureMap` for a `Prepared`, see there."""

    offset: Tensor | None


class Prepared(NamedTuple):
    """What a `FeatureMap` multiplies and adds where nothing needs a gradient, made once for many tokens.

    weight: [H, D + 2, F]; [x, 1, c] times it is y + D + c. norm_weight: s·a, [H, 1], or None.
    """

    weight: Tensor
    norm_weight: Tensor | None

    @property
    def matrix(self) -> Tensor:
        """`FeatureMap.matrix`, [H, D, F]."""
        return self.weight[:, :-2]

    @property
    def bias(self) -> Tensor:
        """D, and what is added to it: [H, 1, F]."""
        return self.weight[:, -2:-1]


class FeatureMap(nn.Module):
    """Maps queries or keys [B, H, N, D] to features [B, H, N, F] and their log-scale [B, H, N], in float32 (float64
    if they are).

    scaled: False where the log-scale cancels (queries without a window): it is 0 then, and has no parameter.
    """

    frequency: Tensor
    dct: Tensor

    def __init__(self, heads: int, head_dim: int, kernel: Kernel, scaled: bool = True) -> None:
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

    def forward(self, x: Tensor, scaling: float, prepared: Preparation | None = None) -> Any:
        """(features, log-scale) of x; or with a `Preparation` what it asks for, which x tells the dtype of."""
        if prepared is not None:
            return self._prepared(scaling, accumulation_dtype(x), prepared.offset)
        matrix = self.matrix(scaling, accumulation_dtype(x))
        bias = self.bias if self.kernel.learned_features else None
        norm_weight = scaling * self.norm_weight if self.scaled else None
        form = feature_form(x, matrix, bias, norm_weight)
        if form is not None:
            return form(x, matrix, bias, norm_weight, self.kernel.signed)
        x = accumulated(x)
        y = x @ matrix.mT
        if bias is not None:
            y = y + bias.to(y.dtype)[:, None]
        if norm_weight is None:
            return y.softmax(-1), y.new_zeros(y.shape[:-1])
        features, lse = softmax_with_lse(y)
        norm = torch.linalg.vector_norm(x, dim=-1).square() * norm_weight.to(x.dtype)[:, None]
        return features, lse - math.log(self.features) - norm

    # ----------------------------------------------------------------------- without gradients, in fewer passes

    def prepared(self, x: Tensor, scaling: float, offset: Tensor | None = None) -> Prepared:
        """For `unnormalized`, `logits` and `log_scale` of x. offset: [H], added to the log-scale."""
        return self(x, scaling, Preparation(offset))  # through the call, where parameters that are offloaded arrive

    def _prepared(self, scaling: float, dtype: torch.dtype, offset: Tensor | None) -> Prepared:
        matrix = self.matrix(scaling, dtype).mT
        bias = torch.zeros_like(matrix[:, :1])
        if self.kernel.learned_features:
            bias = bias + self.bias.to(dtype)[:, None]
        if self.scaled:
            bias = bias - math.log(self.features)
        if offset is not None:
            bias = bias + offset.to(dtype)[:, None, None]
        norm_weight = scaling * self.norm_weight.to(dtype)[:, None] if self.scaled else None
        return Prepared(torch.cat([matrix, bias, torch.ones_like(bias)], 1), norm_weight)

    @staticmethod
    def log_scale(x: Tensor, prepared: Prepared) -> Tensor | None:
        """log e^g φ(x) less y + D: [B, H, N], or None for 0, where log-scales cancel."""
        norm = _norm(accumulated(x), prepared)
        return None if norm is None else norm.neg_()

    @staticmethod
    def logits(x: Tensor, prepared: Prepared, scale: Tensor) -> Tensor:
        """The sum of both, and of ``scale`` [B, H, 1, F or 1], which has the bias in it: [B, H, 1, F]."""
        x = accumulated(x)
        if prepared.norm_weight is not None:
            norm = torch.linalg.vector_norm(x, dim=-1)
            scale = torch.addcmul(scale, (norm * prepared.norm_weight)[..., None], norm[..., None], value=-1)
        if x.shape[0] == 1:
            return torch.baddbmm(scale[0], x[0], prepared.matrix)[None]
        return (x @ prepared.matrix).add_(scale)

    @staticmethod
    def unnormalized(x: Tensor, prepared: Prepared, strength: Tensor | float) -> tuple[Tensor, Tensor]:
        """φ(k) times something, and its log-scale multiplied by ``strength`` (a number or [H, 1]) less the logarithm of
        that: [B, H, N, F], [B, H, N]."""
        x = accumulated(x)
        y = _product(x, prepared)
        top = y.amax(-1)
        features = y.sub_(top[..., None]).exp_()
        log_sum = features.sum(-1).log_()
        norm = _norm(x, prepared)
        if norm is None:
            return features, -log_sum
        return features, (top + log_sum - norm) * strength - log_sum

    def matrix(self, scaling: float, dtype: torch.dtype) -> Tensor:
        """√s (T C + W), and the negative of it below if signed: [H, F, D]."""
        matrix = self.frequency.to(dtype)[..., None] * self.dct.to(dtype)
        if self.kernel.projection:
            matrix = matrix + self.projection.to(dtype)
        matrix = matrix * math.sqrt(scaling)
        return torch.cat([matrix, -matrix], 1) if self.kernel.signed else matrix


def _product(x: Tensor, prepared: Prepared) -> Tensor:
    """y + D: [B, H, N, D] → [B, H, N, F]."""
    if x.shape[0] == 1:
        return torch.baddbmm(prepared.bias, x[0], prepared.matrix)[None]
    return (x @ prepared.matrix).add_(prepared.bias)


def _norm(x: Tensor, prepared: Prepared) -> Tensor | None:
    """a‖x̂‖², [B, H, N]."""
    if prepared.norm_weight is None:
        return None
    norm = torch.linalg.vector_norm(x, dim=-1)
    return (norm * prepared.norm_weight).mul_(norm)
