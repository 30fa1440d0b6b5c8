"""What generate() does by default on a GPU: a cache that stays where it is, and a recorded decode step.

There is no GPU here. Both are taken on the CPU, with a recording that does the step again where a CUDA graph would:
all but the graph itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dijiang_convert.modeling import cuda_graph, modeling_dijiang
from dijiang_convert.modeling.cache import DecodingCache, StaticDiJiangCacheLayer
from dijiang_convert.modeling.cuda_graph import WARM_UP, GraphedStep
from dijiang_convert.modeling.modeling_dijiang import DiJiangMixin
from tests.models import load, tokens

NEW = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
PROMPT = 150


class Recorder:
    """Counts recordings and replays in the place of CUDA graphs. Like them, it gives the same tensors each time."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        logits: list[Tensor] = []

        def replay() -> Any:
            self.replayed += 1
            out = step()
            logits.append(out.logits)
            if len(logits) > 1:
                out.logits = logits[0].copy_(logits.pop())
            return out

        return replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(cuda_graph, "record", found.record)
    monkeypatch.setattr(DiJiangMixin, "_records", lambda self: True)

    def allowed(self: Any, model_kwargs: dict[str, Any], config: Any) -> bool:
        return not config.disable_compile and any(isinstance(x, StaticCache) for x in model_kwargs.values())

    monkeypatch.setattr(DiJiangMixin, "_valid_auto_compile_criteria", allowed, raising=False)
    return found


@pytest.fixture(scope="module", params=["llama-default", "neox-default", "llama-pure", "llama-paper"])
def model(request: pytest.FixtureRequest) -> Any:
    return load(*request.param.split("-", 1))


@pytest.fixture(scope="module")
def default() -> Any:
    return load("llama")


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 1.5}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling", "several"],
)
@pytest.mark.parametrize("padded", [0, 60])
def test_same_tokens(model: Any, options: dict[str, Any], padded: int, recorder: Recorder) -> None:
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :padded] = ids[0, :padded] = 0
    found = []
    for implementation in ("dynamic", None):
        torch.manual_seed(0)
        given = {"attention_mask": mask, "cache_implementation": implementation, **NEW, **options}
        found.append(model.generate(ids, **given))
    assert torch.equal(*found)
    assert len(found[0][0, PROMPT:].unique()) >= 3
    if "num_beams" in options:  # which transformers never compiles
        assert recorder.recorded == 0
    else:
        assert recorder.recorded == 1 and recorder.replayed == 30 - 1 - WARM_UP


def test_what_is_asked_for_is_done(default: Any, recorder: Recorder) -> None:
    """Usual options choose other caches; nothing is recorded then."""
    ids, kept = tokens(2, PROMPT), {"return_dict_in_generate": True, "max_new_tokens": 5, "do_sample": False}
    for options, kind in (
        ({"cache_implementation": "dynamic"}, DynamicCache),
        ({"disable_compile": True}, DynamicCache),
        ({"past_key_values": DynamicCache(config=default.config)}, DynamicCache),
        ({"prompt_lookup_num_tokens": 3}, DynamicCache),
        ({"cache_implementation": "static", "disable_compile": True}, StaticCache),
    ):
        row = ids[:1] if "prompt_lookup_num_tokens" in options else ids
        cache = default.generate(row, **kept, **options).past_key_values
        assert type(cache) is kind, options
    assert recorder.recorded == 0
    assert default.generate(ids, use_cache=False, max_new_tokens=5, do_sample=False).shape == (2, PROMPT + 5)
    cache = default.generate(ids, **kept).past_key_values
    assert type(cache) is DecodingCache and recorder.recorded == 1
    assert all(isinstance(layer, StaticDiJiangCacheLayer) for layer in cache.layers)


def test_no_gpu_no_change(default: Any) -> None:
    out = default.generate(tokens(1, 20), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache


def test_softmax_layers_keep_the_growing_cache(recorder: Recorder) -> None:
    for model in (load("llama", "partial"), load("llama", attention="sdpa")):
        out = model.generate(tokens(1, 20), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        assert type(out.past_key_values) is DynamicCache and recorder.recorded == 0


def test_chat(model: Any, recorder: Recorder) -> None:
    """Later turns go on from the cache of the first, far beyond its length, and from a copy of it."""
    cache, ids = None, tokens(1, 40)
    for turn in range(3):
        given = None if cache is None else copy.deepcopy(cache) if turn == 1 else cache
        options = {**NEW, "attention_mask": torch.ones_like(ids)}
        out = model.generate(ids, past_key_values=given, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, model.generate(ids, use_cache=False, **options))
        cache = out.past_key_values
        ids = torch.cat([out.sequences, tokens(1, 80, seed=turn)], 1)
    assert type(cache) is DecodingCache and recorder.recorded == 3
    with pytest.raises(RuntimeError, match="use a dynamic one"):
        cache.crop(-1)


def test_long_prompts_in_segments(default: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch, too, whose mask generate() makes beforehand."""
    ids, mask = tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :60] = ids[0, :60] = 0
    expected = default.generate(ids, attention_mask=mask, **NEW, cache_implementation="dynamic")
    lengths = []
    monkeypatch.setattr(modeling_dijiang, "SEGMENT", 32)
    hook = default.lm_head.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    body = default.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = default.generate(ids, attention_mask=mask, **NEW)
    hook.remove()
    body.remove()
    assert torch.equal(found, expected) and max(lengths) == 32


def test_hidden_states_and_scores_are_their_own(default: Any, recorder: Recorder) -> None:
    """What the loop keeps of a step is not overwritten by the next."""
    options = {**NEW, "output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True}
    expected, found = (
        default.generate(tokens(2, PROMPT), **options, cache_implementation=each) for each in ("dynamic", None)
    )
    assert recorder.recorded == 1
    for step, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(step[-1], other[-1], rtol=0, atol=1e-4)
    for step, other in zip(expected.logits, found.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=0, atol=1e-4)


def test_a_step_that_cant_be_recorded(default: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs as it is, after one notice."""
    notices = []

    def fails(step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "record", fails)
    monkeypatch.setattr(cuda_graph, "logger", SimpleNamespace(warning_once=notices.append))
    ids = tokens(2, PROMPT)
    assert torch.equal(default.generate(ids, **NEW), default.generate(ids, **NEW, cache_implementation="dynamic"))
    assert len(notices) == 1 and "operation not permitted when stream is capturing" in notices[0]


def test_other_inputs_are_recorded_anew(recorder: Recorder) -> None:
    """Another shape, another object, or an argument more or less."""

    def model(x: Tensor, scale: Any = None, **options: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=x + (0 if scale is None else scale.value))

    step, one, two = GraphedStep(model), SimpleNamespace(value=1), SimpleNamespace(value=2)
    calls = [{"x": torch.zeros(2), "scale": each} for each in (one, two, None) for _ in range(5)]
    calls += [{"x": torch.full((3,), float(n))} for n in range(5)]
    calls += [{"x": torch.full((3,), float(n)), "use_cache": True} for n in range(5)]
    outputs = [step(**inputs).logits for inputs in calls]
    assert recorder.recorded == 5 and recorder.replayed == 5 * (5 - WARM_UP)
    for inputs, out in zip(calls, outputs, strict=True):
        assert torch.equal(out, model(**inputs).logits)


def test_notice_of_nothing(default: Any, recorder: Recorder) -> None:
    """The default says nothing of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        default.generate(tokens(1, 20), attention_mask=torch.ones(1, 20, dtype=torch.long), **NEW)
