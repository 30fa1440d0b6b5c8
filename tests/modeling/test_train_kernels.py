"""Training by kernels against the definition in float64, values and gradients: on a GPU, or in Triton's interpreter,
where flash-linear-attention's own kernels run too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dijiang_convert.modeling import accelerated, linear_attention
from dijiang_convert.modeling.linear_attention import FarState, absorb, chunked
from tests.interpreter import DEVICE, run_fla, take_kernels
from tests.modeling.test_chunk_kernels import as_sums, moved
from tests.modeling.test_linear_attention import (
    SCALING,
    assert_gradients_close,
    double,
    gradients,
    inputs,
    keys_of,
    relative,
)
from tests.modeling.test_selective import decays, part_of

near_kernels = pytest.importorskip("dijiang_convert.modeling.near_kernels", exc_type=ImportError)
TOLERANCE = 1e-5 if DEVICE == "cpu" else 5e-3  # flash-linear-attention multiplies in TF32 on a GPU


# -------------------------------------------------------------------------------------------------------- near part


@pytest.mark.parametrize(
    ("past", "window", "softcap", "dims"),
    [(0, 16, None, (2, 1, 12, 10)), (10, 1, 1.5, (2, 2, 5, 20)), (40, 64, None, (2, 1, 16, 16))],
)
def test_near_part(past: int, window: int, softcap: float | None, dims: tuple[int, int, int, int]) -> None:
    heads, kv_heads, dim, value_dim = dims
    x = inputs(70, past, batch=1, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    mask = torch.ones(1, 70 + past, dtype=torch.bool)
    mask[0, : past + 20] = False
    options: dict[str, Any] = {"scaling": SCALING, "window": window, "softcap": softcap}
    wide = [x[name].double().requires_grad_() for name in "qkv"]
    mine = [x[name].to(DEVICE).requires_grad_() for name in "qkv"]
    out, lse = near_kernels.near_attention(*mine, **options, mask=mask.to(DEVICE))
    wanted, wanted_lse = linear_attention.near_attention(*wide, **options, valid=mask)
    real = slice(20, None)
    assert relative(out[:, :, real].cpu(), wanted[:, :, real]) <= 1e-5
    assert relative(lse[:, :, real].cpu(), wanted_lse[:, :, real]) <= 1e-5
    weight, of_lse = torch.randn(1, heads, 50, value_dim), torch.randn(1, heads, 50)
    for a, b, device in ((out, lse, DEVICE), (wanted, wanted_lse, "cpu")):
        ((a[:, :, real] * weight.to(device)).sum() + (b[:, :, real] * of_lse.to(device)).sum()).backward()
    for found, reference in zip(mine, wide, strict=True):
        assert found.grad is not None and reference.grad is not None
        assert relative(found.grad.cpu(), reference.grad) <= 1e-5


def test_near_part_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    take_kernels(monkeypatch)
    x = inputs(70, batch=1, heads=2, kv_heads=1)
    mine = [x[name].bfloat16().to(DEVICE).requires_grad_() for name in "qkv"]
    wide = [t.detach().clone().cpu().double().requires_grad_() for t in mine]
    weight = torch.randn(1, 2, 70, 10)
    out, lse = near_kernels.near_attention(*mine, scaling=SCALING, window=16, softcap=None, mask=None)
    wanted, wanted_lse = linear_attention.near_attention(
        *wide, scaling=SCALING, window=16, valid=torch.ones(1, 70, dtype=torch.bool)
    )
    assert relative(out.cpu(), wanted) <= 1e-2 and relative(lse.cpu(), wanted_lse) <= 1e-2
    for a, b in ((out, lse), (wanted, wanted_lse)):
        ((a * weight.to(a.device)).sum() + b.sum()).backward()
    for found, reference in zip(mine, wide, strict=True):
        assert found.grad is not None and found.grad.dtype == torch.bfloat16 and reference.grad is not None
        assert relative(found.grad.cpu(), reference.grad) <= 1e-2


# ------------------------------------------------------------------------------------------------------ both parts


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fla_kernels.train`, which `chunked` takes then."""
    kernels = pytest.importorskip("dijiang_convert.modeling.fla_kernels", exc_type=ImportError)
    run_fla(monkeypatch)
    calls: list[int] = []
    far_attention = kernels.far_attention

    def counted(*args: Any) -> Any:
        calls.append(1)
        return far_attention(*args)

    monkeypatch.setattr(kernels, "far_attention", counted)
    yield kernels.train
    assert calls, "the kernels were not taken"


