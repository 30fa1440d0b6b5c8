"""The feature map against its formula, written out in float64 with no transform and no softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.attention import Call, DiJiangAttention
from dijiang_convert.modeling.cache import Tokens
from dijiang_convert.modeling.configuration_dijiang import Kernel, Layers
from dijiang_convert.modeling.feature_map import FeatureMap, dct_matrix, quasi_random_normal

SCALING = 0.37


def feature_map(heads: int, head_dim: int, kernel: Kernel, random: bool = True) -> FeatureMap:
    made = FeatureMap(heads, head_dim, kernel)
    made.reset_parameters()
    if random:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.7 * torch.randn_like(parameter))
    return made


def exponents(made: FeatureMap, x: Tensor) -> Tensor:
    """[y, −y] + D in float64, y = T C x̂ + W x̂ summed term by term."""
    heads, dim = made.frequency.shape
    x = x.double() * math.sqrt(SCALING)
    y = torch.zeros(*x.shape[:-1], dim, dtype=torch.float64)
    for k in range(dim):
        alpha = math.sqrt((1 if k == 0 else 2) / dim)
        for n in range(dim):
            c = alpha * math.cos(math.pi * (n + 0.5) * k / dim)
            weight = made.frequency[:, k].double() * c
            if made.kernel.projection:
                weight = weight + made.projection[:, k, n].double()
            y[..., k] += weight[:, None] * x[..., n]
    if made.kernel.signed:
        y = torch.cat([y, -y], -1)
    return y + made.bias.double()[:, None] if made.kernel.learned_features else y


@pytest.mark.parametrize("dim", [1, 2, 5, 12, 64, 80, 128])
def test_dct_matrix(dim: int) -> None:
    matrix = dct_matrix(dim, torch.float64)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64), atol=1e-12)
    # The transform of a cosine of its own basis is one coefficient, of a constant the first one.
    assert torch.allclose(matrix.sum(1), torch.eye(dim, dtype=torch.float64)[0] * math.sqrt(dim), atol=1e-12)
    for k in range(dim):
        alpha = math.sqrt((1 if k == 0 else 2) / dim)
        row = [alpha * math.cos(math.pi * (n + 0.5) * k / dim) for n in range(dim)]
        assert torch.allclose(matrix[k], torch.tensor(row, dtype=torch.float64), atol=1e-12)
    assert dct_matrix(dim).dtype == torch.float32


KERNELS: list[dict[str, Any]] = [
    {},
    {"signed": False},
    {"projection": False},
    {"learned_features": False, "selective": False},
    {"frequency": 3.0},
    {"frequency": "quasi-random", "learned_features": False, "selective": False, "projection": False, "signed": False},
]


@pytest.mark.parametrize("settings", KERNELS, ids=str)
@pytest.mark.parametrize("dim", [5, 16])
def test_formula(dim: int, settings: dict[str, Any]) -> None:
    """φ = exp(g) φ̃ has the sum and the entries of exp([y, −y] + D − a‖x̂‖²) / 2d."""
    torch.manual_seed(0)
    kernel = Kernel(**settings)
    made, x = feature_map(3, dim, kernel), 2 * torch.randn(2, 3, 7, dim)
    features, scale = (t.double() for t in made(x, SCALING))
    assert features.shape == (2, 3, 7, dim * (2 if kernel.signed else 1)) and scale.shape == (2, 3, 7)
    assert (features > 0).all()
    assert torch.allclose(features.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64), atol=1e-6)
    terms = exponents(made, x).exp()
    assert torch.allclose(features, terms / terms.sum(-1, keepdim=True), rtol=1e-4, atol=1e-9)
    if not kernel.learned_features:
        assert not scale.any()
        return
    norm = made.norm_weight.double()[:, None] * SCALING * x.double().square().sum(-1)
    expected = terms * (-norm).exp()[..., None] / made.features
    found = features * scale.exp()[..., None]
    assert ((found - expected).abs() / expected.amax(-1, keepdim=True)).max() <= 1e-4


def test_large_inputs_stay_finite() -> None:
    features, scale = feature_map(2, 16, Kernel())(1e3 * torch.randn(1, 2, 9, 16), 1.0)
    assert features.isfinite().all() and scale.isfinite().all()
    assert torch.allclose(features.sum(-1), torch.ones(1, 2, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32(dtype: torch.dtype) -> None:
    made, x = feature_map(2, 16, Kernel()), torch.randn(1, 2, 9, 16).to(dtype)
    for found, expected in zip(made(x, SCALING), made(x.float(), SCALING), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("frequency", [1.0, 4.0])
def test_start(frequency: float) -> None:
    """W, D and the rest start at zero, and a = t² / 2d belongs to T = t."""
    made = feature_map(3, 16, Kernel(frequency=frequency), random=False)
    assert torch.equal(made.frequency, torch.full((3, 16), frequency))
    assert torch.equal(made.norm_weight, torch.full((3,), frequency**2 / 32))
    assert not made.bias.any() and not made.projection.any()


def test_start_estimates_the_softmax_kernel() -> None:
    """To second order e^{g(q) + g(k)} φ(q)·φ(k) is (1 + q̂·k̂ t²/d) / 2d, the expansion of e^{(t²/d) q̂·k̂} / 2d."""
    dim = 16
    made = feature_map(1, dim, Kernel(frequency=math.sqrt(dim)), random=False)
    q, k = (0.01 * torch.randn(1, 1, 50, dim, dtype=torch.float64) for _ in range(2))
    made.double()
    (fq, gq), (fk, gk) = made(q, 1.0), made(k, 1.0)
    assert made(q, 1.0)[1].abs().max() <= 1e-3  # lse and norm cancel
    found = (fq.double() @ fk.double().mT) * (gq[..., None] + gk[..., None, :]).double().exp() * 2 * dim
    expected = (q @ k.mT).exp() - 1
    assert (found - 1 - expected).abs().max() <= 0.01 * expected.abs().max()


def test_quasi_random_normal() -> None:
    drawn = quasi_random_normal(4, 1024, seed=0)
    assert drawn.shape == (4, 1024) and drawn.isfinite().all()
    assert torch.equal(drawn, quasi_random_normal(4, 1024, seed=0))
    assert not torch.equal(drawn, quasi_random_normal(4, 1024, seed=1))
    assert len({tuple(row.tolist()) for row in drawn}) == 4
    for row in drawn:
        assert row.mean().abs() < 0.01 and (row.std() - 1).abs() < 0.02  # 3 % and 2 % for independent draws
        for quantile, z in ((0.025, -1.96), (0.16, -0.9945), (0.5, 0.0), (0.84, 0.9945), (0.975, 1.96)):
            assert abs(row.quantile(quantile).item() - z) < 0.03


def test_fixed_frequencies_are_not_trained() -> None:
    kernel = Kernel(frequency="quasi-random", learned_features=False, selective=False, seed=3)
    made = feature_map(2, 16, kernel)
    assert torch.equal(made.frequency, quasi_random_normal(2, 16, 3))
    assert "frequency" in made.state_dict() and "frequency" not in dict(made.named_parameters())


def test_strength_zero_ignores_the_keys_scale() -> None:
    """b, which starts at 0, multiplies g(k)."""
    child = DiJiangAttention(Kernel(), Layers("X", "attention", (0,), 4, 2, 8, 8, 32), None)
    child.reset_parameters()
    k = torch.randn(2, 2, 9, 8)
    tokens = Tokens(k, k, None, None, None, torch.ones(2, 9, dtype=torch.bool))
    call = Call(None, None, None, scaling=SCALING)
    features, scale = child._key_features(tokens, call)
    assert not scale.any()
    with torch.no_grad():
        child.k_strength.copy_(torch.tensor([1.0, -0.5]))
    expected = child.k_features(k, SCALING)[1] * torch.tensor([1.0, -0.5])[:, None]
    assert torch.equal(child._key_features(tokens, call)[1], expected) and expected.abs().min() > 0
