"""Packed rows: every document gets the logits and gradients that it gets alone, far beyond the window."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from dijiang_convert.modeling import modeling_dijiang
from dijiang_convert.training.attention_transfer import attention
from tests.architecture.test_architecture import config_of
from tests.models import KINDS, VARIANTS, difference, load, logits_of, randomise, source, tokens, window_and_state
from tests.sources_on_disk import write_source

TOLERANCE = 1e-4
ROWS = ((1, 150, 9, 90, 60), (200, 109, 1))
LENGTH = sum(ROWS[0])


def positions(rows: Any = ROWS) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def one_by_one(model: Any, ids: Tensor, rows: Any = ROWS) -> Tensor:
    """Logits of every document alone."""
    logits = []
    for row, lengths in zip(ids, rows, strict=True):
        logits.append(torch.cat([logits_of(model, part[None]) for part in row.split(lengths)], 1))
    return torch.cat(logits)


@pytest.fixture(scope="module", params=KINDS)
def default(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.mark.parametrize("name", [*(f"llama-{variant}" for variant in VARIANTS), "neox-frequency", "neox-pure"])
def test_a_packed_row_is_its_documents(name: str) -> None:
    model, ids = load(*name.split("-", 1)), tokens(2, LENGTH)
    expected = one_by_one(model, ids)
    assert difference(logits_of(model, ids, position_ids=positions()), expected) <= TOLERANCE
    if name != "llama-window-only":
        assert difference(logits_of(model, ids)[:1, -20:], expected[:1, -20:]) > 0.01  # documents do matter


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen3", "phi", "mixtral", "gemma3_text"])
def test_in_every_architecture_and_as_the_softmax_model(kind: str, tmp_path: Path) -> None:
    """Opt hands positions to no mask; layers of gemma3 have a sliding window, and stay."""
    changes = {"sliding_window": 20} if kind == "gemma3_text" else {}
    folder = write_source(tmp_path / "source", config_of(kind, initializer_range=0.25, **changes))
    convert(str(folder), tmp_path / "out", settings=["window=16", "block=16", "memory=8"])
    model, ids = randomise(load_converted(tmp_path / "out")).eval(), tokens(2, LENGTH)
    for name in ("dijiang", "sdpa", "dijiang_transfer"):
        with attention(model, name):
            found = logits_of(model, ids, position_ids=positions())
            assert difference(found, one_by_one(model, ids)) <= TOLERANCE
            assert difference(logits_of(model, ids), found) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_softmax_model_is_the_source(kind: str) -> None:
    model, ids = load(kind, attention="sdpa"), tokens(2, LENGTH)
    original = AutoModelForCausalLM.from_pretrained(source(kind)).eval()
    expected = one_by_one(original, ids)
    assert difference(logits_of(original, ids, position_ids=positions()), expected) <= TOLERANCE
    with torch.no_grad():
        assert difference(model(ids, position_ids=positions()).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("positions_given", [True, False])
@pytest.mark.parametrize("variant", ["frequency", "keep", "partial"])
@pytest.mark.parametrize("name", ["dijiang", "sdpa"])
def test_bounds_of_flash_attention(name: str, variant: str, positions_given: bool) -> None:
    model, ids, rows = load("llama", variant), tokens(1, LENGTH), ROWS[:1]
    bounds = torch.tensor([0, *torch.tensor(rows[0]).cumsum(0)], dtype=torch.int32)
    options: dict[str, Any] = {
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 150, "max_length_k": 150,
    }  # fmt: skip
    if positions_given:
        options["position_ids"] = positions(rows)
    with attention(model, name):
        assert difference(logits_of(model, ids, **options), one_by_one(model, ids, rows)) <= TOLERANCE
        one = {**options, "cu_seq_lens_q": bounds[[0, -1]], "cu_seq_lens_k": bounds[[0, -1]]}
        one.pop("position_ids", None)
        assert difference(logits_of(model, ids, **one), logits_of(model, ids)) <= TOLERANCE


def test_how_it_is_called_does_not_matter(default: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By position or by name, ids or embeddings, one row of positions for all, one as if it were a long prompt."""
    ids, rows = tokens(2, LENGTH), (ROWS[0], ROWS[0])
    expected = one_by_one(default, ids, rows)
    with torch.no_grad():
        embeddings = default.get_input_embeddings()(ids)
        found = [
            default(ids, None, positions(rows)).logits,
            default(ids, position_ids=positions(rows[:1])).logits,
            default(inputs_embeds=embeddings, position_ids=positions(rows)).logits,
        ]
        monkeypatch.setattr(modeling_dijiang, "CHUNK", 70)
        found.append(default(ids, position_ids=positions(rows)).logits)
        assert default(ids, position_ids=positions(rows)).past_key_values is None
    for logits in found:
        assert difference(logits, expected) <= TOLERANCE


