"""`StaticCache`: the same numbers from tensors that keep their place, and a decode step that compiles once.

Sequences reach far beyond the window of 16 and what the memory holds.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

from dijiang_convert.modeling.cache import DiJiangCacheLayer, StaticDiJiangCacheLayer
from tests.models import VARIANTS, difference, feed, forget, kernels, load, logits_of, tokens

TOLERANCE = 1e-4
LENGTH, PLACES = 230, 240
NAMES = [*(f"llama-{variant}" for variant in VARIANTS), "neox-frequency", "neox-partial", "neox-shared"]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1))


@pytest.fixture(scope="module", params=["llama-frequency", "llama-partial-first", "llama-pure", "neox-shared"])
def some(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1))


@pytest.fixture(scope="module")
def default() -> Any:
    return load("llama")


def static(model: Any, places: int = PLACES) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=places)


def tensors(cache: Any) -> list[Tensor]:
    """All that converted layers keep."""
    return [x for layer in cache.layers if isinstance(layer, StaticDiJiangCacheLayer) for x in layer._tensors()]


@pytest.mark.parametrize("sizes", [(1,), (1, 7, 64, 100, 1, 1, 1), (LENGTH,)], ids=str)
def test_static_equals_full(model: Any, sizes: tuple[int, ...]) -> None:
    """From the first token, over whole prompts, and again after a reset."""
    cache = static(model)
    for seed in (0, 1):
        ids = tokens(2, LENGTH, seed)
        found, same = feed(model, ids, sizes, cache)
        assert difference(found, logits_of(model, ids)) <= TOLERANCE
        assert same is cache and int(cache.get_seq_length()) == LENGTH
        assert any(isinstance(layer, StaticDiJiangCacheLayer) for layer in cache.layers)
        cache.reset()
        assert int(cache.get_seq_length()) == 0


def test_tensors_stay_where_they_are(model: Any) -> None:
    ids, cache = tokens(2, LENGTH), static(model)
    feed(model, ids[:, :50], [50], cache)
    places = [(x.data_ptr(), x.shape, x.dtype) for x in tensors(cache)]
    feed(model, ids[:, 50:], [100, 1], cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert [(x.data_ptr(), x.shape, x.dtype) for x in tensors(cache)] == places
    longer = static(model, 10 * PLACES)
    feed(model, ids, [LENGTH], longer)
    assert places and [(x.shape, x.dtype) for x in tensors(longer)] == [place[1:] for place in places]


@pytest.mark.parametrize(
    "variant", ["frequency", "keep", "retnet", "default", "pure", "paper", "window-only", "shared", "shared-default"]
)
def test_made_beforehand(variant: str) -> None:
    """`early_initialization` makes what the first call would have made."""
    model, ids = load("llama", variant), tokens(2, LENGTH)
    lazy, early = static(model), static(model)
    feed(model, ids[:, :50], [50], lazy)
    for index, child in enumerate(kernels(model)):
        early.layers[index] = StaticDiJiangCacheLayer(child.sizes, PLACES)
    layers = kernels(model)[0].layers
    early.early_initialization(2, layers.kv_heads, layers.head_dim, torch.float32, torch.device("cpu"))
    assert [x.shape for x in tensors(early)] == [x.shape for x in tensors(lazy)]
    assert [x.dtype for x in tensors(early)] == [x.dtype for x in tensors(lazy)]
    found, _ = feed(model, ids, [1], early)
    assert difference(found, logits_of(model, ids)) <= TOLERANCE


def test_every_part_shows(some: Any) -> None:
    """The tests above could not pass with the window alone, or without any other part of the table."""
    ids, cache = tokens(2, LENGTH), static(some)
    feed(some, ids[:, :-1], [LENGTH - 1], cache)
    expected, _ = feed(some, ids[:, -1:], [1], copy.deepcopy(cache))
    parts = ("state", "memory", "sinks") if kernels(some)[0].kernel.window else ("state",)
    for part in parts:
        other = copy.deepcopy(cache)
        for layer in other.layers:
            if isinstance(layer, StaticDiJiangCacheLayer):
                forget(layer, part)
        assert difference(feed(some, ids[:, -1:], [1], other)[0], expected) > 100 * TOLERANCE, part


# ----------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("length_of_mask", ["so far", "of the cache"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: Any, side: str, length_of_mask: str) -> None:
    """Rows of a padded batch equal the rows alone, by a mask that grows or one with places for tokens to come."""
    prompt, tail, lengths = 150, 30, (150, 60, 101)
    ids, mask = tokens(3, prompt + tail), torch.ones(3, PLACES, dtype=torch.long)
    for row, length in enumerate(lengths):
        part = slice(0, prompt - length) if side == "left" else slice(length, prompt)
        mask[row, part] = ids[row, part] = 0
    cache, parts, start = static(model), [], 0
    for size in (prompt, 1, 10, *[1] * (tail - 11)):
        end = start + size
        given = mask[:, :end] if length_of_mask == "so far" else mask
        with torch.no_grad():
            parts.append(
                model(ids[:, start:end], attention_mask=given, past_key_values=cache, use_cache=True).logits
            )  # fmt: skip
        start = end
    logits = torch.cat(parts, 1)
    for row in range(3):
        real = mask[row, : prompt + tail].bool()
        assert difference(logits[row, real], logits_of(model, ids[row : row + 1, real])[0]) <= TOLERANCE


def test_single_tokens_of_padding(some: Any) -> None:
    """Rows take turns: in each step one row's token is padding."""
    steps, cache, logits = 120, static(some), []
    ids = tokens(2, steps)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]]).repeat(1, steps // 4)
    for i in range(steps):
        with torch.no_grad():
            out = some(ids[:, i, None], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    found = torch.cat(logits, 1)
    for row in range(2):
        alone = ids[row, mask[row].bool()]
        assert len(alone) == 90
        assert difference(found[row, mask[row].bool()], logits_of(some, alone[None])[0]) <= TOLERANCE


# --------------------------------------------------------------------------------------------- the batch, and refusals


def test_reordered_rows(some: Any) -> None:
    ids, tail, order = tokens(3, 150), tokens(3, 20, seed=1), torch.tensor([2, 0, 0])
    _, cache = feed(some, ids, [140, 1], static(some))
    cache.reorder_cache(order)
    found, _ = feed(some, tail, [1], cache)
    assert difference(found, logits_of(some, torch.cat([ids[order], tail], 1))[:, 150:]) <= TOLERANCE


def test_repeated_and_chosen_rows(default: Any) -> None:
    """For prompts that several continuations share; softmax's own static layers can't do it."""
    ids, tail = tokens(2, 150), tokens(4, 20, seed=1)
    _, cache = feed(default, ids, [140, 1], static(default))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    expected = logits_of(default, torch.cat([ids.repeat_interleave(2, 0), tail], 1))[:, 150:]
    assert difference(feed(default, tail, [1], copy.deepcopy(cache))[0], expected) <= TOLERANCE
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache.batch_size == 2
    assert difference(feed(default, tail[[3, 0]], [1], cache)[0], expected[[3, 0]]) <= TOLERANCE


def test_copies_are_independent(some: Any) -> None:
    ids, tails = tokens(2, 150), [tokens(2, 30, seed=seed) for seed in (1, 2)]
    _, cache = feed(some, ids, [140, 1], static(some))
    for other, tail in zip((copy.deepcopy(cache), cache), tails, strict=True):
        found, _ = feed(some, tail, [1], other)
        assert difference(found, logits_of(some, torch.cat([ids, tail], 1))[:, 150:]) <= TOLERANCE


def test_parameters_may_change_between_texts() -> None:
    """What decoding makes of them once is made anew after a reset."""
    model, ids = load("llama"), tokens(1, 60)
    cache = static(model)
    feed(model, ids, [1], cache)
    with torch.no_grad():
        for child in kernels(model):
            child.q_features.bias.add_(1.0)
            child.gates.selection.neg_()
    cache.reset()
    assert difference(feed(model, ids, [1], cache)[0], logits_of(model, ids)) <= TOLERANCE


def test_refusals(some: Any) -> None:
    ids, cache = tokens(2, 60), static(some)
    feed(some, ids, [50, 1], cache)
    layer = next(layer for layer in cache.layers if isinstance(layer, StaticDiJiangCacheLayer))
    assert not cache.is_croppable and cache.is_compileable and layer.get_max_length() == PLACES
    with pytest.raises(RuntimeError, match="take tokens back"):
        layer.crop(-1)
    with pytest.raises(NotImplementedError, match="assisted decoding needs a dynamic"):
        cache.activate_past_recording()
    if not isinstance(cache.layers[0], StaticLayer):
        with pytest.raises(ValueError, match="holds 2 rows, not 3"):
            feed(some, tokens(3, 5), [5], cache)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        some(ids, past_key_values=static(some), use_cache=True)
    for shape in ((1, 1, 60, 60), (1, 1, 1, 110), (1, 1, 60, PLACES)):
        with pytest.raises(ValueError, match="4 dimensions"):
            some(ids, attention_mask=torch.ones(*shape, dtype=torch.bool), past_key_values=cache)


# ---------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling", "several"],
)
@pytest.mark.parametrize("padded", [0, 60])
def test_generate(model: Any, options: dict[str, Any], padded: int) -> None:
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :padded] = ids[0, :padded] = 0
    found = []
    for implementation in (None, "static"):
        torch.manual_seed(0)
        found.append(
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=30,
                min_new_tokens=30,
                cache_implementation=implementation,
                **{"do_sample": False, **options},
            )  # fmt: skip
        )
    assert torch.equal(*found)
    assert len(found[0][0, 150:].unique()) >= 3


