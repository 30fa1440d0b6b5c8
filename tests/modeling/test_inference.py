"""The forms without gradients against `chunked`, `absorb` and the feature map; models with and without gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dijiang_convert.modeling import attention, inference
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.decoding import absorptions, attend
from dijiang_convert.modeling.linear_attention import FarState, absorb, attend_one, chunked, near_logits
from tests.modeling.test_feature_map import SCALING, feature_map
from tests.modeling.test_linear_attention import relative
from tests.models import KINDS, difference, feed, kernels, load, logits_of, tokens

DECAYS = ("none", "head", "selective", "feature")


def prefill(fq: Tensor, gq: Tensor, **arguments: Any) -> Any:
    """`inference.prefill` by the arguments of `chunked`."""
    features = fq.shape[-1]
    weight = torch.eye(features + 2, features, dtype=fq.dtype).repeat(fq.shape[1], 1, 1)
    weight[:, -1] = 1
    return inference.prefill(xq=fq.log(), weight=weight, gq=gq, **arguments)


def inputs(queries: int, window: int, heads: int = 4, kv_heads: int = 2, decay: str = "feature") -> dict[str, Any]:
    """Float64 arguments of `prefill`."""
    torch.manual_seed(queries)
    batch, dim, values, features, keys = 2, 6, 5, 12, window + queries
    made: dict[str, Any] = {
        "q": torch.randn(batch, heads, queries, dim),
        "k": torch.randn(batch, kv_heads, keys, dim),
        "v": torch.randn(batch, kv_heads, keys, values),
        "fq": torch.randn(batch, heads, queries, features).softmax(-1),
        "gq": torch.randn(batch, heads, queries),
        "fk": torch.randn(batch, kv_heads, queries, features).softmax(-1),
        "gk": 2 * torch.randn(batch, kv_heads, queries),
        "state": FarState(
            torch.rand(batch, kv_heads, features, values + 1).double(), torch.randn(batch, kv_heads).double()
        ),
    }
    if decay == "head":
        made["log_decay"] = -torch.rand(kv_heads) * 0.1
    elif decay != "none":
        made["log_decay"] = -torch.rand(batch, kv_heads, queries) * 0.1
    if decay == "feature":
        made["feature_decay"] = -torch.rand(batch, kv_heads, queries, features) * 0.4
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in made.items()}


def as_chunked(x: dict[str, Any], window: int) -> dict[str, Any]:
    """The same for `chunked`, which takes the far part's tensors of all keys."""

    def longer(t: Tensor) -> Tensor:
        return F.pad(t, (0, 0) * (t.dim() - 3) + (0, window))

    names = ("fk", "gk", "feature_decay", *(["log_decay"] if x.get("log_decay", torch.ones(1)).dim() > 1 else []))
    return {name: longer(t) if name in names else t for name, t in x.items()}


@torch.no_grad()
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", [0, 5, 16, 40])
@pytest.mark.parametrize("queries", [1, 7, 16, 96])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_prefill(queries: int, window: int, decay: str, kv_heads: int) -> None:
    x = inputs(queries, window, kv_heads=kv_heads, decay=decay)
    options: dict[str, Any] = {"scaling": 0.4, "window": window, "chunk_size": 16}
    found = prefill(**x, **options)
    assert found is not None
    expected, state = chunked(**as_chunked(x, window), **options)
    assert state is not None
    assert relative(found[0], expected) <= 1e-12
    assert relative(found[1].s, state.s) <= 1e-12 and torch.equal(found[1].m, state.m)
    other, _ = chunked(**as_chunked({**x, "state": None}, window), **options)
    assert queries <= window or relative(other, expected) > 1e-3  # the far part counts


