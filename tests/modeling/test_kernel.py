"""Attention over the table, of all tokens at once and of one after the other, against the definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling import table
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.table import Logits, packed, rounded
from tests.modeling import naive
from tests.modeling.forms import (
    DECAYS,
    LOGITS,
    SMALL,
    both_sides,
    by_blocks,
    by_token,
    inputs,
    numbered,
    padding,
    part,
    relative,
)
from tests.modeling.naive import Inputs

EXACT = 1e-12  # in float64
SIZES = {
    "small": SMALL,
    "wide": Kernel(window=32, block=16, memory=8),
    "blocks of 5": Kernel(window=15, block=5, memory=3, sinks=7),
    "blocks of 1": Kernel(window=2, block=1, memory=2, sinks=1),
    "no memory": Kernel(window=16, block=16, memory=0),
    "no sinks": Kernel(window=16, block=16, memory=8, sinks=0),
    "neither": Kernel(window=16, block=16, memory=0, sinks=0),
}
FORMS: dict[str, Callable[..., Tensor]] = {
    "blocks": lambda *args, **options: by_blocks(*args, **options)[0],
    "tokens": lambda *args, **options: by_token(*args, **options)[0],
    "both sides": both_sides,
}


def defined(form: str, x: Inputs, kernel: Kernel, logits: Logits = LOGITS, **options: Any) -> Tensor:
    return naive.table(x, kernel, logits, causal=form != "both sides", **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("length", [1, 16, 17, 63, 210])
def test_values(length: int, sizes: str, form: str) -> None:
    x, kernel = inputs(length), SIZES[sizes]
    assert relative(FORMS[form](x, kernel), defined(form, x, kernel)) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("length", "kernel"), [(391, SMALL), (700, Kernel(memory=20)), (700, Kernel(window=128))])
def test_values_at_length(length: int, kernel: Kernel, form: str) -> None:
    """With a memory that has been full for long, and is still changing."""
    x = inputs(length, batch=1, heads=2, kv_heads=1)
    expected = defined(form, x, kernel)
    assert relative(FORMS[form](x, kernel), expected) <= EXACT
    assert relative(FORMS[form](x.map(Tensor.float), kernel), expected) <= 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [*DECAYS, "no state"])
def test_decays(decay: str, form: str) -> None:
    x = inputs(130, state=decay != "no state", decay=decay)
    expected = defined(form, x, SMALL)
    assert relative(FORMS[form](x, SMALL), expected) <= EXACT
    assert relative(FORMS[form](x.map(Tensor.float), SMALL), expected) <= 1e-4
    if decay in ("head", "features"):
        assert relative(FORMS[form](x._replace(decay=inputs(1, decay="none").decay), SMALL), expected) > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(4, 4, 5, 7), (6, 1, 20, 20), (3, 1, 80, 1)], ids=str)
def test_shapes_of_heads(heads: tuple[int, int, int, int], form: str) -> None:
    x = inputs(100, heads=heads[0], kv_heads=heads[1], dim=heads[2], value_dim=heads[3])
    assert relative(FORMS[form](x, SMALL), defined(form, x, SMALL)) <= EXACT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("softcap", "with_sink"), [(1.5, False), (None, True), (1.5, True)])
def test_soft_capped_logits_and_a_sink(softcap: float | None, with_sink: bool, form: str) -> None:
    x = inputs(130)
    sink = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64) if with_sink else None
    logits = Logits(0.3, softcap, sink)
    expected = defined(form, x, SMALL, logits)
    assert relative(FORMS[form](x, SMALL, logits), expected) <= EXACT
    assert relative(FORMS[form](x, SMALL), expected) > 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ends", [(80, 80), (-80, -80), (-200, 200), (200, -200)], ids=str)
def test_log_scales_that_float32_could_not_hold_as_factors(ends: tuple[int, int], form: str) -> None:
    """e^100 is more than float32 has. The log-scales of keys go from one number to the other along the text."""
    x = inputs(150, spread=20.0)
    assert x.written is not None and x.features is not None
    slope = torch.linspace(*ends, 150, dtype=torch.float64)[:, None]
    x = x._replace(written=x.written + slope, features=x.features - max(ends))
    assert relative(FORMS[form](x.map(Tensor.float), SMALL), defined(form, x, SMALL)) <= 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype: torch.dtype, form: str) -> None:
    x = inputs(210)
    x = x._replace(q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))
    low = Inputs(*x[:3], *(t.float() for t in x[3:5]), x.decay.map(Tensor.float))  # type: ignore[union-attr, misc]
    found = FORMS[form](low, SMALL)
    assert found.dtype == torch.float32
    assert relative(found, defined(form, x.map(Tensor.double), SMALL)) <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", ["blocks", "both sides"])
@pytest.mark.parametrize("numbers", [1, 2**12, 2**14])
def test_pieces_change_nothing(numbers: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are worked on one at a time, some at a time, or some rows at a time."""
    x = inputs(130)
    whole = FORMS[form](x, SMALL)
    monkeypatch.setattr(table, "PIECE", numbers)
    assert relative(FORMS[form](x, SMALL), whole) <= EXACT


