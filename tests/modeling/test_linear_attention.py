"""The chunked and the recurrent form in float32 against the definition in float64, values and gradients.

Padding is checked against the same rows without it, so the reference never sees a mask. Lengths reach well beyond the
window plus a chunk, and deleting the far part must show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.linear_attention import (
    FLOOR,
    FarState,
    absorb,
    chunked,
    naive,
    recurrent,
    softmax_with_lse,
)

SCALING = 0.3
NAMES = ("q", "k", "v", "fq", "gq", "fk", "gk")
DECAY = (-0.004, -0.4)  # one slow head, one that forgets within a chunk


def inputs(
    queries: int,
    past: int = 0,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 12,
    value_dim: int = 10,
    spread: float = 3.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors in float32; log-scales are uniform over ±spread."""
    torch.manual_seed(seed)
    keys = queries + past
    return {
        "q": torch.randn(batch, heads, queries, dim),
        "k": torch.randn(batch, kv_heads, keys, dim),
        "v": torch.randn(batch, kv_heads, keys, value_dim),
        "fq": (2 * torch.randn(batch, heads, queries, 2 * dim)).softmax(-1),
        "gq": (2 * torch.rand(batch, heads, queries) - 1) * spread,
        "fk": (2 * torch.randn(batch, kv_heads, keys, 2 * dim)).softmax(-1),
        "gk": (2 * torch.rand(batch, kv_heads, keys) - 1) * spread,
    }


def decay_of(x: dict[str, Tensor], on: bool) -> Tensor | None:
    return torch.tensor(DECAY)[: x["k"].shape[1]] if on else None


def keys_of(x: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: x[name][:, :, part] for name in ("fk", "gk", "v")}


def double(x: Any) -> Any:
    """Float64 leaves of the same numbers."""
    if isinstance(x, dict):
        return {name: double(t) for name, t in x.items()}
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


def relative(found: Tensor, reference: Tensor) -> float:
    assert found.shape == reference.shape and found.isfinite().all()
    return ((found.double() - reference).abs().max() / reference.abs().max()).item()


def run(form: str, x: dict[str, Tensor], **options: Any) -> tuple[Tensor, FarState]:
    return (chunked if form == "chunked" else recurrent)(**x, scaling=SCALING, **options)  # type: ignore[return-value]


def assert_far_part_matters(x: dict[str, Tensor], reference: Tensor, **options: Any) -> None:
    """Without the far part, or with that of the nearest chunk alone, the output would be another."""
    window, length = options["window"], x["q"].shape[2]
    assert x["k"].shape[2] > window + 64
    if window:
        near, _ = chunked(**{**x, "fq": None, "gq": None, "fk": None, "gk": None}, scaling=SCALING, **options)
        assert relative(near[:, :, -1:], reference[:, :, -1:]) > 1e-2
    short = min(window + 32, length)
    tail = {name: t[:, :, -short:] for name, t in x.items()}
    options = {**options, "mask": None if options.get("mask") is None else options["mask"][:, -short:]}
    assert relative(chunked(**tail, scaling=SCALING, **options)[0][:, :, -1:], reference[:, :, -1:]) > 1e-3


# ---------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize(("softcap", "sunk"), [(1.5, False), (None, True), (1.5, True)])
def test_soft_capped_logits_and_sinks(form: str, softcap: float | None, sunk: bool) -> None:
    """As the definition has them; and by a window as long as the text they are plain attention's."""
    x = inputs(300)
    sink = torch.tensor([-1.0, 0.5, 2.0, 4.0], requires_grad=True) if sunk else None
    options: dict[str, Any] = {"softcap": softcap, "sink": sink, "window": 16, "log_decay": decay_of(x, True)}
    reference = naive(**double(x), scaling=SCALING, **{**options, "sink": double(sink)})
    out, _ = run(form, x, **options)
    assert relative(out, reference) <= 1e-5
    assert_far_part_matters(x, reference, **options)
    plain, _ = run(form, x, window=16, log_decay=options["log_decay"])
    assert relative(out, plain.double()) > 1e-2

    k, v = (x[name].repeat_interleave(2, 1) for name in ("k", "v"))
    scores = SCALING * x["q"] @ k.mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink[None, :, None, None].expand(2, -1, 300, 1)], -1)
    expected = scores.softmax(-1)[..., :300] @ v
    out, _ = run(form, x, **{**options, "window": 300})
    assert relative(out, expected.double()) <= 1e-5
    if sink is not None:
        found, wanted = (torch.autograd.grad(y.square().sum(), sink)[0] for y in (out, expected))
        assert relative(found, wanted.double()) <= 1e-4


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 1, 16, 64])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
def test_values(form: str, length: int, window: int, decay: bool) -> None:
    x = inputs(length)
    options = {"window": window, "log_decay": decay_of(x, decay)}
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(options["log_decay"]))
    out, _ = run(form, x, **options)
    assert out.dtype == torch.float32
    assert relative(out, reference) <= 1e-5
    if length == 500:
        assert_far_part_matters(x, reference, **options)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("window,decay", [(0, True), (64, True), (16, False)])