def test_generate_goes_on_from_a_static_cache(some: Any) -> None:
    """Chat: the second turn with the cache of the first."""
    options: dict[str, Any] = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False}
    cache = static(some)
    first = some.generate(tokens(1, 120), past_key_values=cache, return_dict_in_generate=True, **options)
    ids = torch.cat([first.sequences, tokens(1, 30, seed=1)], 1)
    found = some.generate(ids, past_key_values=cache, **options)
    assert torch.equal(found, some.generate(ids, use_cache=False, **options))


# ----------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def compiler() -> Iterator[Any]:
    """torch.compile's counters, and an error where a graph is compiled a second time."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def graphs(counters: Any) -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["llama-frequency", "llama-keep", "llama-pure", "llama-paper", "neox-partial"])
def test_decode_step_compiles_once(name: str, compiler: Any) -> None:
    model, ids = load(*name.split("-", 1)), tokens(2, LENGTH)
    cache = static(model)
    parts = [feed(model, ids[:, :90], [90], cache)[0]]
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        for i in range(90, LENGTH):
            parts.append(step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    assert difference(torch.cat(parts, 1), logits_of(model, ids)) <= TOLERANCE
    assert graphs(compiler) == 1


@pytest.mark.parametrize("variant", ["frequency", "partial", "shared"])
@pytest.mark.parametrize("padded", [0, 60])
def test_generate_compiles_once(variant: str, padded: int, compiler: Any) -> None:
    """As transformers compiles the forward of generate(): on its own on a GPU, on request elsewhere."""
    model = load("llama", variant)
    ids, mask = tokens(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :padded] = ids[0, :padded] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False,
    }  # fmt: skip
    expected = model.generate(ids, **options)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(found, expected)
    assert graphs(compiler) == 1


@pytest.mark.parametrize("variant", ["frequency", "pure", "paper", "partial", "shared"])
@pytest.mark.parametrize("given", ["nothing", "mask", "padding", "positions", "documents"])
def test_whole_sequences_compile(variant: str, given: str, compiler: Any) -> None:
    model, ids = load("llama", variant), tokens(2, 150)
    places = torch.arange(150).expand(2, -1)
    mask = torch.ones_like(ids)
    options: dict[str, dict[str, Tensor]] = {
        "nothing": {}, "mask": {"attention_mask": mask}, "positions": {"position_ids": places},
        "padding": {"attention_mask": torch.where((places < 50) & torch.tensor([[True], [False]]), 0, mask)},
        "documents": {"position_ids": torch.where(places < 60, places, places - 60)},
    }  # fmt: skip
    expected = logits_of(model, ids, **options[given])
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(ids, use_cache=False, **options[given]).logits
    real = options[given].get("attention_mask", mask).bool()  # what comes out at padding means nothing
    assert difference(found[real], expected[real]) <= TOLERANCE
    assert graphs(compiler) == 1


@pytest.mark.parametrize("variant", ["frequency", "partial"])
def test_training_compiles(variant: str, compiler: Any) -> None:
    model, ids = load("llama", variant).train(), tokens(2, 150)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.compile(model.forward, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    assert graphs(compiler) == 1


def test_dynamic_layers_beside_static_ones() -> None:
    """A converted layer follows the kind of layer that it replaces."""
    model = load("llama")
    _, dynamic = feed(model, tokens(1, 5), [5])
    assert all(type(layer) is DiJiangCacheLayer for layer in dynamic.layers)
