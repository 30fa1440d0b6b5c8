"""Gradients of the fast forms in float64 and float32, against those of the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling import table
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.table import Logits
from tests.modeling import naive
from tests.modeling.forms import (
    DECAYS,
    LOGITS,
    SMALL,
    both_sides,
    by_blocks,
    by_chunks,
    by_step,
    inputs,
    numbered,
    padding,
    part,
    relative,
)
from tests.modeling.naive import Inputs

NAMES = ("q", "k", "v", "features", "written", "head", "each feature")


def gradients(form: Callable[[Inputs], Tensor], x: Inputs, weight: Tensor, *others: Tensor) -> dict[str, Tensor]:
    """Of the sum of the output times ``weight``, of every tensor that x has and of others."""
    x = x.map(lambda t: t.detach().clone().requires_grad_())
    leaves = {name: t for name, t in zip(NAMES, (*x[:5], *x.decay), strict=True) if t is not None}
    leaves |= {f"other {i}": t for i, t in enumerate(others)}
    found = torch.autograd.grad((form(x) * weight).sum(), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.abs().max() <= 1e-12:
            assert found[name].abs().max() <= tolerance, name
        else:
            assert relative(found[name], gradient) <= tolerance, name


def weights(x: Inputs, seed: int = 7) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*x.q.shape[:3], x.v.shape[-1], generator=made, dtype=torch.float64)


FORMS: dict[str, Callable[..., Tensor]] = {
    "blocks": lambda *args, **options: by_blocks(*args, **options)[0],
    "both sides": both_sides,
}
# Finite differences would see nothing else: which keys stay does not change by small steps.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [*DECAYS, "no state"])
@pytest.mark.parametrize("kernel", [SMALL, Kernel(window=10, block=5, memory=3, sinks=7)], ids=["16", "5"])
def test_table(kernel: Kernel, state: str, form: str) -> None:
    x = inputs(90, state=state != "no state", decay=state)
    weight, causal = weights(x), form != "both sides"
    expected = gradients(lambda x: naive.table(x, kernel, LOGITS, causal=causal), x, weight)
    assert_same(gradients(lambda x: FORMS[form](x, kernel), x, weight), expected, 1e-11)
    assert_same(gradients(lambda x: FORMS[form](x, kernel), x.map(Tensor.float), weight.float()), expected, 1e-4)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected.values())
    last = torch.zeros_like(weight)
    last[:, :, -1] = 1
    far = gradients(lambda x: FORMS[form](x, kernel), x, last)
    assert far["v"][:, :, :40].abs().max() > 1e-3  # early tokens matter to the last


@pytest.mark.parametrize("form", FORMS)
def test_soft_capped_logits_and_a_sink(form: str) -> None:
    x, sink = inputs(90), torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64).requires_grad_()
    logits, weight, causal = Logits(0.3, 1.5, sink), weights(x), form != "both sides"
    expected = gradients(lambda x: naive.table(x, SMALL, logits, causal=causal), x, weight, sink)
    assert_same(gradients(lambda x: FORMS[form](x, SMALL, logits), x, weight, sink), expected, 1e-11)
    assert expected["other 0"].abs().min() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["padding", "documents"])
def test_padding_and_documents(where: str, form: str) -> None:
    x = inputs(120)
    weight, options = weights(x), {}
    if where == "padding":
        options["real"] = padding(120, [(45, 0), (13, 30)])
        weight = weight * options["real"][:, None, :, None]
    else:
        options["documents"] = numbered([[1, 70, 4, 45], [50, 70]])
    causal = form != "both sides"
    expected = gradients(lambda x: naive.table(x, SMALL, LOGITS, causal=causal, **options), x, weight)
    found = gradients(lambda x: FORMS[form](x, SMALL, **options), x, weight)
    assert_same(found, expected, 1e-11)
    if where == "padding":
        for name, gradient in found.items():
            assert not gradient.transpose(1, 2)[~options["real"]].any(), name


def test_through_a_past() -> None:
    """Truncated nowhere: a table passes gradients on to the keys in it, but for those of keys that came to the memory
    by way of a cache, which are the same."""
    x = inputs(130)
    weight = weights(x)

    def in_pieces(x: Inputs) -> Tensor:
        past, outputs = None, []
        for span in (slice(50), slice(50, 51), slice(51, 96), slice(96, 130)):
            out, past = by_blocks(part(x, span), SMALL, past=past)
            outputs.append(out)
        return torch.cat(outputs, 2)

    assert_same(
        gradients(in_pieces, x, weight), gradients(lambda x: naive.table(x, SMALL, LOGITS), x, weight), 1e-11
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("numbers", [1, 2**12])
def test_pieces_change_nothing(numbers: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(90)
    weight = weights(x)
    whole = gradients(lambda x: FORMS[form](x, SMALL), x, weight)
    monkeypatch.setattr(table, "PIECE", numbers)
    assert_same(gradients(lambda x: FORMS[form](x, SMALL), x, weight), whole, 1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_wide_log_scales(form: str) -> None:
    """Beyond what float32 holds as factors, and between documents further apart still."""
    x = inputs(120, spread=5.0)
    assert x.written is not None and x.features is not None
    slope = torch.linspace(-80, 80, 120, dtype=torch.float64)[:, None]
    x = x._replace(written=x.written + slope, features=x.features - 80)
    weight, causal = weights(x), form != "both sides"
    expected = gradients(lambda x: naive.table(x, SMALL, LOGITS, causal=causal), x, weight)
    assert_same(gradients(lambda x: FORMS[form](x, SMALL), x.map(Tensor.float), weight.float()), expected, 1e-4)

    documents = numbered([[60, 60], [20, 100]])
    apart = x.map(Tensor.float)._replace(written=(x.written + 400 * documents[:, None, :, None]).float())
    found = gradients(lambda x: FORMS[form](x, SMALL, documents=documents), apart, weight.float())
    assert all(gradient.isfinite().all() for gradient in found.values())


# ------------------------------------------------------------------------------------------------- without exact rows


@pytest.mark.parametrize("form", ["chunks", "steps", "both sides"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool, decay: str, form: str) -> None:
    x = inputs(60, decay=decay)
    weight, options = weights(x), {"causal": form != "both sides"}
    run: Any = by_step if form == "steps" else by_chunks
    given = {} if form == "steps" else options
    expected = gradients(lambda x: naive.linear(x, normalize, **options), x, weight)
    assert_same(gradients(lambda x: run(x, normalize, **given)[0], x, weight), expected, 1e-11)
    low = gradients(lambda x: run(x, normalize, **given)[0], x.map(Tensor.float), weight.float())
    assert_same(low, expected, 1e-4)


@pytest.mark.parametrize("form", ["chunks", "both sides"])
@pytest.mark.parametrize("where", ["padding", "documents"])
def test_linear_with_padding_and_documents(where: str, form: str) -> None:
    x = inputs(120)
    weight, options = weights(x), {}
    if where == "padding":
        options["real"] = padding(120, [(45, 0), (13, 30)])
        weight = weight * options["real"][:, None, :, None]
    else:
        options["documents"] = numbered([[1, 70, 4, 45], [50, 70]])
    causal = form != "both sides"
    expected = gradients(lambda x: naive.linear(x, True, causal=causal, **options), x, weight)
    assert_same(gradients(lambda x: by_chunks(x, causal=causal, **options)[0], x, weight), expected, 1e-11)


def test_linear_through_a_state() -> None:
    x = inputs(100)
    weight = weights(x)

    def in_pieces(x: Inputs) -> Tensor:
        first, state = by_chunks(part(x, slice(43)))
        second, state = by_step(part(x, slice(43, 50)), state=state)
        return torch.cat([first, second, by_chunks(part(x, slice(50, None)), state=state)[0]], 2)

    assert_same(gradients(in_pieces, x, weight), gradients(lambda x: naive.linear(x, True), x, weight), 1e-11)
