"""Converted models against themselves: cached and padded against whole sequences, and all that transformers does.

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
from transformers import AutoModelForCausalLM, DynamicCache

from dijiang_convert.modeling import attention
from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from dijiang_convert.modeling.kernel import attend_blocks
from dijiang_convert.modeling.linear import attend_chunks
from dijiang_convert.modeling.rotary import known_rotation
from dijiang_convert.modeling.state import Decay, Written
from dijiang_convert.modeling.table import Keys, Logits, Queries
from dijiang_convert.models import load_converted
from tests.modeling import naive
from tests.modeling.naive import Inputs
from tests.models import (
    KINDS,
    VARIANTS,
    WITH_STATE,
    assert_state_is_float32,
    checkpoint,
    difference,
    feed,
    forget,
    kernels,
    load,
    logits_of,
    randomise,
    root_mean_square,
    source,
    tokens,
    typical,
)

TOLERANCE = 1e-4
LENGTH = 310


@pytest.fixture(
    scope="module",
    params=[*(f"llama-{variant}" for variant in VARIANTS), "neox-default", "neox-pure", "neox-partial"],
)
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

    def table(queries: Queries, keys: Keys, layout: Any, past: Any, kernel: Any, logits: Logits) -> Any:
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

    monkeypatch.setattr(attention, "attend_blocks", table)
    monkeypatch.setattr(attention, "attend_chunks", linear)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE
    assert len(calls) == len(kernels(model))


PARTS = [("default", part) for part in ("state", "memory", "sinks")] + [
    *(("no-state", part) for part in ("memory", "sinks")),
    ("window-only", "sinks"),
    ("no-memory", "sinks"),
    *((variant, "state") for variant in WITH_STATE if variant != "default"),
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


# ----------------------------------------------------------------------------------------------------------- padding


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("positions", ["given", "derived"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, side: str, positions: str) -> None:
    """Rows of a padded batch equal the rows alone, and so does what follows in the cache."""
    ids, tail, lengths = tokens(3, LENGTH), tokens(3, 24, seed=1), (LENGTH, 90, 200)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        part = slice(LENGTH - length, LENGTH) if side == "left" else slice(0, length)
        mask[row, part] = 1
    ids = torch.where(mask.bool(), ids, 0)
    given = {"position_ids": positions_of(mask)} if positions == "given" else {}
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True, **given)
        assert difference(logits_of(model, ids, attention_mask=mask, **given), out.logits) <= TOLERANCE
    cache, after = out.past_key_values, []
    for start, stop in ((0, 1), (1, 20), *((n, n + 1) for n in range(20, 24))):
        mask = torch.cat([mask, torch.ones(3, stop - start, dtype=torch.long)], 1)
        given = {"position_ids": positions_of(mask)[:, start - stop :]} if positions == "given" else {}
        with torch.no_grad():
            after.append(
                model(tail[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True, **given).logits
            )
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, mask[row, :LENGTH].bool()]
        expected = logits_of(model, torch.cat([alone, tail[row : row + 1]], 1))[0]
        assert difference(out.logits[row, mask[row, :LENGTH].bool()], expected[:length]) <= TOLERANCE
        assert difference(torch.cat(after, 1)[row], expected[length:]) <= TOLERANCE


def test_padding_in_the_middle(model: Any) -> None:
    """A chat of turns that are unequally long for the rows of a batch."""
    turns = [(120, 40), (3, 17), (1, 1), (20, 90), (64, 5), (1, 1), (1, 1), (2, 30)]
    mask, cache = torch.zeros(2, 0, dtype=torch.long), None
    rows: list[list[Tensor]] = [[], []]
    logits: list[list[Tensor]] = [[], []]
    for number, lengths in enumerate(turns):
        ids, new = tokens(2, max(lengths), seed=number), torch.zeros(2, max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            new[row, :length] = 1  # padded to the right, as between turns
        mask = torch.cat([mask, new], 1)
        with torch.no_grad():
            out = model(ids * new, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for row, length in enumerate(lengths):
            rows[row].append(ids[row, :length])
            logits[row].append(out.logits[row, :length])
    for row in range(2):
        alone = torch.cat(rows[row])[None]
        assert alone.shape[1] > 150
        assert difference(torch.cat(logits[row]), logits_of(model, alone)[0]) <= TOLERANCE


@torch.no_grad()
def test_padding_inside_the_window(model: Any) -> None:
    """A row that is padded inside the window at first, decoded far beyond it."""
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[0, :12] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    out = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
    cache, parts = out.past_key_values, [out.logits]
    for i in range(20, 90):
        given = mask[:, : i + 1]
        parts.append(model(ids[:, i, None], past_key_values=cache, use_cache=True, attention_mask=given).logits)
    assert difference(torch.cat(parts, 1)[:, 12:], expected[:, 12:]) <= TOLERANCE


def test_masks_of_ones_change_nothing(default: Any) -> None:
    ids = tokens(2, LENGTH)
    expected = logits_of(default, ids)
    for mask in (torch.ones_like(ids), torch.ones_like(ids).bool(), torch.ones(2, LENGTH)):
        assert torch.equal(logits_of(default, ids, attention_mask=mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_do_not_matter_without_rotation(kind: str) -> None:
    """With rotary embedding removed the far part depends on content and distance alone."""
    ids = tokens(2, LENGTH)
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    moved = {}
    for variant in ("default", "keep"):
        model = load(kind, variant)
        expected = logits_of(model, ids, position_ids=positions)
        assert difference(expected, logits_of(model, ids)) <= TOLERANCE
        moved[variant] = difference(logits_of(model, ids, position_ids=positions + 100), expected)
    assert moved["default"] <= 1e-3 < 1e-2 < moved["keep"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1.3])  # YaRN lengthens cos and sin
def test_rotation_is_undone(kind: str, scale: float) -> None:
    child, model = kernels(load(kind))[0], load(kind)
    x = torch.randn(2, 4, 50, child.layers.head_dim)
    cos, sin = (scale * t for t in model.base_model.rotary_emb(x, torch.arange(1000, 1050)[None]))
    dim = cos.shape[-1]
    assert dim == (child.layers.head_dim if kind == "llama" else child.layers.head_dim // 4)
    turned = torch.cat([child.apply_rotary(x[..., :dim], x[..., :dim], cos, sin)[0], x[..., dim:]], -1)
    assert difference(turned, x) > 0.1
    for undone in child._without_rotation(turned, turned, (cos, sin)):
        assert difference(undone, x) <= 1e-5
    turn = known_rotation(child.apply_rotary, cos, sin, child.layers.rotary_dim)
    assert turn is not None and turn.partner.shape == (dim,)  # though it is given the whole head
    assert difference(turn.back(turned, cos, sin), x) <= 1e-5
    for i in (0, 49):
        one = turn.back(turned[:, :, i : i + 1], cos[:, i : i + 1], sin[:, i : i + 1])
        assert difference(one, x[:, :, i : i + 1]) <= 1e-5
    rows = torch.cat([cos[:, :1], cos[:, 1:2]]), torch.cat([sin[:, :1], sin[:, 1:2]])  # each row of a place of its own
    first = torch.stack([turned[0, :, :1], turned[1, :, 1:2]])
    assert difference(turn.back(first, *rows), torch.stack([x[0, :, :1], x[1, :, 1:2]])) <= 1e-5
    assert known_rotation(child.apply_rotary, cos, sin, dim - 1) is None


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


@pytest.mark.parametrize("variant", ["default", "pure", "window-only", "partial"])
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


# ---------------------------------------------------------------------------------------------------------- training


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
@pytest.mark.parametrize("variant", ["default", "pure", "paper", "partial"])
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


@pytest.mark.parametrize("variant", ["default", "no-memory", "pure", "paper", "partial"])
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


@pytest.mark.parametrize("variant", ["default", "pure", "paper"])
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


# ------------------------------------------------------------------------------------------- switching, and refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["default", "paper", "partial"])
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
