"""Log-features against their formula, written out in float64 with no transform and no softmax."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.feature_map import FeatureMap, KeyFeatures, QueryFeatures, dct_matrix, quasi_random_normal

SCALING = 0.37


def feature_map(kind: Any, heads: int, head_dim: int, kernel: Kernel, scaled: bool = True, random: bool = True) -> Any:
    made = kind(heads, head_dim, kernel, scaled=scaled)
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


def log_scale(made: FeatureMap, x: Tensor) -> Tensor:
    """−log F − a‖x̂‖², what the log-scale g has besides the sum of all features. [B, H, N, 1]."""
    norm = made.norm_weight.double()[:, None] * SCALING * x.double().square().sum(-1)
    return (-norm - math.log(made.features))[..., None]


@pytest.mark.parametrize("settings", KERNELS, ids=str)
@pytest.mark.parametrize("dim", [5, 16])
@pytest.mark.parametrize("scaled", [True, False])
def test_queries(scaled: bool, dim: int, settings: dict[str, Any]) -> None:
    """e^g φ is exp([y, −y] + D − a‖q̂‖² + c) / F; or φ alone, whose sum is 1, where g is nothing or cancels."""
    torch.manual_seed(0)
    kernel = Kernel(**settings)
    made, x = feature_map(QueryFeatures, 3, dim, kernel, scaled), 2 * torch.randn(2, 3, 7, dim)
    found, expected = made(x, SCALING), exponents(made, x)
    assert found.shape == (2, 3, 7, dim * (2 if kernel.signed else 1)) and found.dtype == torch.float32
    if scaled and kernel.learned_features:
        expected = expected + log_scale(made, x) + made.offset.double()[:, None, None]
    else:
        assert not {"offset", "norm_weight"} & set(dict(made.named_parameters()))
        expected = (expected.exp() / expected.exp().sum(-1, keepdim=True)).log()
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    known: dict[str, Any] = {}
    for _ in range(2):  # with what is kept from one call to the next
        assert torch.equal(made(x, SCALING, known=known), found)
    assert torch.allclose(made(x[:, 1:], SCALING, slice(1, 3)), found[:, 1:], atol=1e-6)


@pytest.mark.parametrize("settings", KERNELS, ids=str)
@pytest.mark.parametrize("dim", [5, 16])
def test_keys(dim: int, settings: dict[str, Any]) -> None:
    """φ is exp([y, −y] + D) over its sum, and b g the logarithm of that sum with −log F − a‖k̂‖², times b."""
    torch.manual_seed(0)
    kernel = Kernel(**settings)
    made, x = feature_map(KeyFeatures, 3, dim, kernel), 2 * torch.randn(2, 3, 7, dim)
    features, scale = made(x, SCALING)
    assert features.shape == (2, 3, 7, dim * (2 if kernel.signed else 1)) and scale.shape == (2, 3, 7, 1)
    terms = exponents(made, x).exp()
    assert torch.allclose(features.exp().sum(-1), torch.ones(2, 3, 7))
    for found, whole in zip(made(x[:, 1:], SCALING, slice(1, 3)), (features, scale), strict=True):
        assert torch.allclose(found, whole[:, 1:], atol=1e-6)
    assert (features - (terms / terms.sum(-1, keepdim=True)).log()).abs().max() <= 1e-4
    if not kernel.learned_features:
        assert not scale.any() and not {"strength", "norm_weight"} & set(dict(made.named_parameters()))
        return
    expected = made.strength.double()[:, None, None] * (terms.sum(-1, keepdim=True).log() + log_scale(made, x))
    assert (scale - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("kind", [QueryFeatures, KeyFeatures])
def test_large_inputs_stay_finite(kind: Any) -> None:
    found = feature_map(kind, 2, 16, Kernel())(1e3 * torch.randn(1, 2, 9, 16), 1.0)
    assert all(t.isfinite().all() for t in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("kind", [QueryFeatures, KeyFeatures])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32(dtype: torch.dtype, kind: Any) -> None:
    made, x = feature_map(kind, 2, 16, Kernel()), torch.randn(1, 2, 9, 16).to(dtype)
    found, expected = made(x, SCALING), made(x.float(), SCALING)
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("frequency", [1.0, 4.0])
def test_start(frequency: float) -> None:
    """W, D and the rest start at zero, and a = t² / 2d belongs to T = t."""
    for kind, last in ((QueryFeatures, "offset"), (KeyFeatures, "strength")):
        made = feature_map(kind, 3, 16, Kernel(frequency=frequency), random=False)
        assert torch.equal(made.frequency, torch.full((3, 16), frequency))
        assert torch.equal(made.norm_weight, torch.full((3,), frequency**2 / 32))
        assert not made.bias.any() and not made.projection.any() and not getattr(made, last).any()


def test_start_estimates_the_softmax_kernel() -> None:
    """To second order e^{g(q) + g(k)} φ(q)·φ(k) is (1 + q̂·k̂ t²/d) / 2d, the expansion of e^{(t²/d) q̂·k̂} / 2d."""
    dim = 16
    kernel = Kernel(frequency=math.sqrt(dim))
    of_queries, of_keys = (feature_map(kind, 1, dim, kernel, random=False) for kind in (QueryFeatures, KeyFeatures))
    q, k = (0.01 * torch.randn(1, 1, 50, dim, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        of_keys.strength.fill_(1.0)
    features, scale = of_keys(k, 1.0)
    assert scale.abs().max() <= 1e-3  # lse and norm cancel
    found = (of_queries(q, 1.0)[:, :, :, None] + (features + scale)[:, :, None]).exp().sum(-1) * 2 * dim
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
    made = feature_map(KeyFeatures, 2, 16, kernel)
    assert torch.equal(made.frequency, quasi_random_normal(2, 16, 3))
    assert "frequency" in made.state_dict() and "frequency" not in dict(made.named_parameters())


def test_strength_zero_ignores_the_keys_scale() -> None:
    """b, which starts at 0, multiplies g(k)."""
    made, k = feature_map(KeyFeatures, 2, 8, Kernel(), random=False), torch.randn(2, 2, 9, 8)
    assert not made(k, SCALING)[1].any()
    with torch.no_grad():
        made.strength.fill_(1.0)
        whole = made(k, SCALING)[1]
        made.strength.copy_(torch.tensor([1.0, -0.5]))
    expected = whole * torch.tensor([1.0, -0.5])[:, None, None]
    assert torch.allclose(made(k, SCALING)[1], expected) and expected.abs().min() > 0
