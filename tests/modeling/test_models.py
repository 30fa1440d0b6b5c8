"""Converted models against the definition and against themselves: with a cache, and in all that transformers does.

Sequences are much longer than the window of 16 and what the memory holds; `test_every_part_matters` shows that no model
could pass by its window alone.
"""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dijiang_convert.modeling import attention, table
from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from dijiang_convert.modeling.kernel import attend_blocks
from dijiang_convert.modeling.linear import attend_chunks
from dijiang_convert.modeling.state import Decay, Written
from dijiang_convert.modeling.table import Keys, Logits, Queries
from tests.modeling import naive
from tests.modeling.naive import Inputs
from tests.models import (
    KINDS,
    MODELS,
    WITH_STATE,
    difference,
    feed,
    forget,
    kernels,
    load,
    logits_of,
    source,
    tokens,
)

TOLERANCE = 1e-4
LENGTH = 310


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1))


@pytest.fixture(scope="module", params=KINDS)
def default(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


# ----------------------------------------------------------------------------------------------- one whole sequence


def slots(written: list[Written], first: int, count: int) -> tuple[Tensor | None, Decay]:
    """What ``count`` tokens write, the first of which is in slot ``first``. The last of them, which write nothing
    before the text ends, get zeros. [B, G, N, 1 or F]."""

    def in_line(parts: list[Tensor]) -> Tensor:
        x = torch.cat(parts, 2).flatten(2, 3)[:, :, first:].double()
        return torch.nn.functional.pad(x, (0, 0, 0, max(count - x.shape[2], 0)))[:, :, :count]

    if not written:
        return None, Decay()
    parts = zip(*(piece.decay for piece in written), strict=True)
    decay = Decay(*(None if part[0] is None else in_line(list(part)) for part in parts))
    return in_line([piece.logits() for piece in written]), decay


@torch.no_grad()
def test_forward_equals_the_definition(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with every converted layer one token after the other in float64."""
    ids, calls = tokens(2, LENGTH), []
    found = logits_of(model, ids)

    def by_token(queries: Queries, keys: Keys, layout: Any, past: Any, kernel: Any, logits: Logits) -> Any:
        _, after = attend_blocks(queries, keys, layout, past, kernel, logits)
        first = layout.before
        written, decay = slots(keys.written, first, LENGTH)
        features = None if queries.features is None else queries.features[:, :, :LENGTH].double()
        k, v = (x[:, :, first : first + LENGTH].double() for x in (keys.k, keys.v))
        out = naive.table(Inputs(queries.q[:, :, :LENGTH].double(), k, v, features, written, decay), kernel, logits)
        calls.append(1)
        return torch.nn.functional.pad(out, (0, 0, 0, queries.q.shape[2] - LENGTH)), after

    def linear(features: Tensor, written: Written, layout: Any, past: Any, normalize: bool) -> Any:
        _, after = attend_chunks(features, written, layout, past, normalize)
        q, (features_of_keys, decay) = features[:, :, :LENGTH].double(), slots([written], 0, LENGTH)
        v = written.values.flatten(2, 3)[:, :, :LENGTH].double()
        out = naive.linear(Inputs(q, v, v, q, features_of_keys, decay), normalize)
        calls.append(1)
        return torch.nn.functional.pad(out, (0, 0, 0, features.shape[2] - LENGTH)), after

    monkeypatch.setattr(attention, "attend_blocks", by_token)
    monkeypatch.setattr(attention, "attend_chunks", linear)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE
    assert len(calls) == sum(len(each.groups) for each in kernels(model))


PARTS = [("frequency", part) for part in ("state", "memory", "sinks")] + [
    *(("default", part) for part in ("memory", "sinks")),
    ("window-only", "sinks"),
    *(("shared", part) for part in ("memory", "sinks")),
    ("no-memory", "sinks"),
    *((variant, "state") for variant in WITH_STATE if variant != "frequency"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant,part", PARTS)
def test_every_part_matters(kind: str, variant: str, part: str) -> None:
    """Deleting what is in any part of the table changes the last logits by far more than any tolerance."""
    model, ids = load(kind, variant), tokens(2, LENGTH)
    _, cache = feed(model, ids[:, :-1], [LENGTH - 1])
    expected, _ = feed(model, ids[:, -1:], [1], copy.deepcopy(cache))
    for layer in cache.layers:
        if isinstance(layer, DiJiangCacheLayer):
            forget(layer, part)
    forgotten, _ = feed(model, ids[:, -1:], [1], cache)
    assert difference(forgotten, expected) > 100 * TOLERANCE

    other = ids.clone()  # and keys of many blocks ago can be read
    other[:, :100] = tokens(2, 100, seed=1)
    assert difference(logits_of(model, other)[:, -1:], expected) > 10 * TOLERANCE


@pytest.mark.parametrize("sizes", [(1,), (1, 7, 64, 130, 1, 1, 90)], ids=str)
def test_cached_equals_full(model: Any, sizes: tuple[int, ...]) -> None:
    ids = tokens(2, LENGTH)
    found, cache = feed(model, ids, sizes)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("length", [150, 333])
def test_with_and_without_gradients(model: Any, length: int) -> None:
    """A prompt and single tokens as they are generated with, and a text as it is trained on."""
    ids = tokens(2, length)
    found, cache = feed(model, ids[:, :-20], (length - 20,))
    rest, _ = feed(model, ids[:, -20:], (1,), cache)
    with torch.enable_grad():
        expected = model(ids, use_cache=False).logits.detach()
    assert difference(torch.cat([found, rest], 1), expected) <= TOLERANCE
    assert difference(logits_of(model, ids), expected) <= TOLERANCE


@pytest.mark.parametrize("numbers", [1, 2**12])
def test_pieces_change_nothing(model: Any, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few heads and a few blocks at a time, as it is with long texts: alone, padded, packed, and after a cache."""
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :100] = 0
    places = torch.arange(LENGTH).expand(2, -1) % 130
    options: list[dict[str, Any]] = [{}, {"attention_mask": mask}, {"position_ids": places}]
    whole = [logits_of(model, ids, **given) for given in options]
    monkeypatch.setattr(table, "PIECE", numbers)
    for given, expected in zip(options, whole, strict=True):
        real = given.get("attention_mask", torch.ones_like(mask)).bool()
        assert difference(logits_of(model, ids, **given)[real], expected[real]) <= TOLERANCE
    assert difference(feed(model, ids, (1, 70, 130, 1, 1, 107))[0], whole[0]) <= TOLERANCE


@pytest.mark.parametrize("variant", ["frequency", "keep", "default"])
@torch.no_grad()
def test_pieces_of_heads_with_a_cap_and_a_sink(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which some sources have for every query head."""
    child = kernels(load("llama", variant))[0]
    q, k, v, hidden = (torch.randn(2, heads, 200, size) for heads, size in ((4, 8), (2, 8), (2, 8), (1, 32)))
    call = Call(None, hidden[:, 0], None, logits=Logits(0.3, 2.0, torch.tensor([-1.0, 0.5, 2.0, 4.0])))
    whole = child(q, k, v, None, call)
    assert difference(whole, child(q, k, v, None, call._replace(logits=Logits(0.3)))) > 100 * TOLERANCE
    monkeypatch.setattr(table, "PIECE", 1)
    assert difference(child(q, k, v, None, call), whole) <= TOLERANCE


def test_batch_rows_are_independent(default: Any) -> None:
    ids = tokens(3, LENGTH)
    rows = torch.cat([logits_of(default, row[None]) for row in ids])
    assert difference(logits_of(default, ids), rows) <= TOLERANCE


def test_embeddings_instead_of_ids(default: Any) -> None:
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    embedded = default.get_input_embeddings()(ids)
    with torch.no_grad():
        found = default(inputs_embeds=embedded, attention_mask=mask).logits
    assert difference(found, logits_of(default, ids, attention_mask=mask)) <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------- generate

PROMPT, NEW = 120, 14


def assert_same_generation(model: Any, ids: Tensor, **options: Any) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        out = model.generate(
            ids, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=use_cache, return_dict_in_generate=True, **options
        )
        found.append(out.sequences)
        assert out.sequences.shape[1] == ids.shape[1] + NEW
    assert torch.equal(*found)
    assert len(found[0][0, ids.shape[1] :].unique()) >= 3  # not one token for ever


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling", "several"],
)
def test_generate(model: Any, options: dict[str, Any]) -> None:
    ids = tokens(2, PROMPT)
    options = {"do_sample": False, **options}
    assert_same_generation(model, ids, attention_mask=torch.ones_like(ids), **options)


def test_generate_from_a_padded_batch(model: Any) -> None:
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    ids = ids * mask
    assert_same_generation(model, ids, attention_mask=mask, do_sample=False)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    both = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 50:], attention_mask=mask[:1, 50:], **options)
    assert torch.equal(both[0, 50:], alone[0])


def test_generate_goes_on_from_a_cache(default: Any) -> None:
    """A second turn with the cache that the first one returned."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    first = default.generate(tokens(1, PROMPT), return_dict_in_generate=True, **options)
    ids = torch.cat([first.sequences, tokens(1, 30, seed=1)], 1)
    cached = default.generate(ids, past_key_values=first.past_key_values, **options)
    assert torch.equal(cached, default.generate(ids, use_cache=False, **options))


def assistants(model: Any) -> dict[str, Any]:
    """Another model, which guesses badly, and one that is nearly the same, which guesses well."""
    near = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.003)
    return {
        "bad": load("llama", "pure"),
        "good": near,
        "softmax": AutoModelForCausalLM.from_pretrained(source("llama")),
    }


@pytest.mark.parametrize("variant", ["frequency", "pure", "window-only", "partial"])
@pytest.mark.parametrize("guesses", ["good", "bad", "softmax"])
def test_assisted_decoding(variant: str, guesses: str) -> None:
    """Converted model as the main one, and (but for ``softmax``) as the assistant too."""
    model = load("llama", variant)
    assistant = assistants(model)[guesses]
    ids = tokens(1, PROMPT)
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)  # nothing is left behind
    if guesses == "softmax":  # and the other way round
        expected = assistant.generate(ids, **options)
        assert torch.equal(assistant.generate(ids, assistant_model=model, **options), expected)


