"""A decay of each key's own, or of each feature's: the fast forms against the definition, and in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.linear_attention import FASTEST, LONGEST_CHUNK, FarState, absorb, chunked, naive
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
from tests.models import feed, kernels, load, tokens

OF = {"keys": ("log_decay",), "features": ("feature_decay",), "both": ("log_decay", "feature_decay")}


def decays(x: dict[str, Tensor], of: str = "both") -> dict[str, Tensor]:
    """log γ of each key, mostly slow and now and then one that forgets nearly all; of each feature, from none to the
    fastest."""
    generator = torch.Generator().manual_seed(3)
    lam = torch.rand(x["gk"].shape, generator=generator)
    delta = torch.rand(x["fk"].shape, generator=generator)
    speed = torch.logspace(-3, 0, delta.shape[-1])  # features differ
    found = {
        "log_decay": -torch.where(lam > 0.97, 4 * lam, 0.02 * lam),
        "feature_decay": -FASTEST * torch.where(delta > 0.9, 1.0, delta * speed),
    }
    return {name: found[name] for name in OF[of]}


def part_of(given: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: t[:, :, part] for name, t in given.items()}


@pytest.mark.parametrize("window", [0, 1, 16])
@pytest.mark.parametrize("length", [1, 63, 250])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("of", OF)
def test_values(of: str, form: str, length: int, window: int) -> None:
    x = inputs(length)
    given = decays(x, of)
    reference = naive(**double(x), scaling=SCALING, window=window, **double(given))
    assert relative(run(form, x, window=window, **given)[0], reference) <= 1e-5
    for name in given:  # each counts, and so does that they differ
        mean = {**double(given), name: double(given[name]).mean((0, 2), keepdim=True).expand_as(given[name])}
        constant = naive(**double(x), scaling=SCALING, window=window, **mean)
        assert length < 100 or relative(constant, reference) > 1e-3


@pytest.mark.parametrize("chunk_size", [7, LONGEST_CHUNK, 10 * LONGEST_CHUNK])
def test_the_fastest_decay_of_features_over_a_whole_chunk(chunk_size: int) -> None:
    x = inputs(300)
    given = {"feature_decay": torch.full(x["fk"].shape, -FASTEST)}
    given["feature_decay"][..., ::3] = 0
    reference = naive(**double(x), scaling=SCALING, window=16, **double(given))
    assert relative(run("chunked", x, window=16, chunk_size=chunk_size, **given)[0], reference) <= 1e-5


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("of", OF)
def test_both_sides(of: str, window: int) -> None:
    x = inputs(300)
    options: dict[str, Any] = {"scaling": SCALING, "window": window, "causal": False}
    given = decays(x, of)
    reference = naive(**double(x), **options, **double(given))
    assert relative(chunked(**x, **options, **given)[0], reference) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("of", OF)
def test_going_on_from_a_state(of: str, form: str) -> None:
    x = inputs(400)
    given = decays(x, of)
    reference = naive(**double(x), scaling=SCALING, window=16, **double(given))
    state = FarState.empty(2, 2, 24, 10, x["v"])
    for part in (slice(0, 100), slice(100, 200)):
        state = absorb(state, **keys_of(x, part), **part_of(given, part))
    rest = {name: t[:, :, 216 if name in ("q", "fq", "gq") else 200 :] for name, t in x.items()}
    given = part_of(given, slice(200, None))
    out, _ = run(form, rest, window=16, state=state, **given)
    assert relative(out, reference[:, :, 216:]) <= 1e-5
    again = naive(**double(rest), scaling=SCALING, window=16, state=FarState(*map(double, state)), **double(given))
    assert relative(again.float(), reference[:, :, 216:]) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("left,right", [(70, 0), (0, 70)])
def test_padding(form: str, left: int, right: int) -> None:
    x = inputs(300)
    given, mask = decays(x), torch.ones(2, 300, dtype=torch.bool)
    real = slice(left, 300 - right)
    mask[1, :left], mask[1, 300 - right :] = False, False
    out, _ = run(form, x, window=0, mask=mask, **given)
    alone = {name: t[1:, :, real] for name, t in x.items()}
    own = {name: double(t[1:, :, real]) for name, t in given.items()}
    reference = naive(**double(alone), scaling=SCALING, window=0, **own)
    assert relative(out[1:, :, real], reference) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("of", OF)
def test_padding_in_the_middle_decays_nothing(of: str, form: str) -> None:
    x = inputs(300)
    given, mask = decays(x, of), torch.ones(2, 300, dtype=torch.bool)
    mask[:, 80:150] = False
    out, state = run(form, x, window=0, mask=mask, **given)
    real = mask[0]
    alone = {name: t[:, :, real] for name, t in x.items()}
    own = {name: double(t[:, :, real]) for name, t in given.items()}
    reference = naive(**double(alone), scaling=SCALING, window=0, **own)
    assert relative(out[:, :, real], reference) <= 1e-5
    start = FarState.empty(2, 2, 24, 10, x["v"])
    absorbed = absorb(start, x["fk"], x["gk"], x["v"], **given, valid=mask)
    scale = (state.m - absorbed.m).exp()[..., None, None]
    assert relative(absorbed.s, state.s.double() * scale) <= 1e-5


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("of", OF)
def test_gradients(of: str, form: str, window: int) -> None:
    x = inputs(230)
    weight = torch.randn(2, 4, 230, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given = decays(x, of)
    reference = gradients("naive", double(x), weight=weight, **{"log_decay": None, **double(given)}, window=window)
    found = gradients(form, x, weight=weight, **{"log_decay": None, **given}, window=window)
    assert_gradients_close(found, reference, window)
    assert all(reference[name].abs().max() > 1e-6 for name in given)


@pytest.mark.parametrize("of", OF)
def test_documents_of_a_packed_row_decay_by_their_own_keys(of: str) -> None:
    x = inputs(300)
    given = decays(x, of)
    segments = torch.bucketize(torch.arange(300), torch.tensor([70, 75, 220]), right=True).expand(2, -1)
    out, _ = chunked(**x, scaling=SCALING, window=5, segments=segments, **given)
    step, _ = run("recurrent", x, window=5, segments=segments, **given)
    for part in (slice(0, 70), slice(70, 75), slice(75, 220), slice(220, 300)):
        reference = naive(**double(part_of(x, part)), scaling=SCALING, window=5, **double(part_of(given, part)))
        assert relative(out[:, :, part], reference) <= 1e-5
        assert relative(step[:, :, part], reference) <= 1e-5
    mixed, _ = chunked(**x, scaling=SCALING, window=5, **given)
    assert relative(mixed[:, :, 220:], out[:, :, 220:].double()) > 1e-2


@pytest.mark.parametrize("variant", ["default", "pure"])
def test_hidden_states_move_what_is_remembered(variant: str) -> None:
    model: Any = load("llama", variant)
    ids = tokens(2, 300)
    with torch.no_grad():
        out = model(ids).logits
        parts, _ = feed(model, ids, (100, 1, 1, 60, *[1] * 138))
        assert (out - parts).abs().max() <= 1e-4
        for name in ("selection", "decay_up"):
            for module in kernels(model):
                getattr(module, name).zero_()
            without = model(ids).logits
            assert (without - out)[:, -1].abs().max() > 1e-3
            out = without
