"""Gradients of converted models, and what half precision does to them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.table import Logits
from tests.models import (
    KINDS,
    VARIANTS,
    assert_state_is_float32,
    checkpoint,
    difference,
    feed,
    kernels,
    load,
    logits_of,
    randomise,
    root_mean_square,
    tokens,
    typical,
)

LENGTH = 310


@pytest.fixture(scope="module", params=KINDS)
def default(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# While b is 0 the keys' a, which b multiplies, has no effect.
NOT_YET = (".k_features.norm_weight",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", ["converted", "moved"])
def test_every_parameter_learns(kind: str, variant: str, start: str) -> None:
    model = load_converted(checkpoint(kind, variant))
    idle = NOT_YET if start == "converted" else ()
    if start == "moved":
        randomise(model)
    # The log-scales of keys are nearly the same at the start; tables of every query head share what they differ by.
    faint = (".k_features.strength",) if (variant, start) == ("retnet", "converted") else ()
    for name, gradient in gradients(model.train(), tokens(2, 200)).items():
        if name.endswith(idle):
            assert gradient is None or not gradient.any(), name
        else:
            least = 1e-7 if name.endswith(faint) else 1e-6
            assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > least, name


def test_what_cancels_without_a_window_is_absent() -> None:
    names = {
        name.partition(".dijiang.")[2] for name, _ in load_converted(checkpoint("llama", "pure")).named_parameters()
    }
    assert "k_features.strength" in names
    assert not names & {"q_features.offset", "q_features.norm_weight"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["frequency", "pure", "paper", "partial"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: str, variant: str, reentrant: bool) -> None:
    model, ids = load(kind, variant).train(), tokens(2, 200)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients(model, ids).items():
        other = expected[name]
        if gradient is None or other is None:
            assert gradient is other, name
        else:
            assert difference(gradient, other) <= 1e-5 * other.abs().max() + 1e-9, name


def test_gradients_flow_while_caching(default: Any) -> None:
    """A cache in training mode, fed a token at a time, does not write over what backward needs."""
    ids = tokens(1, 90)
    expected = gradients(default, ids)
    default.zero_grad()
    cache, parts = DynamicCache(config=default.config), []
    for piece in (ids[:, :70], *ids[:, 70:].split(1, 1)):
        parts.append(default(piece, past_key_values=cache, use_cache=True).logits)
    default.loss_function(torch.cat(parts, 1), ids, vocab_size=default.config.vocab_size).backward()
    for name, parameter in default.named_parameters():
        other = expected[name]
        assert parameter.grad is not None and other is not None
        assert difference(parameter.grad, other) <= 1e-4 * other.abs().max() + 1e-8, name
    default.zero_grad()


# ---------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("variant", ["frequency", "no-memory", "pure", "paper", "partial"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_the_kernel_in_float32(kind: str, variant: str) -> None:
    model, ids = load(kind, variant), tokens(1, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        found, cache = feed(model, ids, [300, 1])
        full = logits_of(model, ids)
    assert_state_is_float32(cache)
    exact = logits_of(model, ids)
    assert difference(found.float(), full.float()) <= 0.1 * exact.std()
    error = typical if kernels(model)[0].kernel.memory else root_mean_square
    assert error(full.float() - exact) <= 0.1 * exact.std()


@pytest.mark.parametrize("variant", ["frequency", "pure", "paper"])
def test_autocast_leaves_the_kernels_products_alone(variant: str) -> None:
    child = kernels(load("llama", variant))[0]
    q, k, v, hidden = (torch.randn(1, heads, 200, size) for heads, size in ((4, 8), (2, 8), (2, 8), (1, 32)))
    call = Call(None, hidden[:, 0], None, logits=Logits(0.3))
    with torch.no_grad():
        expected = child(q, k, v, None, call)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(child(q, k, v, None, call), expected)


def test_a_cast_kernel_still_accumulates_in_float32(default: Any) -> None:
    """`model.bfloat16()` takes the kernel's parameters along; the state stays as it is."""
    model, ids = copy.deepcopy(default).bfloat16(), tokens(1, LENGTH)
    found, cache = feed(model, ids, [300, 1])
    assert_state_is_float32(cache)
    full = logits_of(model, ids).float()
    assert difference(found.float(), full) <= 0.2 * full.std()
