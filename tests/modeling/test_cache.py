"""The cache of a converted layer: its size, what generation strategies do to it, and what it refuses.

Whatever is done to a cache, the logits after it must be those of the full forward pass over the tokens that remain.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from dijiang_convert.modeling.cache import DiJiangCacheLayer, cache_layer
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.past import Past, Sizes
from tests.models import BLOCK, SHARED, WINDOW, difference, feed, forget, kernels, load, logits_of, tokens

TOLERANCE = 1e-4
PROMPT = 150  # far more than the window and what the memory holds; 6 tokens in the last block


@pytest.fixture(
    scope="module",
    params=[
        "frequency",
        "keep",
        "retnet",
        "default",
        "pure",
        "paper",
        "window-only",
        "partial",
        "shared",
        "shared-default",
    ],
)
def model(request: pytest.FixtureRequest) -> Any:
    return load("llama", request.param)


@pytest.fixture(scope="module")
def default() -> Any:
    return load("llama")


def stored_bytes(cache: Cache) -> int:
    """Of all memory that the cache keeps alive for what is past, views of larger tensors in full."""
    storages = {}
    for layer in cache.layers:
        assert isinstance(layer, DiJiangCacheLayer) and layer.past is not None
        for value in layer.past.tensors():
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())


def assert_goes_on(model: Any, cache: Cache, ids: Tensor, tail: Tensor, sizes: tuple[int, ...] = (1,)) -> None:
    """The cache stands for ``ids``: what follows is as after a full forward pass over them."""
    assert cache.get_seq_length() == ids.shape[1]
    found, _ = feed(model, tail, sizes, cache)
    assert difference(found, logits_of(model, torch.cat([ids, tail], 1))[:, ids.shape[1] :]) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize(
    "variant,sizes",
    [
        ("frequency", (100, 1)),
        *(
            (name, (33, 1, 20))
            for name in ("keep", "retnet", "default", "pure", "paper", "window-only", "shared", "shared-default")
        ),
    ],
)
def test_bytes_are_constant(variant: str, sizes: tuple[int, ...]) -> None:
    model = load("llama", variant)
    ids = tokens(2, 1000)
    found = set()
    cache: Cache | None = None
    for start, stop in ((0, 100), (100, 200), (200, 1000)):
        _, cache = feed(model, ids[:, start:stop], sizes, cache)
        found.add(stored_bytes(cache))
    kernel, layers = kernels(model)[0].kernel, kernels(model)[0].layers
    heads = layers.heads if kernel.decay == "retnet" else layers.kv_heads
    features, values = layers.head_dim * (2 if kernel.signed else 1), layers.value_dim
    held, numbers, packed = kernel.window + kernel.block, 0, 0
    for memory in SHARED["llama"] if variant.startswith("shared") else 2 * [heads * [kernel.memory]]:
        if kernel.window:
            for rows in (kernel.sinks + of_head for of_head in memory):  # and received, and score
                numbers += held * (layers.head_dim + values) + held + rows
                packed += rows * (layers.head_dim + 1 + values + 1)
            if kernel.far:  # and keys without rotary embedding, or with their shift, and gates
                numbers += held * layers.kv_heads * layers.head_dim
                numbers += held * (2 * layers.kv_heads * kernel.selective + kernel.decay_rank)
        if kernel.far:
            numbers += heads * features * (values + (1 if kernel.window else 2))  # log_weight has 8 bytes then
            numbers += (layers.heads + layers.kv_heads) * layers.head_dim if kernel.shift else 0  # of the last token
    assert found == {2 * (4 * numbers + packed)}  # two rows; four bytes a number
    made = [each.sizes.empty(2, torch.empty(0)) for each in kernels(model)]
    assert found == {sum(x.nbytes for past in made for x in past.tensors())}


@torch.no_grad()
def test_decoding_allocates_nothing_inside_a_block() -> None:
    """What is kept stays where it is from token to token, but for where a block leaves the window."""
    model, ids = load("llama"), tokens(1, 100)
    _, cache = feed(model, ids, (100,))
    steps = []
    for token in ids[:, :40].split(1, 1):
        feed(model, token, (1,), cache)
        steps.append([x.data_ptr() for layer in cache.layers for x in layer.past.tensors()])  # type: ignore[attr-defined]
    moved = [n for n in range(1, 40) if steps[n] != steps[n - 1]]
    assert len(steps[0]) > 8 and moved == [(112 - 100), (128 - 100)]


def test_answers() -> None:
    layer = DiJiangCacheLayer()
    assert layer.get_seq_length() == 0 and layer.get_max_length() == -1 and not layer.is_initialized
    k, v = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
    assert layer.update(k, v) == (k, v)  # the new ones alone
    assert layer.get_seq_length() == 5 and layer.get_mask_sizes(3) == (8, 0) and layer.is_initialized
    layer.offload()  # it stays where it is
    layer.prefetch()


@pytest.mark.parametrize("variant", ["frequency", "pure", "window-only"])
def test_a_cache_made_in_inference_mode_goes_on_outside(variant: str) -> None:
    model, ids = load("llama", variant), tokens(2, 120)
    with torch.inference_mode():
        cache = model(ids[:, :100], use_cache=True).past_key_values
    found, cache = feed(model, ids[:, 100:110], (1,), cache)
    with torch.inference_mode():
        inside, cache = feed(model, ids[:, 110:115], (1,), cache)
    rest, _ = feed(model, ids[:, 115:], (1,), cache)
    assert difference(torch.cat([found, inside, rest], 1), logits_of(model, ids)[:, 100:]) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------- the batch


@pytest.mark.parametrize("decoded", [0, 5, BLOCK])  # tokens fed one at a time are written in place
def test_batch_operations(model: Any, decoded: int) -> None:
    ids, tail = tokens(3, PROMPT), tokens(6, 20, seed=1)
    _, cache = feed(model, ids, [PROMPT - decoded, 1] if decoded else [PROMPT])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert_goes_on(model, copy.deepcopy(cache), ids[order], tail[:3])
    cache.batch_repeat_interleave(2)
    assert_goes_on(model, copy.deepcopy(cache), ids[order].repeat_interleave(2, 0), tail, (7, 1))
    chosen = torch.tensor([5, 1])
    cache.batch_select_indices(chosen)
    assert_goes_on(model, cache, ids[order].repeat_interleave(2, 0)[chosen], tail[:2])


def test_batch_operations_on_an_empty_cache(default: Any) -> None:
    cache = DynamicCache(config=default.config)
    cache_layer(cache, 0, kernels(default)[0].sizes)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert_goes_on(default, cache, tokens(2, 0), tokens(2, PROMPT))


def test_copies_are_independent(model: Any) -> None:
    ids, tails = tokens(2, PROMPT), [tokens(2, 40, seed=seed) for seed in (1, 2)]
    _, cache = feed(model, ids, [PROMPT - 7, 1])
    other = copy.deepcopy(cache)
    assert_goes_on(model, cache, ids, tails[0])
    assert_goes_on(model, other, ids, tails[1])


def test_reset(model: Any) -> None:
    _, cache = feed(model, tokens(3, PROMPT), [PROMPT - 7, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_goes_on(model, cache, tokens(2, 0), tokens(2, PROMPT, seed=1), (100, 1))


# ------------------------------------------------------------------------------------------------------------ crop


@pytest.mark.parametrize("prompt", [PROMPT, 5])  # with the window full and not yet full
def test_crop_takes_back_exactly(model: Any, prompt: int) -> None:
    """Rounds of speculative decoding: feed guesses, take some back, go on with others."""
    kept, (_, cache) = tokens(2, prompt), feed(model, tokens(2, prompt), [prompt - 3, 1])
    cache.activate_past_recording()
    assert cache.is_croppable
    rounds = [(5, 3), (40, 40), (30, 4), (1, 0), (1, 1), (80, 70), (6, 0), (100, 1), (20, 18)]
    for number, (fed, removed) in enumerate(rounds):
        guesses = tokens(2, fed, seed=10 + number)
        found, _ = feed(model, guesses, [fed], cache)
        tried = torch.cat([kept, guesses], 1)
        assert difference(found, logits_of(model, tried)[:, -fed:]) <= TOLERANCE
        cache.crop(-removed)
        kept = tried[:, : tried.shape[1] - removed]
        assert cache.get_seq_length() == kept.shape[1]
    assert kept.shape[1] > prompt + 100
    assert_goes_on(model, cache, kept, tokens(2, 3, seed=99))


def test_crop_over_several_calls(model: Any) -> None:
    """Guesses fed one by one, as an assistant makes them, are taken back together."""
    ids, guesses = tokens(2, PROMPT), tokens(2, 60, seed=1)
    _, cache = feed(model, ids, [PROMPT - 3, 1])
    cache.activate_past_recording()
    feed(model, guesses, [1, 1, 30, 1, 1, 26], cache)
    cache.crop(-50)
    kept = torch.cat([ids, guesses[:, :10]], 1)
    assert_goes_on(model, cache, kept, tokens(2, 30, seed=2))


def test_recording_keeps_memory_bounded(default: Any) -> None:
    _, cache = feed(default, tokens(1, PROMPT), [PROMPT])
    cache.activate_past_recording()
    found = []
    for number in range(30):
        feed(default, tokens(1, 10, seed=number), [10], cache)
        cache.crop(-4)
        found.append(stored_bytes(cache))
        layer = cache.layers[0]
        assert isinstance(layer, DiJiangCacheLayer) and layer.pending is not None and layer.pending.length == 6
    assert len(set(found)) == 1


@pytest.mark.parametrize("prompt", [PROMPT, WINDOW, 1])  # with keys that left the window, or all still in it
def test_crop_without_recording(model: Any, prompt: int) -> None:
    ids = tokens(2, prompt)
    _, cache = feed(model, ids, [prompt])
    assert not cache.is_croppable
    layer = next(layer for layer in cache.layers if isinstance(layer, DiJiangCacheLayer))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)
    layer.crop(0)
    assert_goes_on(model, cache, ids, tokens(2, 5, seed=1))


def test_crop_of_what_was_fed_before_recording(default: Any) -> None:
    _, cache = feed(default, tokens(1, PROMPT), [PROMPT])
    cache.activate_past_recording()
    feed(default, tokens(1, 3, seed=1), [3], cache)
    with pytest.raises(RuntimeError, match="crop of 4 tokens from a DiJiang cache that can take back 3"):
        cache.layers[0].crop(-4)


# --------------------------------------------------------------------------------------------------- other caches


def test_grown_cache_without_a_config(model: Any) -> None:
    cache = DynamicCache()
    assert_goes_on(model, cache, tokens(2, 0), tokens(2, PROMPT), (100, 1))
    assert any(isinstance(layer, DiJiangCacheLayer) for layer in cache.layers)


def test_cache_filled_by_softmax_is_refused(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    try:
        _, cache = feed(model, tokens(1, 5), [5])
    finally:
        model.set_attn_implementation("dijiang")
    with pytest.raises(ValueError, match="softmax"):
        feed(model, tokens(1, 5), [5], cache)


def test_softmax_refuses_our_cache(model: Any) -> None:
    _, cache = feed(model, tokens(1, 5), [5])
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ValueError, match="empty cache"):
            feed(model, tokens(1, 5), [5], cache)
    finally:
        model.set_attn_implementation("dijiang")


def test_unknown_kinds_of_layers_are_refused(default: Any) -> None:
    cache = DynamicCache(config=default.config)
    cache.layers[0] = LinearAttentionLayer()
    with pytest.raises(ValueError, match="LinearAttentionLayer: pass a DynamicCache, a StaticCache or none"):
        feed(default, tokens(1, 5), [5], cache)


def test_layer_of_another_version_is_refused(default: Any) -> None:
    """Two checkpoints with code of their own have two classes of the same name."""
    cache = DynamicCache(config=default.config)
    cache.layers[0] = type("DiJiangCacheLayer", (DynamicLayer,), {})()
    with pytest.raises(ValueError, match="another DiJiang version"):
        feed(default, tokens(1, 5), [5], cache)


def test_every_part_shows(default: Any) -> None:
    """The tests above could not pass with the window alone, or without any other part of the table."""
    ids, tail = tokens(1, PROMPT), tokens(1, 1, seed=1)
    expected, _ = feed(default, tail, [1], feed(default, ids, [PROMPT])[1])
    for part in ("state", "memory", "sinks", "window"):
        _, cache = feed(default, ids, [PROMPT])
        for layer in cache.layers:
            forget(layer, part)
        assert difference(feed(default, tail, [1], cache)[0], expected) > 100 * TOLERANCE, part


@pytest.mark.parametrize("memory", [(), (3, 3, 3, 5, 5)])
def test_heads_that_were_apart_share_a_table_again(memory: tuple[int, ...]) -> None:
    """Whatever number of them each part had: a text is worked on in parts that stay in a CPU's cache."""
    sizes = Sizes(Kernel(window=16, block=16, memory=4), 10, 5, 8, 6, True, memory)
    past = sizes.empty(2, torch.zeros(1)).map(lambda x: torch.arange(x.numel()).view(x.shape).to(x.dtype))
    parts = past.split([2, 1, 2])
    joined = Past.joined(parts)
    assert len(joined.tables) == len(past.tables) == (2 if memory else 1)
    assert all(map(torch.equal, joined.tensors(), past.tensors()))