def test_values_at_length(form: str, window: int, decay: bool) -> None:
    x = inputs(2048, batch=1, heads=2, kv_heads=1)
    log_decay = decay_of(x, decay)
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay))
    out, _ = run(form, x, window=window, log_decay=log_decay)
    assert relative(out, reference) <= 1e-5
    assert_far_part_matters(x, reference, window=window, log_decay=log_decay)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 16])
def test_wide_log_scales(form: str, window: int, decay: bool) -> None:
    """g over ±80: their exponentials alone would overflow and vanish."""
    x = inputs(500, spread=80.0)
    # Rising scales move the running maximum in every chunk; falling ones never do.
    x["gk"][0] = torch.linspace(-80, 80, 500)
    x["gk"][1, 0] = torch.linspace(80, -80, 500)
    x["gq"][0, :, 250:] -= 80
    log_decay = decay_of(x, decay)
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay))
    assert relative(run(form, x, window=window, log_decay=log_decay)[0], reference) <= 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 128])
@pytest.mark.parametrize("dims", [(4, 2, 12, 10), (4, 4, 5, 7), (6, 1, 20, 20), (3, 1, 80, 1)])
def test_head_shapes_and_chunk_sizes(dims: tuple[int, int, int, int], chunk_size: int) -> None:
    heads, kv_heads, dim, value_dim = dims
    x = inputs(200, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    log_decay = -torch.linspace(0.003, 0.1, kv_heads)
    reference = naive(**double(x), scaling=SCALING, window=16, log_decay=log_decay.double())
    out, _ = chunked(**x, scaling=SCALING, window=16, log_decay=log_decay, chunk_size=chunk_size)
    assert relative(out, reference) <= 1e-5


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 1, 16, 64])
@pytest.mark.parametrize("length", [1, 63, 500])
def test_bidirectional(length: int, window: int, decay: bool) -> None:
    x = inputs(length)
    options = {"window": window, "causal": False}
    log_decay = decay_of(x, decay)
    reference = naive(**double(x), scaling=SCALING, log_decay=double(log_decay), **options)
    assert relative(chunked(**x, scaling=SCALING, log_decay=log_decay, **options)[0], reference) <= 1e-5
    if length > 1:  # both sides count
        causal, _ = chunked(**x, scaling=SCALING, log_decay=log_decay, window=window)
        assert relative(causal[:, :, :1], reference[:, :, :1]) > 1e-2


# ------------------------------------------------------------------------------------- more keys, a state, padding


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("past", [1, 15, 16, 100])
@pytest.mark.parametrize("window", [0, 16])
def test_more_keys_than_queries(form: str, window: int, past: int) -> None:
    x = inputs(130, past)
    log_decay = decay_of(x, True)
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay))
    assert relative(run(form, x, window=window, log_decay=log_decay)[0], reference) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window,spread", [(0, 3.0), (16, 3.0), (64, 3.0), (16, 80.0)])