def test_documents_may_begin_at_any_position(default: Any) -> None:
    model, ids, rows = window_and_state(copy.deepcopy(default)), tokens(2, LENGTH), (ROWS[0], ROWS[0])
    shifted = logits_of(model, ids, position_ids=positions(rows) + 7)
    assert difference(shifted, one_by_one(model, ids, rows)) <= TOLERANCE


def gradients(model: Any, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    weight = torch.randn(2, LENGTH, 1, generator=torch.Generator().manual_seed(0))
    (model(ids, position_ids=positions(), **options).logits.float() * weight).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["frequency", "pure", "paper", "partial", "shared"])
def test_gradient_checkpointing_keeps_documents_apart(variant: str, reentrant: bool) -> None:
    model, ids = load("llama", variant).train(), tokens(2, LENGTH)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, ids)
    assert found.keys() == plain.keys() and any(".dijiang." in name for name in found)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_those_of_the_documents() -> None:
    model, ids = load("llama"), tokens(2, LENGTH)
    found = gradients(model, ids)
    model.zero_grad()
    weight = torch.randn(2, LENGTH, 1, generator=torch.Generator().manual_seed(0))
    for row, lengths, weights in zip(ids, ROWS, weight, strict=True):
        for part, w in zip(row.split(lengths), weights.split(lengths), strict=True):
            (model(part[None], use_cache=False).logits * w).square().sum().div(2 * LENGTH * 258).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_refusals(default: Any) -> None:
    ids, packed = tokens(1, LENGTH), positions(ROWS[:1])
    bounds = torch.tensor([0, 100, LENGTH - 1], dtype=torch.int32)
    for options, reason in (
        ({"position_ids": packed, "attention_mask": torch.ones_like(ids)}, "no attention_mask"),
        ({"position_ids": packed[None].expand(3, -1, -1)}, r"position_ids \[batch, length\]"),
        ({"position_ids": packed, "use_cache": True}, "cache"),
        ({"position_ids": packed, "past_key_values": DynamicCache()}, "cache"),
        ({"cu_seq_lens_q": bounds}, "must cover"),
        ({"cu_seq_lens_q": bounds + 1, "cu_seq_lens_k": bounds}, "alike"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            default(ids, **options)
        assert "\n" not in str(error.value)


@torch.no_grad()
@pytest.mark.parametrize("given", ["positions", "bounds"])
def test_a_body_without_its_head_keeps_documents_apart(default: Any, given: str) -> None:
    """Some libraries call the body and compute the loss themselves."""
    ids, packed = tokens(1, LENGTH), positions(ROWS[:1])
    options: dict[str, Any] = {"position_ids": packed}
    if given == "bounds":
        ends = torch.tensor([0, *ROWS[0]]).cumsum(0).int()
        options |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    found = default.base_model(ids, use_cache=False, **options).last_hidden_state
    wanted = default(ids, use_cache=False, output_hidden_states=True, **options).hidden_states[-1]
    assert difference(found, wanted) == 0
    second = slice(ROWS[0][0], ROWS[0][0] + ROWS[0][1])
    alone = default.base_model(ids[:, second], use_cache=False).last_hidden_state
    assert difference(found[:, second], alone) <= TOLERANCE
    assert difference(found, default.base_model(ids, use_cache=False).last_hidden_state) > 0.01


@torch.no_grad()
def test_a_compiled_graph_has_room_for_as_many_documents_as_blocks() -> None:
    """More of them are an error, not wrong numbers."""
    torch._dynamo.reset()
    model, ids = load("llama"), tokens(1, 64)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    for documents in (1, 2, 4):
        packed = positions(((64 // documents,) * documents,))
        found = compiled(ids, position_ids=packed, use_cache=False).logits
        assert difference(found, logits_of(model, ids, position_ids=packed)) <= TOLERANCE
    with pytest.raises(RuntimeError, match="more documents than blocks"):
        compiled(ids, position_ids=positions(((4,) * 16,)), use_cache=False)
    torch._dynamo.reset()


def test_padding_with_positions_is_not_packing(default: Any) -> None:
    """Positions of padding are whatever the caller likes."""
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    given = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    expected = logits_of(default, ids[:1, 20:])
    found = logits_of(default, ids, attention_mask=mask, position_ids=given)
    assert difference(found[:1, 20:], expected) <= TOLERANCE