@torch.no_grad()
@pytest.mark.parametrize("softcap,with_sink", [(None, True), (2.0, False), (2.0, True)])
@pytest.mark.parametrize("window", [5, 16])
def test_prefill_of_padded_rows_with_a_cap_and_a_sink(window: int, softcap: float | None, with_sink: bool) -> None:
    x = inputs(64, window)
    mask = torch.ones(2, window + 64, dtype=torch.bool)
    mask[0, : window + 20] = False
    options: dict[str, Any] = {
        "scaling": 0.4, "window": window, "softcap": softcap, "chunk_size": 16, "mask": mask,
        "sink": torch.randn(4, dtype=torch.float64) if with_sink else None,
    }  # fmt: skip
    found = prefill(**x, **options)
    assert found is not None and found[0].isfinite().all()
    expected, state = chunked(**as_chunked(x, window), **options)
    assert state is not None
    for row, start in ((0, 20), (1, 0)):  # what comes out at padding means nothing
        assert relative(found[0][row, :, start:], expected[row, :, start:]) <= 1e-12
    assert relative(found[1].s, state.s) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("window,missing", [(5, 5), (5, 3), (40, 40)])
def test_keys_that_do_not_exist(window: int, missing: int, kernel: bool, decay: str) -> None:
    """before the first query are masked, whatever stands in their place; kernel: values are as wide as keys, so that
    torch's own attention does the near part."""
    x = inputs(96, window, decay=decay)
    x["state"] = None
    if kernel:
        x["v"] = torch.randn_like(x["k"])
    mask = (torch.arange(window + 96) >= missing).expand(2, -1)
    options: dict[str, Any] = {"scaling": 0.4, "window": window, "chunk_size": 16, "mask": mask}
    expected, state = chunked(**as_chunked(x, window), **options)
    x["gk"][:, :, :missing] += 100
    x["v"][:, :, :missing] += 100
    found = prefill(**x, **options)
    assert found is not None and state is not None
    assert relative(found[0], expected) <= 1e-12
    assert relative(found[1].s, state.s) <= 1e-12 and torch.equal(found[1].m, state.m)


@torch.no_grad()
@pytest.mark.parametrize("window,chunk_size", [(5, 16), (40, 64)])
def test_near_part_without_torchs_kernel(window: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """is the same; values are as wide as keys here, so that the kernel runs."""
    x = inputs(128, window)
    x["v"] = torch.randn_like(x["k"])
    x["state"] = None
    assert inference.flash is not None
    calls: list[int] = []
    kernel = inference.flash
    monkeypatch.setattr(inference, "flash", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    expected = prefill(**x, scaling=0.4, window=window, chunk_size=chunk_size)
    monkeypatch.setattr(inference, "flash", None)
    found = prefill(**x, scaling=0.4, window=window, chunk_size=chunk_size)
    assert calls and relative(found[0], expected[0]) <= 1e-12
    assert relative(found[0], chunked(**as_chunked(x, window), scaling=0.4, window=window)[0]) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_prefill_rounds_as_little(dtype: torch.dtype, tolerance: float) -> None:
    x = inputs(128, 16)
    low = {n: t.to(dtype) if n in ("q", "k", "v") else t.float() if isinstance(t, Tensor) else t for n, t in x.items()}
    low["state"] = FarState(*(t.float() for t in x["state"]))
    found = prefill(**low, scaling=0.4, window=16, chunk_size=16)
    assert found is not None and found[0].dtype == torch.float32
    assert relative(found[0], chunked(**as_chunked(x, 16), scaling=0.4, window=16, chunk_size=16)[0]) <= tolerance


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 16])
def test_prefill_gives_up_where_float32_does(window: int) -> None:
    """One key of a chunk outweighs those before it by e^300: queries between see only what is lost beside it."""
    x = {name: t.float() if isinstance(t, Tensor) else t for name, t in inputs(64, window).items()}
    x["state"] = None
    x["gk"][:, :, 40] = 300.0
    assert prefill(**x, scaling=0.4, window=window, chunk_size=16) is None
    x["gk"][:, :, 40] = 30.0
    assert prefill(**x, scaling=0.4, window=window, chunk_size=16) is not None


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("together", [1, 7])
@pytest.mark.parametrize("lazy", [False, True])
def test_absorptions(decay: str, padded: bool, together: int, lazy: bool) -> None:
    x = inputs(50, 0, decay=decay)
    keys = {name: x[name] for name in ("fk", "gk", "v")}
    log_decay, feature_decay = x.get("log_decay"), x.get("feature_decay")
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0, :10] = not padded
    expected = absorb(x["state"], **keys, log_decay=log_decay, feature_decay=feature_decay, valid=valid)
    cache = DiJiangCacheLayer(0)
    cache.set_state(FarState(*(t.clone() for t in x["state"])))
    start = 0
    while start < 50:
        t = slice(start, start + together)
        cache.ahead = absorptions(
            cache.lagging_state.m, cache.lag, **{name: each[:, :, t] for name, each in keys.items()},
            log_decay=log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[..., t],
            feature_decay=None if feature_decay is None else feature_decay[:, :, t],
            valid=valid[:, t] if padded else None, lazy=lazy,
        )  # fmt: skip
        while cache.ahead:
            cache.absorb_next()
            start += 1
    assert (cache.lag is not None) == lazy
    state = cache.state
    assert cache.lag is None
    scale = (state.m - expected.m).exp()[..., None, None]  # the maximum is of another moment
    assert relative(state.s * scale, expected.s) <= 1e-12