def test_initial_state(form: str, window: int, spread: float, decay: bool) -> None:
    """Keys in the state and keys given are the same to the far part: the reference sees them all as keys."""
    earlier, queries = 300, 130
    x = inputs(queries, earlier + window, spread=spread)
    log_decay = decay_of(x, decay)
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay))
    old = keys_of(x, slice(earlier))
    state = FarState.empty(2, 2, old["fk"].shape[-1], old["v"].shape[-1], old["v"])
    for part in (slice(0, 1), slice(1, 200), slice(200, earlier)):
        state = absorb(state, **{n: t[:, :, part] for n, t in old.items()}, log_decay=log_decay)
    rest = {name: t if name in ("q", "fq", "gq") else t[:, :, earlier:] for name, t in x.items()}
    out, _ = run(form, rest, window=window, log_decay=log_decay, state=state)
    assert relative(out, reference) <= 1e-5
    forgotten, _ = run(form, rest, window=window, log_decay=log_decay)
    assert relative(forgotten[:, :, :1], reference[:, :, :1]) > 1e-3


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("window", [0, 1, 16])
def test_state_before_an_empty_window(form: str, window: int) -> None:
    """A state and no past keys: the first queries have a window shorter than usual."""
    x, old = inputs(130), keys_of(inputs(300, seed=1), slice(None))
    log_decay = decay_of(x, True)
    state = absorb(FarState.empty(2, 2, 24, 10, x["v"]), **old, log_decay=log_decay)
    wide = absorb(FarState.empty(2, 2, 24, 10, x["v"].double()), **double(old), log_decay=double(log_decay))
    reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay), state=wide)
    assert relative(run(form, x, window=window, log_decay=log_decay, state=state)[0], reference) <= 1e-5


def unpadded(x: dict[str, Tensor], row: int, left: int, right: int) -> dict[str, Tensor]:
    keys, queries = x["k"].shape[2], x["q"].shape[2]
    cut = {}
    for name, t in x.items():
        extra = keys - queries if name in ("q", "fq", "gq") else 0  # past keys have no queries
        cut[name] = t[row : row + 1, :, max(left - extra, 0) : t.shape[2] - right]
    return cut


@pytest.mark.parametrize("form", ["chunked", "recurrent", "bidirectional"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 1, 16, 64])
def test_padding_at_either_end(form: str, window: int, decay: bool) -> None:
    x = inputs(300, batch=4)
    padding = [(0, 0), (150, 0), (0, 90), (70, 40)]
    mask = torch.ones(4, 300, dtype=torch.bool)
    for row, (left, right) in enumerate(padding):
        mask[row, :left] = mask[row, 300 - right :] = False
    for name in ("k", "v", "fk", "gk"):  # what stands in padded places must not matter
        t = x[name]
        t[~mask[:, None].expand(t.shape[:3])] = 77.0
    options: dict[str, Any] = {"window": window, "log_decay": decay_of(x, decay)}
    if form == "bidirectional":
        options["causal"] = False
    out, state = run(form if form == "recurrent" else "chunked", x, mask=mask, **options)
    assert out.isfinite().all()
    options["log_decay"] = double(options["log_decay"])
    for row, (left, right) in enumerate(padding):
        reference = naive(**double(unpadded(x, row, left, right)), scaling=SCALING, **options)
        assert relative(out[row : row + 1, :, left : 300 - right], reference) <= 1e-5
    if form == "chunked" and window:
        row = unpadded(x, 1, 150, 0)
        assert_far_part_matters(row, out[1:2, :, 150:].double(), window=window, log_decay=decay_of(x, decay))


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_padding_among_past_keys(form: str) -> None:
    x = inputs(130, 100)
    mask = torch.ones(2, 230, dtype=torch.bool)
    mask[0, :60] = mask[1, :120] = False
    log_decay = decay_of(x, True)
    out, _ = run(form, x, window=16, log_decay=log_decay, mask=mask)
    for row, left in enumerate((60, 120)):
        reference = naive(**double(unpadded(x, row, left, 0)), scaling=SCALING, window=16, log_decay=double(log_decay))
        assert relative(out[row : row + 1, :, max(left - 100, 0) :], reference) <= 1e-5


# ------------------------------------------------------------------------------------------------ the returned state


