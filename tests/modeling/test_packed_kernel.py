"""Several documents in one row: the kernel gives what it gives for each document alone, in all three forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling.linear_attention import FarState, absorb, chunked, naive, recurrent
from tests.modeling.test_linear_attention import NAMES, SCALING, decay_of, double, inputs, relative

# Of length 1, shorter than the windows, of a whole chunk, longer than several; rows differ.
LENGTHS = ((1, 4, 64, 3, 201, 1, 1, 38), (130, 61, 122), (313,))
WINDOWS = (0, 1, 5, 16)


def segments_of(rows: Any = LENGTHS) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def packed_inputs(rows: Any = LENGTHS, **options: Any) -> dict[str, Tensor]:
    return inputs(sum(rows[0]), batch=len(rows), **options)


def one_by_one(x: dict[str, Tensor], rows: Any = LENGTHS, **options: Any) -> Tensor:
    """The definition, run on every document alone."""
    outputs = []
    for i, row in enumerate(rows):
        parts = [{name: t[i : i + 1] for name, t in part.items()} for part in split(x, row)]
        outputs.append(torch.cat([naive(**part, scaling=SCALING, **options) for part in parts], 2))
    return torch.cat(outputs)


def split(x: dict[str, Tensor], lengths: Any) -> list[dict[str, Tensor]]:
    ends = list(itertools.accumulate(lengths))
    spans = zip([0, *ends], ends, strict=False)
    return [{name: t[:, :, slice(*span)] for name, t in x.items()} for span in spans]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_definition_of_a_packed_row_is_that_of_its_documents(window: int, decay: bool, causal: bool) -> None:
    x = double(packed_inputs())
    options = {"window": window, "log_decay": double(decay_of(x, decay)), "causal": causal}
    found = naive(**x, scaling=SCALING, segments=segments_of(), **options)
    assert relative(found, one_by_one(x, **options)) <= 1e-12
    mixed = naive(**x, scaling=SCALING, **options)
    assert relative(mixed[:1], found[:1]) > 1e-2


@pytest.mark.parametrize("spread", [3.0, 80.0])
@pytest.mark.parametrize("form", ["chunked", "recurrent", "bidirectional"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_values(form: str, window: int, decay: bool, spread: float) -> None:
    x = packed_inputs(spread=spread)
    if spread > 10:  # the first row's documents lie further apart than float32 reaches
        x["gk"][0] += 100 * (segments_of()[0] % 2)
    options: dict[str, Any] = {"window": window, "causal": form != "bidirectional"}
    log_decay = decay_of(x, decay)
    reference = naive(**double(x), scaling=SCALING, log_decay=double(log_decay), segments=segments_of(), **options)
    if form == "recurrent":
        del options["causal"]
    run: Any = recurrent if form == "recurrent" else chunked
    out, _ = run(**x, scaling=SCALING, log_decay=log_decay, segments=segments_of(), **options)
    assert relative(out, reference) <= 1e-5


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 500])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 1)])
def test_heads_and_chunk_sizes(heads: int, kv_heads: int, chunk_size: int) -> None:
    x = double(packed_inputs(heads=heads, kv_heads=kv_heads))
    log_decay = -torch.linspace(0, 0.1, kv_heads, dtype=torch.float64)
    for window, causal in itertools.product(WINDOWS, (True, False)):
        options: dict[str, Any] = {"window": window, "causal": causal, "log_decay": log_decay}
        out, _ = chunked(**x, scaling=SCALING, segments=segments_of(), chunk_size=chunk_size, **options)
        assert relative(out, one_by_one(x, **options)) <= 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_gradients(window: int, decay: bool, causal: bool) -> None:
    weight, gradients = torch.randn(3, 4, 313, 10, dtype=torch.float64), []
    for form in (naive, chunked):
        x = {name: t.requires_grad_() for name, t in double(packed_inputs()).items()}
        log_decay = decay_of(x, decay)
        log_decay = None if log_decay is None else double(log_decay).requires_grad_()
        options: dict[str, Any] = {"window": window, "log_decay": log_decay, "causal": causal}
        if form is naive:
            out = one_by_one(x, **options)
        else:
            out = chunked(**x, scaling=SCALING, segments=segments_of(), chunk_size=32, **options)[0]
        (out * weight).sum().backward()
        leaves = [x[name] for name in NAMES if window or name not in ("q", "k", "gq")]
        gradients.append([leaf.grad for leaf in leaves] + ([] if log_decay is None else [log_decay.grad]))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert relative(found, expected) <= 1e-10


@pytest.mark.parametrize("causal", [True, False])
def test_scales_that_differ_by_document_leave_gradients_finite(causal: bool) -> None:
    """What a query does not see has no weight in the gradient either, were its exponential infinite."""
    x = {name: t.requires_grad_() for name, t in packed_inputs().items()}
    shift = 300.0 * (segments_of() % 2)[:, None]
    log_decay = torch.tensor([-0.004, -0.4]).requires_grad_()
    scaled = {**x, "gk": x["gk"] + shift}
    options: dict[str, Any] = {"window": 5, "log_decay": log_decay, "segments": segments_of(), "causal": causal}
    chunked(**scaled, scaling=SCALING, **options)[0].sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (*x.values(), log_decay))


@pytest.mark.parametrize("window", WINDOWS)
def test_padding_inside_documents(window: int) -> None:
    """Keys that are not there neither count nor decay, on either side of a boundary."""
    x = double(packed_inputs())
    mask = torch.rand(3, 313, generator=torch.Generator().manual_seed(0)) > 0.3
    options: dict[str, Any] = {
        "window": window, "log_decay": double(decay_of(x, True)), "mask": mask, "segments": segments_of(),
    }  # fmt: skip
    reference = naive(**x, scaling=SCALING, **options)
    seen = reference.isfinite().all((1, 3))  # a query may see no key at all
    out, _ = chunked(**x, scaling=SCALING, **options)
    assert seen.sum() > 800
    assert relative(out.transpose(1, 2)[seen], reference.transpose(1, 2)[seen]) <= 1e-12


@pytest.mark.parametrize("past", [3, 40, 200])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_state_and_past_keys(window: int, past: int) -> None:
    """Keys before the first query, and a state before those: of the first key's document."""
    x, old = double(packed_inputs()), double(inputs(50, batch=3, seed=1))
    log_decay = double(decay_of(x, True))
    keys = {name: old[name] for name in ("fk", "gk", "v")}
    state = absorb(FarState.empty(3, 2, 24, 10, old["v"]), **keys, log_decay=log_decay)
    x |= {name: x[name][:, :, past:] for name in ("q", "fq", "gq")}
    options: dict[str, Any] = {"window": window, "log_decay": log_decay, "segments": segments_of(), "state": state}
    reference = naive(**x, scaling=SCALING, **options)
    for form in (chunked, recurrent):
        assert relative(form(**x, scaling=SCALING, **options)[0], reference) <= 1e-12


@pytest.mark.parametrize("form", [chunked, recurrent])
@pytest.mark.parametrize("tail", [1, 7, 30, 100])
@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_left_is_the_state_of_the_last_document(form: Any, window: int, tail: int) -> None:
    """Going on from it is as if the last document had been alone."""
    rows = ((313 - tail, tail),) * 3
    x = double(packed_inputs(rows))
    options: dict[str, Any] = {"window": window, "log_decay": double(decay_of(x, True))}
    _, state = form(**x, scaling=SCALING, segments=segments_of(rows), **options)
    last = split(x, rows[0])[1]
    _, expected = form(**last, scaling=SCALING, **options)
    scale = (state.m - expected.m).exp()[..., None, None]
    torch.testing.assert_close(state.s * scale, expected.s, rtol=1e-10, atol=1e-12)
    assert bool(expected.s.any()) == (tail > window)