def test_decays_that_are_too_strong_to_lack() -> None:
    """are made up for at once, and so is a first key after none; the state lacks only what float32 holds."""
    torch.manual_seed(0)
    keys = {"fk": torch.rand(1, 2, 40, 6), "gk": 30 * torch.randn(1, 2, 40), "v": torch.randn(1, 2, 40, 5)}
    decay = {"log_decay": -4 * torch.rand(1, 2, 40), "feature_decay": -2 * torch.rand(1, 2, 40, 6)}
    expected = absorb(FarState.empty(1, 2, 6, 5, keys["v"]), **keys, **decay)
    cache, start, lags = DiJiangCacheLayer(0), 0, []
    cache.set_state(FarState.empty(1, 2, 6, 5, keys["v"]))
    while start < 40:
        rest = slice(start, start + 16)
        made = {name: each[:, :, rest] for name, each in {**keys, **decay}.items()}
        cache.ahead = absorptions(cache.lagging_state.m, cache.lag, **made)
        while cache.ahead:
            cache.absorb_next()
            lags.append(cache.lag.amin().item())
            start += 1
    assert -inference.MOST_DECAY <= min(lags) < -inference.MOST_DECAY / 4
    state = cache.state
    assert relative(state.s * (state.m - expected.m).exp()[..., None, None], expected.s) <= 1e-5


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("sink", [False, True])
def test_one_softmax(window: int, heads: int, sink: bool) -> None:
    """`attend` does as `attend_one`, or says where it can't."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float64}
    q, k, v = torch.randn(3, heads, 1, 6, **kind), *torch.randn(2, 3, 2, window, 6, **kind)
    state = FarState(torch.rand(3, 2, 8, 7, **kind), torch.randn(3, 2, **kind))
    fq, gq = torch.rand(3, heads, 1, 8, **kind).softmax(-1), torch.randn(3, heads, 1, **kind)
    of_sink = torch.randn(heads, **kind) if sink and window else None
    expected = attend_one(q, k, v, fq, gq, state, scaling=SCALING, sink=of_sink)
    far = fq.log() + (gq + state.m.repeat_interleave(heads // 2, 1)[..., None])[..., None]
    near = near_logits(q, k, SCALING, None, None)
    found = attend(near, v, far, state.s, of_sink)
    assert found is not None and relative(found, expected) <= 1e-12
    assert attend(near, v, far + 800, 0 * state.s, of_sink) is None


@torch.no_grad()
@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"signed": False}, {"projection": False}, {"learned_features": False, "selective": False}]
)
def test_unnormalized_features(changes: dict[str, Any], rows: int, single: bool, size: float) -> None:
    """The same e^g φ; and of keys with a strength, e^{strength · g} φ."""
    made = feature_map(3, 8, Kernel(**changes)).double()
    x = size * torch.randn(2, 3, 1 if single else 9, 8, dtype=torch.float64)[:rows]
    features, scale = made(x, SCALING)
    for strength in (1.0, torch.tensor([[0.0], [0.5], [-1.0]])) if made.scaled else (1.0,):
        found, of_found = made.unnormalized(x, made.prepared(x, SCALING), strength)
        relative_error = relative(found * (of_found - scale * strength).exp()[..., None], features)
        assert relative_error <= (1e-10 if size == 1 else 1e-9)  # of exponents in the thousands
    offset = torch.randn(3, dtype=torch.float64)
    prepared = made.prepared(x, SCALING, offset)
    more = made.log_scale(x, prepared)
    assert (more is None) == (not made.scaled)
    added = torch.zeros_like(x[..., 0]) if more is None else more
    logarithms = torch.cat([x, torch.ones_like(x[..., :1]), added[..., None]], -1) @ prepared.weight
    expected = features.log() + (scale + offset[:, None])[..., None]
    if not made.scaled:  # but for what all features of a query share
        logarithms, expected = logarithms.log_softmax(-1), expected.log_softmax(-1)
    possible = features > 1e-290  # which float64 holds in full
    assert difference(logarithms[possible], expected[possible]) <= 1e-10 * size**2


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["default", "keep", "pure", "paper", "window-only"])
@pytest.mark.parametrize("length", [150, 333])
def test_with_and_without_gradients(kind: str, variant: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in pieces of 64 tokens, through `prefill`, and one as it is trained on."""
    model, ids = load(kind, variant), tokens(2, length)
    monkeypatch.setattr(attention, "PIECE", 1)
    calls = []
    count = lambda *args, **options: calls.append(1) or inference.prefill(*args, **options)  # noqa: E731
    monkeypatch.setattr(attention, "prefill", count)
    found, cache = feed(model, ids[:, :-20], (length - 20,))
    assert len(calls) == (0 if variant in ("paper", "window-only") else len(kernels(model)) * -(-(length - 20) // 64))
    rest, _ = feed(model, ids[:, -20:], (1,), cache)
    with torch.enable_grad():
        expected = model(ids, use_cache=False).logits
    assert difference(torch.cat([found, rest], 1), expected.detach()) <= 1e-4
    assert difference(logits_of(model, ids), expected.detach()) <= 1e-4


def test_a_piece_that_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """takes the way of training, from the same state."""
    model, ids = load("llama"), tokens(1, 300)
    expected = logits_of(model, ids)
    monkeypatch.setattr(attention, "PIECE", 1)
    answers = iter(range(1000))
    monkeypatch.setattr(
        attention, "prefill", lambda *a, **o: None if next(answers) % 3 == 1 else inference.prefill(*a, **o)
    )
    assert difference(logits_of(model, ids), expected) <= 1e-4 and next(answers) > 8


@pytest.mark.parametrize("variant", ["default", "pure", "window-only"])
def test_a_cache_made_in_inference_mode_goes_on_outside(variant: str) -> None:
    model, ids = load("llama", variant), tokens(2, 120)
    with torch.inference_mode():
        cache = model(ids[:, :100], use_cache=True).past_key_values
    found, cache = feed(model, ids[:, 100:110], (1,), cache)
    with torch.inference_mode():
        inside, cache = feed(model, ids[:, 110:115], (1,), cache)
    rest, _ = feed(model, ids[:, 115:], (1,), cache)
    assert difference(torch.cat([found, inside, rest], 1), logits_of(model, ids)[:, 100:]) <= 1e-4


@torch.no_grad()
def test_decoding_allocates_no_state() -> None:
    """The state and the window stay where they are from token to token."""
    model, ids = load("llama"), tokens(1, 100)
    _, cache = feed(model, ids, (100,))

    def places() -> list[int]:
        layers = [layer for layer in cache.layers if isinstance(layer, DiJiangCacheLayer)]
        kept = [x for layer in layers for x in (layer.lagging_state.s, *layer.recent) if isinstance(x, Tensor)]  # type: ignore[misc]
        assert len(kept) > 8
        return [x.data_ptr() for x in kept]

    before = places()
    feed(model, ids[:, :40], (1,), cache)
    assert places() == before


def test_padding_is_looked_for_until_it_has_left_the_window() -> None:
    """A row that is padded inside the window at first, decoded far beyond it."""
    model, ids = load("llama"), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :12] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    with torch.no_grad():
        out = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
        cache, parts = out.past_key_values, [out.logits]
        for i in range(20, 90):
            parts.append(
                model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, attention_mask=mask[:, : i + 1]).logits
            )
    assert difference(torch.cat(parts, 1)[:, 12:], expected[:, 12:]) <= 1e-4
    assert cache.layers[0].padding() is None