def test_prompt_lookup_decoding(default: Any) -> None:
    ids = tokens(1, 40).repeat(1, 4)
    options: dict[str, Any] = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    assert torch.equal(default.generate(ids, prompt_lookup_num_tokens=3, **options), default.generate(ids, **options))


# ------------------------------------------------------------------------------------------- switching, and refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["frequency", "paper", "partial"])
def test_sdpa_is_the_source(kind: str, variant: str) -> None:
    """The teacher: base weights are untouched, and softmax attention is the source's own."""
    ids = tokens(2, LENGTH)
    original = AutoModelForCausalLM.from_pretrained(source(kind)).eval()
    mask = torch.ones_like(ids)
    mask[0, :100] = 0
    converted = load(kind, variant, attention="sdpa")
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(logits_of(converted, ids, **options), logits_of(original, ids, **options))
    switched = load(kind, variant)
    assert difference(logits_of(switched, ids), logits_of(original, ids)) > 0.1
    switched.set_attn_implementation("sdpa")
    assert torch.equal(logits_of(switched, ids), logits_of(original, ids))
    assert torch.equal(feed(switched, ids, [300, 1])[0], feed(original, ids, [300, 1])[0])
    switched.set_attn_implementation("dijiang")
    assert torch.equal(logits_of(switched, ids), logits_of(load(kind, variant), ids))


