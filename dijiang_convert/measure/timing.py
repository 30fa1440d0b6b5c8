"""How long a pass takes, and what it holds in memory: what `dijiang bench` and the scripts in benchmarks/ measure with.

Softmax models run as transformers runs them: SDPA, and the cache that `generate()` makes.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..checkpoint.loading import generates
from ..modeling.modeling_dijiang import cache_argument

T = TypeVar("T")


class Pass(NamedTuple):
    """Seconds of a prompt's pass, until its next token is known, and of each token decoded after that; the bytes of the
    cache in the end. Encoders have no next token."""

    prefill: float
    first_token: float | None = None
    decode: float | None = None
    cache_bytes: int = 0


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    start = now(device)
    call()
    return now(device) - start


def random_ids(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    return torch.randint(model.config.get_text_config().vocab_size, (batch_size, length), device=model.device)


@torch.inference_mode()
def time_forward(model: PreTrainedModel, ids: Tensor, decode_tokens: int) -> Pass:
    """A prompt [B, N] and some tokens more, greedily, by calling the model; the mean of its steps."""
    if not generates(model):
        return Pass(seconds(model.device, lambda: model(input_ids=ids)))
    cache = DynamicCache(config=model.config.get_text_config())
    start = now(model.device)
    logits = model(input_ids=ids, logits_to_keep=1, **with_cache(model, cache)).logits
    prefill = now(model.device) - start
    token = logits[:, -1:].argmax(-1)
    first_token = now(model.device) - start
    steps = time_decoding(model, cache, token, decode_tokens)
    return Pass(prefill, first_token, statistics.fmean(steps) if steps else None, cache_bytes(cache))


@torch.inference_mode()
def time_decoding(model: PreTrainedModel, cache: DynamicCache, token: Tensor, tokens: int) -> list[float]:
    """Seconds of each token after ``token`` [B, 1], which comes after what the cache holds. The device is waited for
    after each, as `generate()` does to see whether it is the last."""
    steps, start = [], now(model.device)
    for _ in range(tokens):
        token = model(input_ids=token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        end = now(model.device)
        steps.append(end - start)
        start = end
    return steps


def time_generate(model: PreTrainedModel, ids: Tensor, decode_tokens: int, **options: Any) -> Pass:
    """The same through `generate()`, as a user calls it, with all that it does beside calling the model; the mean of
    its steps, so that what it prepares for the first of them counts. options: more of its arguments."""
    if not generates(model):
        return time_forward(model, ids, decode_tokens)
    clock, start = _Clock(), now(model.device)
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, return_dict_in_generate=True,
        max_new_tokens=decode_tokens + 1, min_new_tokens=decode_tokens + 1,
        stopping_criteria=StoppingCriteriaList([clock]), **options,
    )  # fmt: skip
    first, last = clock.times[0], clock.times[-1]
    decode = (last - first) / decode_tokens if decode_tokens else None
    return Pass(first - start, first - start, decode, cache_bytes(out.past_key_values))


class _Clock(StoppingCriteria):
    """Stops nothing. generate() asks it after each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.times.append(now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def with_cache(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """The arguments that hand a model its cache."""
    return {str(cache_argument(model.forward)): cache, "use_cache": True}


def cache_bytes(cache: Any) -> int:
    """What a cache of any kind holds in tensors."""
    return sum(t.nbytes for layer in cache.layers for value in vars(layer).values() for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that a layer's attribute is or has, also in tuples of tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def peak_memory(device: torch.device, call: Callable[[], T]) -> tuple[T, int]:
    """(what ``call`` returns, the bytes that its tensors take at most at a time beside those that were there before).

    By torch's own allocator. On a CPU its profiler tells them, which slows the call: time another one.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return result, torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds of the profiler write each start to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return result, peak
