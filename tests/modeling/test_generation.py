"""generate() in all its ways, for converted models and for those that keep softmax layers: one cache object.

What each way gives is compared with what needs no cache. Prompts reach far beyond the window of 16 and the chunk of 64.
(Greedy, beams, sampling, padded batches and assistants: see test_models.)
"""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from tests.models import checkpoint, difference, feed, load, logits_of, source, tokens

TOLERANCE = 1e-4
PROMPT, NEW = 150, 20
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(params=["llama-frequency", "llama-pure", "llama-partial", "neox-partial-first"])
def model(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1))


@pytest.fixture(scope="module")
def default() -> Any:
    return load("llama")


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """(With a mask, since a model that makes a token of the padding's number would have it masked in the next call.)"""
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **GREEDY, **options})


def uncached(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """What generate() gives when every step runs the whole sequence."""
    found = generate(model, ids, use_cache=False, **options)
    assert len(found[0, ids.shape[1] :].unique()) >= 3  # not one token for ever
    return found


# -------------------------------------------------------------------------------------------- the cache between calls


def test_chat(model: Any) -> None:
    """Turn after turn with the cache of the turn before, which generate() fills and gives back."""
    ids, cache = tokens(1, PROMPT), None
    for turn in range(4):
        expected = uncached(model, ids)
        out = generate(model, ids, past_key_values=cache, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        cache = out.past_key_values
        assert cache.get_seq_length() == ids.shape[1] + NEW - 1  # the last token was not fed yet
        ids = torch.cat([out.sequences, tokens(1, (1, 30, 70, 0)[turn], seed=turn + 1)], 1)
    assert any(isinstance(layer, DiJiangCacheLayer) for layer in cache.layers)


def test_prompt_caching(model: Any) -> None:
    """A long prompt is read once, and copies of its cache go on in several ways, one of them as a batch."""
    prompt = tokens(1, PROMPT)
    _, cache = feed(model, prompt, [PROMPT])
    for seed in (1, 2):
        ids = torch.cat([prompt, tokens(1, 25, seed)], 1)
        found = generate(model, ids, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, uncached(model, ids))
    several = copy.deepcopy(cache)
    several.batch_repeat_interleave(3)
    ids = torch.cat([prompt.expand(3, -1), tokens(3, 25, seed=4)], 1)
    assert torch.equal(generate(model, ids, past_key_values=several), uncached(model, ids))
    assert cache.get_seq_length() == PROMPT


def test_cache_filled_by_hand(model: Any) -> None:
    """A cache of the caller's own is filled in place."""
    ids, cache = tokens(2, PROMPT), DynamicCache(config=model.config)
    found = generate(model, ids, past_key_values=cache)
    assert torch.equal(found, uncached(model, ids))
    tail = tokens(2, 30, seed=1)
    after, _ = feed(model, torch.cat([found[:, -1:], tail], 1), [1], cache)
    assert difference(after, logits_of(model, torch.cat([found, tail], 1))[:, -31:]) <= TOLERANCE


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("padded", [0, 60])
def test_prompt_in_pieces(model: Any, padded: int, implementation: str | None) -> None:
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :padded] = ids[0, :padded] = 0
    found = generate(model, ids, attention_mask=mask, prefill_chunk_size=40, cache_implementation=implementation)
    assert torch.equal(found, uncached(model, ids, attention_mask=mask))


@pytest.mark.parametrize("padded", [0, 60])
def test_embeddings_as_prompt(model: Any, padded: int) -> None:
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :padded] = ids[0, :padded] = 0
    found = model.generate(inputs_embeds=_embedded(model, ids), attention_mask=mask, **GREEDY)
    assert torch.equal(found, uncached(model, ids, attention_mask=mask)[:, PROMPT:])


def test_embeddings_turn_after_turn(model: Any) -> None:
    """The whole text so far as embeddings, with the cache of the call before."""
    ids, tail = tokens(2, PROMPT), tokens(2, 30, seed=2)
    first = model.generate(inputs_embeds=_embedded(model, ids), return_dict_in_generate=True, **GREEDY)
    ids = torch.cat([ids, first.sequences, tail], 1)
    found = model.generate(inputs_embeds=_embedded(model, ids), past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(found, uncached(model, ids)[:, ids.shape[1] :])


def _embedded(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


# --------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"guidance_scale": 1.5},
    ],
    ids=["beams", "beam sampling", "short beams", "sampling", "penalties", "guidance"],
)
def test_strategies(model: Any, options: dict[str, Any]) -> None:
    ids, found = tokens(2, PROMPT), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(model, ids, use_cache=use_cache, **options))
    assert torch.equal(*found)
    assert found[0].shape == (2 * options.get("num_return_sequences", 1), PROMPT + NEW)


def test_sampling_is_seeded(model: Any) -> None:
    ids, found = tokens(1, PROMPT), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(generate(model, ids, do_sample=True, temperature=1.5))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_rows_that_end_early(model: Any) -> None:
    """A row that has ended is filled up while others go on."""
    ids = tokens(3, PROMPT)
    free = uncached(model, ids)
    end = int(free[1, PROMPT + 5])
    options: dict[str, Any] = {"min_new_tokens": 0, "eos_token_id": end, "pad_token_id": 0}
    found = generate(model, ids, **options)
    assert torch.equal(found, generate(model, ids, use_cache=False, **options))
    assert (found[1, PROMPT + 6 :] == 0).all()