@pytest.mark.parametrize(("window", "of"), [(16, None), (16, "both"), (0, "keys")])
def test_gradients(train: Any, window: int, of: str | None) -> None:
    length = 90
    x = inputs(length, batch=1, heads=2, kv_heads=1)
    given = {} if of is None else decays(x, of)
    weight = torch.randn(1, 2, length, 10)
    of_keys, of_features = given.get("log_decay"), given.get("feature_decay")
    reference = gradients("naive", double(x), double(of_keys), weight, double(of_features), window=window)
    found = gradients("chunked", moved(x), moved(of_keys), moved(weight), moved(of_features), window=window)
    assert_gradients_close({name: t.cpu() for name, t in found.items()}, reference, window, 10 * TOLERANCE)
    assert reference["v"][:, :, : length - window - 64].abs().max() > 1e-3  # far keys count


def test_state_padding_and_sink(train: Any) -> None:
    """On from a state, with more keys than the window, padding and a sink: as plain torch has it, state and all."""
    earlier = 40
    x = inputs(40, earlier + 30, batch=2, heads=2, kv_heads=1)
    given, mask = decays(x), torch.ones(2, 70, dtype=torch.bool)
    mask[0, :35] = False
    state = absorb(FarState.empty(2, 1, 24, 10, x["v"]), **keys_of(x, slice(earlier)), **part_of(given, slice(earlier)))
    rest = {name: t if name in ("q", "fq", "gq") else t[:, :, earlier:] for name, t in x.items()}
    given = part_of(given, slice(earlier, None))
    options = {"scaling": SCALING, "window": 16, "softcap": 1.5, "sink": torch.tensor([0.5, 2.0]), "mask": mask}
    expected, last = chunked(**double(rest), **{**options, "sink": double(options["sink"])}, **double(given),
                             state=FarState(*map(double, state)))  # fmt: skip
    assert last is not None
    rest["q"].requires_grad_()
    out, found = chunked(**moved(rest), **moved(options), **moved(given), state=moved(state))
    assert found is not None
    real = mask[:, None, 30:, None]
    assert relative(out.detach().cpu() * real, expected * real) <= TOLERANCE
    assert relative(as_sums(FarState(*(t.detach().cpu() for t in found))), as_sums(last)) <= TOLERANCE


def test_bfloat16(train: Any) -> None:
    x = inputs(70, batch=1, heads=2, kv_heads=1)
    for name in ("q", "k", "v"):
        x[name] = x[name].bfloat16()
    of_features = decays(x, "features")["feature_decay"]
    weight = torch.randn(1, 2, 70, 10)
    reference = gradients("naive", double(x), None, weight, double(of_features), window=16)
    found = gradients("chunked", moved(x), None, moved(weight), moved(of_features), window=16)
    assert found["k"].dtype == torch.bfloat16
    assert_gradients_close({name: t.cpu() for name, t in found.items()}, reference, 16, 2e-2)


def test_without_flash_linear_attention_there_is_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    monkeypatch.setattr(accelerated.logger, "warning_once", notices.append)
    monkeypatch.setattr(accelerated, "MODE", "interpret")
    monkeypatch.setattr(accelerated, "FLA", False)
    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    assert accelerated.chunked_form(q, q) is None
    assert len(notices) == 1 and "flash-linear-attention" in notices[0] and "dijiang-convert[cuda]" in notices[0]
