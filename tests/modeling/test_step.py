"""A table that goes on from call to call: prompts in pieces, single tokens, rows that differ, and very long texts."""

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.step import advance
from tests.modeling import naive
from tests.modeling.forms import (
    DECAYS,
    LOGITS,
    SMALL,
    Past,
    by_blocks,
    by_token,
    empty,
    inputs,
    padding,
    part,
    relative,
)
from tests.modeling.naive import Inputs

SIZES = {
    "small": SMALL,
    "wide": Kernel(window=32, block=16, memory=8),
    "blocks of 5": Kernel(window=15, block=5, memory=3, sinks=7),
}
PIECES = [[1] * 210, [210], [1, 7, 8, 16, 1, 30, 1, 1, 64, 16, 65], [50, *[1] * 40, 120], [16, 16, 32, 48, 98]]


def in_pieces(x: Inputs, sizes: list[int], kernel: Kernel, real: Tensor | None = None) -> tuple[Tensor, Past]:
    """Single tokens are written in place, several are worked on together."""
    past, outputs, start = empty(x, kernel), [], 0
    for size in sizes:
        span = slice(start, start + size)
        form = by_token if size == 1 else by_blocks
        out, past = form(part(x, span), kernel, past=past, real=None if real is None else real[:, span])
        outputs.append(out)
        start += size
    assert start == x.q.shape[2]
    return torch.cat(outputs, 2), past


def used(past: Past, kernel: Kernel) -> list[Tensor]:
    """The numbers of a table that mean something: of slots that hold a token, and of features that were written to."""
    table, batch = past.table, len(past.table.k)
    count = torch.as_tensor(past.count).expand(batch)
    first = (count - 1) // kernel.block * kernel.block - kernel.window  # place of the window's first slot
    place = first[:, None] + torch.arange(table.received.shape[2])
    held = (place >= 0) & (place < count[:, None])
    assert torch.equal((table.score > -torch.inf).sum(2)[:, 0], first.clamp(0, table.score.shape[2]))
    rows = (table.score > -torch.inf)[..., None]
    found = [table.memory_k * rows, table.memory_v * rows, table.received * held[:, None]]
    found += [t * held[:, None, :, None] for t in (table.k, table.v, table.far_k, table.gates) if t is not None]
    finite = table.score.isfinite()
    found += [finite.double(), torch.where(finite, table.score, 0)]
    if table.state is not None:
        written = table.state.log_weight > -1e29
        found += [torch.where(written, table.state.log_weight, 0), table.state.value * written[..., None]]
    return found


@pytest.mark.parametrize("kernel", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("sizes", PIECES, ids=len)
def test_pieces_equal_one_call(sizes: list[int], state: bool, kernel: Kernel) -> None:
    """The output, and all that is kept."""
    x = inputs(210, state=state)
    whole, last = by_blocks(x, kernel)
    out, past = in_pieces(x, sizes, kernel)
    assert relative(out, whole) <= 1e-12
    for found, expected in zip(used(past, kernel), used(last, kernel), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    low, _ = in_pieces(x.map(Tensor.float), sizes, kernel)
    assert relative(low, whole) <= 1e-4


@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay: str) -> None:
    x = inputs(210, decay=decay)
    assert relative(in_pieces(x, PIECES[2], SMALL)[0], naive.table(x, SMALL, LOGITS)) <= 1e-12


@pytest.mark.parametrize("kernel", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("sizes", PIECES, ids=len)
def test_rows_with_padding(sizes: list[int], kernel: Kernel) -> None:
    """Rows whose blocks are full at different times, since padding takes no place in them."""
    x = inputs(210, batch=5)
    real = padding(210, [(0, 0), (100, 0), (0, 60), (33, 20), (0, 0)])
    real[4] = torch.rand(210, generator=torch.Generator().manual_seed(0)) > 0.4
    out, past = in_pieces(x, sizes, kernel, real)
    expected = naive.table(x, kernel, LOGITS, real)
    kept = real[:, None, :, None]
    assert relative(out * kept, expected * kept) <= 1e-12
    assert torch.equal(torch.as_tensor(past.count), real.sum(1))
    for found, whole in zip(used(past, kernel), used(by_blocks(x, kernel, real=real)[1], kernel), strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


def test_padding_that_comes_when_a_block_is_full() -> None:
    """However many there are of it, the window moves once, for the token after them."""
    x, real = inputs(70), torch.ones(2, 70, dtype=torch.bool)
    real[0, 48:52] = False
    out, _ = in_pieces(x, [48, *[1] * 22], SMALL, real)
    kept = real[:, None, :, None]
    assert relative(out * kept, naive.table(x, SMALL, LOGITS, real) * kept) <= 1e-12


def test_nothing_leaves_a_text_that_is_shorter_than_the_window() -> None:
    x, kernel = inputs(16, state=False), Kernel(window=48, block=16, memory=8)
    _, past = by_blocks(x, kernel)
    after = advance(past.table, None, 16, kernel)
    assert (after.score == -torch.inf).all()
    assert torch.equal(after.k[:, :, -32:-16], x.k) and not after.received[..., -16:].any()


def test_a_call_leaves_the_table_that_it_is_given() -> None:
    """Of several tokens: generation keeps tables to go back to."""
    x = inputs(150)
    _, past = by_blocks(part(x, slice(100)), SMALL)
    before = [t.clone() for t in past.table if t is not None]
    by_blocks(part(x, slice(100, None)), SMALL, past=past)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for t in past.table if t is not None), strict=True))


@pytest.mark.parametrize("decay", ["none", "both"])
@torch.no_grad()
def test_no_drift_in_131072_tokens(decay: str) -> None:
    """The state of float32 after them, against sums over all keys in float64."""
    kernel, length, size = Kernel(memory=8), 2**17, 2**11
    x = inputs(length, batch=1, heads=1, kv_heads=1, dim=4, value_dim=3, decay=decay)
    past = empty(x.map(Tensor.float), kernel)
    for start in range(0, length, size):
        out, past = by_blocks(part(x, slice(start, start + size)).map(Tensor.float), kernel, past=past)
        assert out.isfinite().all()
    left = length - kernel.window - kernel.block  # of these keys is the state
    assert x.written is not None
    logits = x.written[0, 0, :left]
    for each in x.decay:
        if each is not None:
            lost = each[0, 0, :left]
            logits = logits + lost.sum(0) - lost.cumsum(0)
    weights = logits.exp()
    state = past.table.state
    assert state is not None
    found = state.log_weight[0, 0].double().exp()
    assert ((found - weights.sum(0)).abs() / weights.sum(0)).max() <= 1e-3
    expected = weights.T @ x.v[0, 0, :left] / weights.sum(0)[:, None]
    assert relative(state.value[0, 0], expected) <= 1e-3
