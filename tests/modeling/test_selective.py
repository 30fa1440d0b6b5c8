"""A decay of each key's own: the fast forms against the definition, and the selective kernel in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.linear_attention import FarState, absorb, chunked, naive
from tests.modeling.test_linear_attention import (
    SCALING,
    assert_gradients_close,
    double,
    gradients,
    inputs,
    keys_of,
    relative,
    run,
)
from tests.models import feed, load, tokens


def decays(x: dict[str, Tensor]) -> Tensor:
    """log γ of each key, mostly slow; now and then one that forgets nearly all."""
    lam = torch.rand(x["gk"].shape, generator=torch.Generator().manual_seed(3))
    return -torch.where(lam > 0.97, 4 * lam, 0.02 * lam)


@pytest.mark.parametrize("window", [0, 1, 16])
@pytest.mark.parametrize("length", [1, 63, 150, 500])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_values(form: str, length: int, window: int) -> None:
    x = inputs(length)
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(decays(x)))
    assert relative(run(form, x, window=window, log_decay=decays(x))[0], reference) <= 1e-5
    constant = naive(**double(x), scaling=SCALING, window=window, log_decay=double(decays(x)).mean((0, 2)))
    assert length < 100 or relative(constant, reference) > 1e-3


@pytest.mark.parametrize("window", [0, 16])
def test_both_sides(window: int) -> None:
    x = inputs(300)
    options: dict[str, Any] = {"scaling": SCALING, "window": window, "causal": False}
    reference = naive(**double(x), **options, log_decay=double(decays(x)))
    assert relative(chunked(**x, **options, log_decay=decays(x))[0], reference) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_going_on_from_a_state(form: str) -> None:
    x = inputs(400)
    log_decay = decays(x)
    reference = naive(**double(x), scaling=SCALING, window=16, log_decay=double(log_decay))
    state = FarState.empty(2, 2, 24, 10, x["v"])
    for part in (slice(0, 100), slice(100, 200)):
        state = absorb(state, **keys_of(x, part), log_decay=log_decay[..., part])
    rest = {name: t[:, :, 216 if name in ("q", "fq", "gq") else 200 :] for name, t in x.items()}
    out, _ = run(form, rest, window=16, log_decay=log_decay[..., 200:], state=state)
    assert relative(out, reference[:, :, 216:]) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("left,right", [(70, 0), (0, 70)])
def test_padding(form: str, left: int, right: int) -> None:
    x = inputs(300)
    log_decay, mask = decays(x), torch.ones(2, 300, dtype=torch.bool)
    real = slice(left, 300 - right)
    mask[1, :left], mask[1, 300 - right :] = False, False
    out, _ = run(form, x, window=0, log_decay=log_decay, mask=mask)
    alone = {name: t[1:, :, real] for name, t in x.items()}
    reference = naive(**double(alone), scaling=SCALING, window=0, log_decay=double(log_decay[1:, :, real]))
    assert relative(out[1:, :, real], reference) <= 1e-5


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_gradients(form: str, window: int) -> None:
    x = inputs(230)
    weight = torch.randn(2, 4, 230, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = gradients("naive", double(x), double(decays(x)), weight, window=window)
    found = gradients(form, x, decays(x), weight, window=window)
    assert_gradients_close(found, reference, window)
    assert reference["log_decay"].abs().max() > 1e-6


def test_documents_of_a_packed_row_decay_by_their_own_keys() -> None:
    x = inputs(300)
    segments = torch.bucketize(torch.arange(300), torch.tensor([70, 75, 220]), right=True).expand(2, -1)
    out, _ = chunked(**x, scaling=SCALING, window=5, log_decay=decays(x), segments=segments)
    for part in (slice(0, 70), slice(70, 75), slice(75, 220), slice(220, 300)):
        alone = {name: t[:, :, part] for name, t in x.items()}
        options = {"window": 5, "log_decay": double(decays(x)[..., part])}
        reference = naive(**double(alone), scaling=SCALING, **options)
        assert relative(out[:, :, part], reference) <= 1e-5
    mixed, _ = chunked(**x, scaling=SCALING, window=5, log_decay=decays(x))
    assert relative(mixed[:, :, 220:], out[:, :, 220:].double()) > 1e-2


@pytest.mark.parametrize("variant", ["default", "pure"])
def test_hidden_states_move_what_is_remembered(variant: str) -> None:
    model: Any = load("llama", variant)
    ids = tokens(2, 300)
    with torch.no_grad():
        out = model(ids).logits
        parts, _ = feed(model, ids, (100, 1, 1, 60, *[1] * 138))
        assert (out - parts).abs().max() <= 1e-4
        for module in model.modules():
            if hasattr(module, "selection"):
                module.selection.zero_()
        assert (model(ids).logits - out)[:, -1].abs().max() > 1e-3
