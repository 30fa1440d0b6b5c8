"""Attention without exact rows, in chunks and one token after the other, against the definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.state import State
from tests.modeling import naive
from tests.modeling.forms import DECAYS, by_chunks, by_step, inputs, numbered, padding, part, relative
from tests.modeling.naive import Inputs

EXACT = 1e-12  # in float64
FORMS: dict[str, Callable[..., Any]] = {
    "chunks": by_chunks,
    "steps": by_step,
    "both sides": lambda *args, **options: by_chunks(*args, **options, causal=False),
}


def assert_as_defined(form: str, x: Inputs, normalize: bool = True, **options: Any) -> Tensor:
    expected = naive.linear(x, normalize, causal=form != "both sides")
    found = FORMS[form](x, normalize, **options)[0]
    assert relative(found, expected) <= EXACT
    assert relative(FORMS[form](x.map(Tensor.float), normalize, **options)[0], expected) <= 1e-4
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 16, 63, 391])
def test_values(length: int, decay: str, normalize: bool, form: str) -> None:
    x = inputs(length, decay=decay)
    found = assert_as_defined(form, x, normalize)
    if length == 391:  # early tokens count, and each decay does
        other = x._replace(v=x.v.clone())
        other.v[:, :, :300] += 1
        assert relative(FORMS[form](other, normalize)[0][:, :, -1], found[:, :, -1]) > 1e-2
        still = x._replace(decay=inputs(1, decay="none").decay)
        assert decay == "none" or relative(FORMS[form](still, normalize)[0], found) > 1e-3


@pytest.mark.parametrize("form", ["chunks", "both sides"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 128])
@pytest.mark.parametrize("heads", [(4, 4, 7), (6, 1, 20), (3, 1, 1)], ids=str)
def test_heads_and_sizes_of_chunks(heads: tuple[int, int, int], chunk: int, form: str) -> None:
    """The longest chunk as well: the decays of its features stay within float32."""
    x = inputs(150, heads=heads[0], kv_heads=heads[1], value_dim=heads[2])
    assert_as_defined(form, x, chunk=chunk)


@pytest.mark.parametrize("form", FORMS)
def test_features_that_forget_as_fast_as_they_can(form: str) -> None:
    x = inputs(150, decay="features")
    assert x.decay.features is not None
    x.decay.features.fill_(-0.5)
    x.decay.features[..., ::3] = 0
    assert_as_defined(form, x, **({} if form == "steps" else {"chunk": 64}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [(80, 80), (-80, -80), (-80, 80), (80, -80)], ids=str)
def test_log_scales_that_float32_could_not_hold_as_factors(ends: tuple[int, int], form: str) -> None:
    x = inputs(150)
    assert x.written is not None
    x = x._replace(written=x.written + torch.linspace(*ends, 150, dtype=torch.float64)[:, None])
    assert_as_defined(form, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, form: str) -> None:
    """Values are the only tensor of such numbers."""
    x = inputs(210)
    x = x._replace(v=x.v.to(dtype))
    found = FORMS[form](x.map(Tensor.float)._replace(v=x.v))[0]
    assert found.dtype == torch.float32
    assert relative(found, naive.linear(x.map(Tensor.double), True, causal=form != "both sides")) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_padding(normalize: bool, form: str) -> None:
    """Neither counts nor decays, at either end, in the middle and everywhere."""
    x = inputs(150, batch=5)
    real = padding(150, [(0, 0), (75, 0), (0, 45), (35, 20), (0, 0)])
    real[4] = torch.rand(150, generator=torch.Generator().manual_seed(0)) > 0.4
    x = x.map(lambda t: t.masked_fill(~real[:, None, :, None], 3.0 if t.amax() > 0 else -3.0))
    found, kept = FORMS[form](x, normalize, real=real)[0], real[:, None, :, None]
    assert found.isfinite().all()
    expected = naive.linear(x, normalize, real, causal=form != "both sides")
    assert relative(found * kept, expected * kept) <= EXACT


@pytest.mark.parametrize("form", ["chunks", "both sides"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
@pytest.mark.parametrize("decay", DECAYS)
def test_documents(decay: str, chunk: int, form: str) -> None:
    x, documents = inputs(210, decay=decay), numbered([[1, 4, 64, 3, 101, 1, 36], [130, 80]])
    expected = naive.linear(x, True, documents=documents, causal=form != "both sides")
    assert relative(FORMS[form](x, chunk=chunk, documents=documents)[0], expected) <= EXACT
    assert relative(FORMS[form](x, chunk=chunk)[0][:, :, -30:], expected[:, :, -30:]) > 1e-2


# ---------------------------------------------------------------------------------------------------------- the state


def sums(state: State) -> list[Tensor]:
    return [state.log_weight, state.value]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_one_call(padded: bool, normalize: bool) -> None:
    x = inputs(210)
    real = padding(210, [(70, 0), (0, 25)] if padded else [(0, 0), (0, 0)])
    whole, last = by_chunks(x, normalize, real=real)
    state, outputs, start = None, [], 0
    for turn, size in enumerate((1, 5, 16, 63, 1, 1, 30, 65, 28)):
        span = slice(start, start + size)
        form = (by_chunks, by_step)[turn % 2]
        out, state = form(part(x, span), normalize, state=state, real=real[:, span])
        outputs.append(out)
        start += size
    assert start == 210 and state is not None and last is not None
    kept = real[:, None, :, None]
    assert relative(torch.cat(outputs, 2) * kept, whole * kept) <= EXACT
    for found, expected in zip(sums(state), sums(last), strict=True):
        assert relative(found, expected) <= EXACT


@pytest.mark.parametrize("tail", [1, 7, 30, 100])
def test_what_is_left_is_the_state_of_the_last_document(tail: int) -> None:
    x = inputs(210)
    _, state = by_chunks(x, documents=numbered([[210 - tail, tail]] * 2))
    _, expected = by_chunks(part(x, slice(210 - tail, None)))
    assert state is not None and expected is not None
    for found, wanted in zip(sums(state), sums(expected), strict=True):
        assert relative(found, wanted) <= EXACT


@torch.no_grad()
def test_unnormalised_sum_does_not_overflow() -> None:
    """The published formulation multiplies by γ⁻ⁿ, which is e^600 here; this is the plain recurrence at any length."""
    length = 20_000
    x = inputs(length, batch=1, heads=2, kv_heads=2, dim=2, value_dim=3, decay="head")
    assert x.written is not None and x.decay.head is not None
    x.decay.head[:] = torch.tensor([-600 / length, -0.002])[None, :, None, None]
    found, _ = by_chunks(x.map(Tensor.float), False)
    expected = naive.linear(part(x, slice(length - 8000, None)), False)  # e^-16 is left of what was before
    assert relative(found[:, :, -100:], expected[:, :, -100:]) <= 1e-4