@pytest.mark.parametrize("form", ["chunked", "recurrent", "both"])
@pytest.mark.parametrize("window,normalize", [(0, True), (1, True), (16, True), (64, True), (0, False)])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_one_call(form: str, window: int, normalize: bool, padded: bool) -> None:
    length, past = 500, 0
    x = inputs(length)
    mask = torch.ones(2, length, dtype=torch.bool)
    if padded:
        mask[0, :70] = False
    options: dict[str, Any] = {"window": window, "log_decay": decay_of(x, True), "normalize": normalize}
    whole, last = chunked(**x, scaling=SCALING, mask=mask, **options)
    state, outputs, start = None, [], 0
    for turn, size in enumerate((1, 5, 64, 63, 1, 1, 130, 65, 170)):
        piece = {
            name: t[:, :, (start if name in ("q", "fq", "gq") else start - past) : start + size]
            for name, t in x.items()
        }
        use = ("chunked", "recurrent")[turn % 2] if form == "both" else form
        out, state = run(use, piece, state=state, mask=mask[:, start - past : start + size], **options)
        outputs.append(out)
        start += size
        past = min(start, window)
    assert start == length
    real = mask[:, None, :, None]
    assert relative(torch.cat(outputs, 2) * real, (whole * real).double()) <= 1e-5
    assert last is not None and state is not None
    total, found = (s.s.double() * s.m.double().exp()[..., None, None] for s in (last, state))
    assert relative(found, total) <= 1e-5


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_unnormalised_sum_does_not_overflow(form: str) -> None:
    """The published formulation multiplies by γ⁻ⁿ, e^600 here; ours is the plain recurrence at any length."""
    length = 20_000 if form == "chunked" else 4_000
    log_decay = torch.tensor([-600 / length, -0.002])
    x = inputs(length, batch=1, heads=2, kv_heads=2, dim=2, value_dim=3, spread=0.0)
    out, _ = run(form, x, window=0, log_decay=log_decay, normalize=False)
    fq, fk, v = (x[name][0].double() for name in ("fq", "fk", "v"))
    gamma = log_decay.double().exp()[:, None, None]
    added = fk[..., None] * v[:, :, None, :]  # [H, N, F, V]
    state, rows = torch.zeros(2, 4, 3, dtype=torch.float64), []
    for n in range(length):
        state = gamma * state + added[:, n]
        rows.append(state)
    reference = torch.einsum("hnf,nhfv->hnv", fq, torch.stack(rows))
    assert relative(out[0], reference) <= 1e-5
    assert relative(out[0, :, -1], reference[:, -1]) <= 1e-5
    x = {name: t[:, :, -64:] for name, t in x.items()}
    recent, _ = run(form, x, window=0, log_decay=log_decay, normalize=False)
    assert relative(recent[0, :, -1], reference[:, -1]) > 1e-2


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(form: str, dtype: torch.dtype) -> None:
    x = inputs(1000, batch=1)
    x = {name: t.to(dtype) for name, t in x.items()}
    x["gq"] = x["gq"].float()
    log_decay = decay_of(x, True)
    for window, tolerance in ((0, 1e-5), (16, 2e-2)):  # products inside the window are half precision
        reference = naive(**double(x), scaling=SCALING, window=window, log_decay=double(log_decay))
        out, state = run(form, x, window=window, log_decay=log_decay)
        assert out.dtype == state.s.dtype == state.m.dtype == torch.float32
        assert relative(out, reference) <= tolerance


def test_nothing_to_attend_to_is_an_error() -> None:
    x = inputs(3)
    with pytest.raises(ValueError, match="window"):
        chunked(x["q"], x["k"], x["v"], None, None, None, None, scaling=SCALING, window=0)


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-6, 1e-4, 1.0, 30.0])
def test_softmax_with_lse(scale: float) -> None:
    """The gradient of the log-sum-exp is the softmax, also among entries that differ by less than rounding."""
    torch.manual_seed(0)
    x = (scale * torch.randn(500, 40)).requires_grad_()
    x.data[:, :3] = FLOOR
    expected = x.detach().double().softmax(-1)
    p, lse = softmax_with_lse(x)
    lse.sum().backward()
    assert (p - expected).abs().max() <= 1e-6
    assert (lse - x.detach().double().logsumexp(-1)).abs().max() <= 1e-5
    assert x.grad is not None and (x.grad - expected).abs().max() <= 1e-5  # the rounding of a log-sum-exp of 100


# ------------------------------------------------------------------------------------------------------- gradients