@pytest.mark.parametrize("guesses", ["itself", "early exit", "its softmax model", "prompt lookup"])
@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_decoding(model: Any, guesses: str, sampled: bool) -> None:
    """Guesses right and wrong are taken back exactly: the sequence is the unassisted one, and the cache goes on."""
    if guesses == "early exit" and "NeoX" in type(model).__name__:
        pytest.skip("not in transformers: the softmax model has no early exit either")
    ids = tokens(1, 50).repeat(1, 3)
    family = "llama" if "Llama" in type(model).__name__ else "neox"
    options: dict[str, Any] = {
        "itself": {"assistant_model": copy.deepcopy(model)},
        "early exit": {"assistant_early_exit": 1},
        "its softmax model": {"assistant_model": AutoModelForCausalLM.from_pretrained(source(family))},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[guesses]
    if sampled:  # the most likely token nearly always, so that the draw does not matter
        options |= {"do_sample": True, "temperature": 1e-4}
    out = generate(model, ids, return_dict_in_generate=True, **options)
    expected = uncached(model, ids)
    assert torch.equal(out.sequences, expected)
    cache, tail = out.past_key_values, tokens(1, 30, seed=1)
    fed = cache.get_seq_length()
    assert fed < expected.shape[1]
    after, _ = feed(model, torch.cat([expected[:, fed:], tail], 1), [1], cache)
    assert difference(after, logits_of(model, torch.cat([expected, tail], 1))[:, fed:]) <= TOLERANCE


def test_chat_after_assistance(model: Any) -> None:
    """A cache that went through assisted decoding serves the next turns; it can't be assisted itself, since
    transformers would feed it the whole prompt once more."""
    assistant, ids, cache = load("llama", "pure"), tokens(1, PROMPT), None
    for turn in range(3):
        helper = {"assistant_model": assistant} if turn == 0 else {}
        out = generate(model, ids, past_key_values=cache, return_dict_in_generate=True, **helper)
        assert torch.equal(out.sequences, uncached(model, ids))
        cache, ids = out.past_key_values, torch.cat([out.sequences, tokens(1, 20, seed=turn + 1)], 1)
    for helper in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="starts from an empty cache"):
            generate(model, ids, past_key_values=cache, **helper)


# ------------------------------------------------------------------------------------------------ what comes out of it


def test_outputs(model: Any) -> None:
    """Scores, logits and hidden states of every step are those of the whole sequence."""
    ids = tokens(2, PROMPT)
    wanted = ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states")
    out = generate(model, ids, **dict.fromkeys(wanted, True))
    with torch.no_grad():
        whole = model(out.sequences[:, :-1], use_cache=False, output_hidden_states=True)
    assert difference(torch.stack(out.logits, 1), whole.logits[:, PROMPT - 1 :]) <= TOLERANCE
    assert len(out.scores) == len(out.hidden_states) == NEW
    for layer, expected in enumerate(whole.hidden_states):
        found = torch.cat([step[layer] for step in out.hidden_states], 1)
        assert difference(found, expected) <= TOLERANCE
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    transitions = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert transitions.shape == (2, NEW) and (transitions <= 0).all()


class Collect(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_streamers(model: Any) -> None:
    ids, streamer = tokens(1, PROMPT), Collect()
    found = generate(model, ids, streamer=streamer)
    assert torch.equal(torch.cat(streamer.parts), found[0]) and streamer.ended
    assert len(streamer.parts) == 1 + NEW


def test_streamed_text(default: Any) -> None:
    """In a thread, as servers do it."""
    tokenizer = load_tokenizer(checkpoint("llama"))
    inputs = tokenizer("far and near " * 10, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = threading.Thread(target=default.generate, kwargs={**inputs, "streamer": streamer, **GREEDY})
    thread.start()
    text = "".join(streamer)
    thread.join()
    made = default.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(made) != ""


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


def test_stopping_criteria(model: Any) -> None:
    """The cache of a run that was stopped goes on where it stopped."""
    ids, criteria = tokens(2, PROMPT), StoppingCriteriaList([StopAt(PROMPT + 7)])
    out = generate(model, ids, stopping_criteria=criteria, return_dict_in_generate=True)
    expected = uncached(model, ids)
    assert torch.equal(out.sequences, expected[:, : PROMPT + 7])
    rest: dict[str, Any] = {"max_new_tokens": NEW - 7, "min_new_tokens": NEW - 7}
    assert torch.equal(generate(model, out.sequences, past_key_values=out.past_key_values, **rest), expected)


def test_stop_strings(default: Any) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    inputs = tokenizer("far and near " * 10, return_tensors="pt")
    free = default.generate(**inputs, **GREEDY)
    stop = tokenizer.decode(free[0, inputs["input_ids"].shape[1] + 8])
    found = default.generate(**inputs, stop_strings=[stop], tokenizer=tokenizer, **{**GREEDY, "min_new_tokens": 0})
    assert inputs["input_ids"].shape[1] < found.shape[1] < free.shape[1]
    assert torch.equal(found, free[:, : found.shape[1]]) and tokenizer.decode(found[0]).endswith(stop)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_refusals(model: Any) -> None:
    ids = tokens(1, 40)
    config = GenerationConfig(output_attentions=True, return_dict_in_generate=True, **GREEDY)
    asked: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True, **GREEDY}
    for options in (asked, {"generation_config": config}):
        with pytest.raises(ValueError, match="no attention matrix") as error:
            model.generate(ids, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="paged"):
        model.generate_batch(inputs=[ids[0].tolist()], generation_config=GenerationConfig(**GREEDY))
    with pytest.raises((NotImplementedError, ValueError), match="assisted"):  # by the cache, before 5.24 by generate()
        generate(model, ids, assistant_model=load("llama", "pure"), cache_implementation="static")
    assert torch.equal(generate(model, ids), uncached(model, ids))  # nothing is left behind
