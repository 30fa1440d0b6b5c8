"""What a state forgets, against the formula, and what hidden states do to it in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.decay import StateDecay, TokenGates
from tests.models import difference, feed, kernels, load, tokens

HEADS, KV_HEADS, FEATURES, HIDDEN, RANK = 4, 2, 6, 10, 3


def made(kernel: Kernel, moved: float = 0.7) -> tuple[TokenGates, StateDecay]:
    torch.manual_seed(0)
    gates, decay = TokenGates(KV_HEADS, HIDDEN, kernel), StateDecay(HEADS, KV_HEADS, FEATURES, kernel)
    with torch.no_grad():
        for part in (gates, decay):
            part.reset_parameters()
            for parameter in part.parameters():
                parameter.add_(moved * torch.randn_like(parameter))
    return gates, decay


def hidden_states() -> tuple[Tensor, Tensor]:
    """[B, N, hidden], and the same of length 1 a number in float64."""
    x = 5 * torch.randn(2, 7, HIDDEN)
    wide = x.double()
    return x, wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("rank", [0, RANK])
def test_formula(rank: int, selective: bool) -> None:
    """−log γ is 4 σ(r + w·x) of a head, or e^r without w, and ½ σ(p + B A x) of a feature."""
    gates, decay = made(Kernel(selective=selective, decay_rank=rank))
    (x, unit), k = hidden_states(), torch.randn(2, KV_HEADS, 7, 8)
    of_tokens = gates(x) if selective or rank else None
    (head, features), log_scale = decay(k, of_tokens)
    r = decay.decay.double()
    if selective:
        u, w = (gates.selection.double()[i::2] for i in (0, 1))
        # σ(r − log 4 + …) · 4, so that it is e^r where that is small
        expected = -4 * (r - torch.tensor(4.0).log() + unit @ w.T).sigmoid()
        assert torch.allclose(log_scale.double(), (unit @ u.T).transpose(1, 2)[..., None], atol=1e-5)
    else:
        expected = -r.exp().expand(2, 7, KV_HEADS)
        assert log_scale is None
    assert torch.allclose(head.double(), expected.transpose(1, 2)[..., None], atol=1e-6)
    if not rank:
        assert features is None
        return
    code = unit @ gates.down.double().T
    moved = torch.einsum("gfr,bnr->bgnf", decay.up.double().view(KV_HEADS, FEATURES, rank), code)
    expected = -0.5 * (decay.feature_decay.double()[:, None] - torch.tensor(0.5).log() + moved).sigmoid()
    assert torch.allclose(features.double(), expected, atol=1e-6)


def test_bounds() -> None:
    """However far parameters go, what is kept is at most all, and a block of 64 stays within float32."""
    gates, decay = made(Kernel(decay_rank=RANK), moved=50.0)
    (head, features), _ = decay(torch.randn(2, KV_HEADS, 7, 8), gates(hidden_states()[0]))
    assert -4 <= head.min() <= head.max() <= 0 and -0.5 <= features.min() <= features.max() <= 0
    assert (64 * features).exp().min() > torch.finfo(torch.float32).tiny


def test_start() -> None:
    gates, decay = made(Kernel(), moved=0.0)
    (head, features), log_scale = decay(torch.randn(2, KV_HEADS, 7, 8), gates(hidden_states()[0]))
    assert not log_scale.any()  # hidden states do nothing to heads yet
    assert torch.allclose(head, torch.full_like(head, -1 / 256), rtol=0.01)
    assert torch.allclose(features.median(), torch.tensor(-1 / 256), rtol=0.2)


def test_fixed_decays() -> None:
    """RetNet's, one a query head: γ = 1 − e^{linspace(log 1/32, log 1/512)}; or none."""
    kernel = Kernel(decay="retnet", selective=False, decay_rank=0)
    decay = StateDecay(HEADS, KV_HEADS, FEATURES, kernel)
    decay.reset_parameters()
    (head, features), log_scale = decay(torch.randn(2, KV_HEADS, 7, 8), None)
    assert head.shape == (2, HEADS, 7, 1) and features is None and log_scale is None
    gamma = head.exp()[0, :, 0, 0]
    assert torch.allclose(1 - gamma[[0, -1]], torch.tensor([1 / 32, 1 / 512]))
    assert torch.allclose((1 - gamma).log().diff(2), torch.zeros(2), atol=1e-4)
    assert not list(decay.parameters())
    none = StateDecay(HEADS, KV_HEADS, FEATURES, Kernel(decay="none", selective=False, decay_rank=0))
    assert none(torch.randn(2, KV_HEADS, 7, 8), None) == ((None, None), None)


@pytest.mark.parametrize("variant", ["frequency", "pure"])
@torch.no_grad()
def test_hidden_states_move_what_is_remembered(variant: str) -> None:
    model: Any = load("llama", variant)
    ids = tokens(2, 300)
    out = model(ids).logits
    parts, _ = feed(model, ids, (100, 1, 1, 60, *[1] * 138))
    assert difference(out, parts) <= 1e-4
    for of, name in (("gates", "selection"), ("decay", "up")):
        for child in kernels(model):
            getattr(getattr(child, of), name).zero_()
        without = model(ids).logits
        assert (without - out)[:, -1].abs().max() > 1e-3
        out = without