# ----------------------------------------------------------------------------------------------- what each row is worth


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_row_counts(form: str) -> None:
    """Without the state, the memory or the sinks the output is another: no test above passes by the window alone."""
    x = inputs(210)
    expected = defined(form, x, SMALL)
    for kernel, given in (
        (SMALL, x._replace(features=None, written=None)),
        (SIZES["no memory"], x),
        (SIZES["no sinks"], x),
        (SIZES["wide"], x),
    ):
        other = FORMS[form](given, kernel)
        assert relative(other[:, :, 100:110], expected[:, :, 100:110]) > 1e-2
        assert relative(defined(form, given, kernel)[:, :, 100:110], expected[:, :, 100:110]) > 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_both_factors_of_the_score_count(form: str) -> None:
    """Keys that receive more, or whose value the state can't tell, are those that stay."""
    asked, said = inputs(210, seed=1), inputs(210, seed=2)
    assert asked.written is not None
    x = asked._replace(written=asked.written.clone(), v=asked.v.clone(), k=asked.k.clone())
    x.k[:, :, 30:33], x.v[:, :, 30:33] = 3 * x.q[:, ::2, 40:43], 20.0  # much asked for, and unlike what was before
    expected = defined(form, x, SMALL)
    assert relative(FORMS[form](x, SMALL), expected) <= EXACT
    without = SIZES["no memory"]
    assert relative(FORMS[form](x, without)[:, :, -5:], expected[:, :, -5:]) > 0.05
    for changed in (x._replace(v=said.v), x._replace(q=said.q)):
        assert relative(FORMS[form](changed, SMALL), defined(form, changed, SMALL)) <= EXACT


def test_a_text_inside_the_window_is_plain_attention() -> None:
    x = inputs(40)
    found, _ = by_blocks(x, Kernel(window=48, block=16))
    k, v = (t.repeat_interleave(2, 1) for t in (x.k, x.v))
    expected = torch.nn.functional.scaled_dot_product_attention(x.q, k, v, is_causal=True, scale=LOGITS.scaling)
    assert relative(found, expected) <= EXACT
    both = torch.nn.functional.scaled_dot_product_attention(x.q, k, v, scale=LOGITS.scaling)
    assert relative(both_sides(x, Kernel(window=48, block=16)), both) <= EXACT


def test_encoders_see_both_sides() -> None:
    x = inputs(210)
    found, _ = by_blocks(x, SMALL)
    assert relative(found[:, :, :100], both_sides(x, SMALL)[:, :, :100]) > 1e-2
    other = x._replace(v=x.v.clone())
    other.v[:, :, -20:] += 1
    assert relative(both_sides(other, SMALL)[:, :, :20], both_sides(x, SMALL)[:, :, :20]) > 1e-3
    assert torch.equal(by_blocks(other, SMALL)[0][:, :, :-20], found[:, :, :-20])


# ------------------------------------------------------------------------------------------------------ equal scores


@pytest.mark.parametrize("form", FORMS)
def test_of_equal_scores_the_earliest_stay(form: str) -> None:
    """Every query gives the same to each of the keys that it sees, so that all scores are the same."""
    kernel = Kernel(window=1, block=1, sinks=2, memory=3)
    x = inputs(60, state=False)
    x = x._replace(q=torch.zeros_like(x.q))
    assert relative(FORMS[form](x, kernel), defined(form, x, kernel)) <= EXACT
    if form != "both sides":
        values = torch.cat([rounded(x.v[:, :, :5]), x.v[:, :, 58:]], 2)
        assert relative(FORMS[form](x, kernel)[:, ::2, -1], values.mean(2)) <= EXACT