def gradients(
    form: str,
    x: dict[str, Tensor],
    log_decay: Tensor | None,
    weight: Tensor,
    feature_decay: Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    decays = {"log_decay": log_decay, "feature_decay": feature_decay}
    given = {**x, **{name: t for name, t in decays.items() if t is not None}}
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    if form == "naive":
        out = naive(**leaves, scaling=SCALING, **options)
    else:
        out, _ = run(form, leaves, **options)
    (out * weight.to(out.dtype)).sum().backward()
    return {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}


def assert_gradients_close(
    found: dict[str, Tensor], reference: dict[str, Tensor], window: int, tolerance: float = 1e-4
) -> None:
    assert found.keys() == reference.keys()
    for name, expected in reference.items():
        if window == 0 and name in ("q", "k", "gq"):  # not used, or cancelled by the denominator
            assert found[name].abs().max() <= 1e-5 and expected.abs().max() <= 1e-5
        elif expected.abs().max() > 1e-12:
            assert relative(found[name], expected) <= tolerance, name


@pytest.mark.parametrize("form", ["chunked", "recurrent", "bidirectional"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", [0, 1, 16, 64])
@pytest.mark.parametrize("length", [63, 200])
def test_gradients(form: str, length: int, window: int, decay: bool) -> None:
    x = inputs(length)
    log_decay = decay_of(x, decay)
    weight = torch.randn(2, 4, length, 10)
    options: dict[str, Any] = {"window": window}
    if form == "bidirectional":
        options["causal"] = False
    reference = gradients("naive", double(x), double(log_decay), weight, **options)
    found = gradients(form if form == "recurrent" else "chunked", x, log_decay, weight, **options)
    assert_gradients_close(found, reference, window)
    if length == 200:  # the first keys still matter to the last query
        last = torch.zeros_like(weight)
        last[:, :, -1] = 1
        far = gradients("naive", double(x), double(log_decay), last, **options)
        assert far["v"][:, :, :64].abs().max() > 1e-3


@pytest.mark.parametrize("window", [0, 16])
def test_gradients_at_length(window: int) -> None:
    x = inputs(1000, batch=1, heads=2, kv_heads=1)
    log_decay = decay_of(x, True)
    weight = torch.randn(1, 2, 1000, 10)
    reference = gradients("naive", double(x), double(log_decay), weight, window=window)
    assert_gradients_close(gradients("chunked", x, log_decay, weight, window=window), reference, window)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_gradients_with_wide_log_scales(form: str) -> None:
    x = inputs(200, spread=80.0)
    x["gk"][0] = torch.linspace(-80, 80, 200)
    log_decay = decay_of(x, True)
    weight = torch.randn(2, 4, 200, 10)
    reference = gradients("naive", double(x), double(log_decay), weight, window=16)
    assert_gradients_close(gradients(form, x, log_decay, weight, window=16), reference, 16)


@pytest.mark.parametrize("window", [0, 16])
def test_gradients_with_padding_and_more_keys(window: int) -> None:
    x = inputs(200, 50)
    padding = [(90, 0), (20, 30)]
    mask = torch.ones(2, 250, dtype=torch.bool)
    weight = torch.randn(2, 4, 200, 10)
    for row, (left, right) in enumerate(padding):
        mask[row, :left] = mask[row, 250 - right :] = False
        weight[row, :, : max(left - 50, 0)] = weight[row, :, 200 - right :] = 0
    log_decay = decay_of(x, True)
    found = gradients("chunked", x, log_decay, weight, window=window, mask=mask)
    total = torch.zeros(2, dtype=torch.float64)
    for row, (left, right) in enumerate(padding):
        start = max(left - 50, 0)
        rows = double(unpadded(x, row, left, right))
        part = weight[row : row + 1, :, start : 200 - right]
        reference = gradients("naive", rows, double(log_decay), part, window=window)
        total += reference.pop("log_decay")
        of_row = {name: found[name][row : row + 1] for name in NAMES}
        cut = unpadded(of_row, row=0, left=left, right=right)
        assert_gradients_close(cut, reference, window)
        for name in ("k", "v", "fk", "gk"):
            assert not of_row[name][:, :, ~mask[row]].any(), f"{name} of padded keys has a gradient"
    assert relative(found["log_decay"], total) <= 1e-4


@pytest.mark.parametrize("window", [0, 16])
def test_gradients_through_the_state(window: int) -> None:
    """Truncated nowhere: a state made by `absorb` passes gradients on to the keys in it."""
    earlier, queries = 150, 100
    x = inputs(queries, earlier + window)
    log_decay = decay_of(x, True)
    weight = torch.randn(2, 4, queries, 10)
    reference = gradients("naive", double(x), double(log_decay), weight, window=window)
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    leaves["log_decay"] = log_decay.clone().requires_grad_()  # type: ignore[union-attr]
    state = absorb(
        FarState.empty(2, 2, 24, 10, x["v"]), **keys_of(leaves, slice(earlier)), log_decay=leaves["log_decay"]
    )
    rest = {n: leaves[n] if n in ("q", "fq", "gq") else leaves[n][:, :, earlier:] for n in NAMES}
    out, _ = chunked(**rest, scaling=SCALING, window=window, log_decay=leaves["log_decay"], state=state)
    (out * weight).sum().backward()
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    assert_gradients_close(found, reference, window)