def test_refusals(default: Any) -> None:
    ids = tokens(1, 80)
    with pytest.raises(ValueError, match="output_attentions"):
        default(ids, output_attentions=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        default(ids, attention_mask=torch.ones(1, 1, 80, 80))
    with pytest.raises(ValueError, match="output_attentions"):  # by transformers itself
        default.config.output_attentions = True


def test_inner_model_on_its_own(default: Any) -> None:
    """`model.model(...)` builds a plain cache; converted layers put theirs in it."""
    inner, ids = default.base_model, tokens(2, LENGTH)
    with torch.no_grad():
        expected = inner(ids, use_cache=False).last_hidden_state
        out = inner(ids[:, :200], use_cache=True)
        cache, parts = out.past_key_values, [out.last_hidden_state]
        for part in (ids[:, 200:300], *ids[:, 300:].split(1, 1)):
            parts.append(inner(part, past_key_values=cache, use_cache=True).last_hidden_state)
    assert all(isinstance(layer, DiJiangCacheLayer) for layer in cache.layers)
    assert difference(torch.cat(parts, 1), expected) <= TOLERANCE


def test_threads_do_not_meet(default: Any) -> None:
    """Two sequences decoded by one model at the same time."""
    prompts = [tokens(1, 100, seed=seed) for seed in (1, 2)]
    expected = [logits_of(default, ids) for ids in prompts]
    found: dict[int, Tensor] = {}
    barrier = threading.Barrier(2)

    def decode(index: int) -> None:
        barrier.wait()
        found[index] = feed(default, prompts[index], [30, 1])[0]

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert difference(found[index], expected[index]) <= TOLERANCE


def test_copies_and_saved_models(default: Any, tmp_path: Path) -> None:
    """A deep copy is a model of its own, and a saved one loads as it was."""
    ids = tokens(1, LENGTH)
    expected = logits_of(default, ids)
    other = copy.deepcopy(default)
    with torch.no_grad():
        for child in kernels(other):
            child.q_features.frequency.zero_()
    assert difference(logits_of(other, ids), expected) > 100 * TOLERANCE
    assert torch.equal(logits_of(default, ids), expected)
    default.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(default).from_pretrained(tmp_path), ids), expected)