@pytest.mark.parametrize("steps", [1, 5, 16, 50])
def test_of_equal_scores_the_earliest_are_in_every_table(steps: int) -> None:
    """Values that are all 0 are what the state answers: each score is 0."""
    x = inputs(150)
    x = x._replace(v=torch.zeros_like(x.v))
    _, past = by_blocks(part(x, slice(150 - steps)), SMALL)
    tables = [by_blocks(x, SMALL)[1].table, by_token(x, SMALL)[1].table]
    tables += [form(part(x, slice(150 - steps, None)), SMALL, past=past)[1].table for form in (by_blocks, by_token)]
    for each in tables:
        assert torch.equal(each.memory_k.flip(2), packed(x.k[:, :, :12]))
        assert (each.score[:, :, :8] == 0).all() and (each.score[:, :, 8:] == torch.inf).all()


# ---------------------------------------------------------------------------------------------- padding, and documents


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", ["small", "wide", "blocks of 5", "no memory"])
@pytest.mark.parametrize("state", [True, False])
def test_padding(sizes: str, state: bool, form: str) -> None:
    """At either end, in the middle, and everywhere. What stands in the place of padding does not matter."""
    x, kernel = inputs(150, batch=6, state=state), SIZES[sizes]
    real = padding(150, [(0, 0), (75, 0), (0, 45), (35, 20), (0, 0), (0, 0)])
    real[4, 20:90] = False
    real[5] = torch.rand(150, generator=torch.Generator().manual_seed(0)) > 0.4
    x = x.map(lambda t: t.masked_fill(~real[:, None, :, None], 3.0 if t.amax() > 0 else -3.0))
    found, expected = FORMS[form](x, kernel, real=real), defined(form, x, kernel, real=real)
    kept = real[:, None, :, None]
    assert found.isfinite().all()
    assert relative(found * kept, expected * kept) <= EXACT


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_padding_alone(form: str) -> None:
    x, real = inputs(50), padding(50, [(50, 0), (0, 0)])
    found = FORMS[form](x, SMALL, real=real)
    assert found.isfinite().all()
    assert relative(found[1:], defined(form, x, SMALL)[1:]) <= EXACT


# Of length 1, shorter than the window, of whole blocks, and longer than several; rows differ.
DOCUMENTS = numbered([[1, 4, 64, 3, 101, 1, 36], [130, 61, 19], [210]])


@pytest.mark.parametrize("form", ["blocks", "both sides"])
@pytest.mark.parametrize("sizes", SIZES)
def test_documents(sizes: str, form: str) -> None:
    """Each as if it were alone in its row."""
    x, kernel = inputs(210, batch=3), SIZES[sizes]
    expected = defined(form, x, kernel, documents=DOCUMENTS)
    assert relative(FORMS[form](x, kernel, documents=DOCUMENTS), expected) <= EXACT
    assert relative(FORMS[form](x, kernel)[0, :, -30:], expected[0, :, -30:]) > 1e-2


@pytest.mark.parametrize("form", ["blocks", "both sides"])
@pytest.mark.parametrize("state", [*DECAYS, "no state"])
def test_documents_and_decays(state: str, form: str) -> None:
    x = inputs(210, batch=3, state=state != "no state", decay=state)
    expected = defined(form, x, SMALL, documents=DOCUMENTS)
    assert relative(FORMS[form](x, SMALL, documents=DOCUMENTS), expected) <= EXACT
    assert relative(FORMS[form](x.map(Tensor.float), SMALL, documents=DOCUMENTS), expected) <= 1e-4


@pytest.mark.parametrize("form", ["blocks", "both sides"])
def test_documents_whose_scales_lie_further_apart_than_float32_reaches(form: str) -> None:
    x = inputs(210, batch=3)
    assert x.written is not None
    x = x._replace(written=x.written + 150.0 * (DOCUMENTS % 2)[:, None, :, None])
    expected = defined(form, x, SMALL, documents=DOCUMENTS)
    assert relative(FORMS[form](x.map(Tensor.float), SMALL, documents=DOCUMENTS), expected) <= 1e-4


@pytest.mark.parametrize("tail", [1, 7, 30, 100])
def test_what_is_left_is_the_table_of_the_last_document(tail: int) -> None:
    """Going on from it is as if that document had been alone."""
    x, more = inputs(210), inputs(60, seed=1)
    last = part(x, slice(210 - tail, None))
    pasts = [by_blocks(x, SMALL, documents=numbered([[210 - tail, tail]] * 2))[1], by_blocks(last, SMALL)[1]]
    counted = pasts[0]._replace(count=tail)
    assert relative(by_blocks(more, SMALL, past=counted)[0], by_blocks(more, SMALL, past=pasts[1])[0]) <= EXACT
