"""Measures how long a pass takes and how much memory it holds, for `dijiang bench` and the scripts in benchmarks/.

Softmax models run as transformers runs them, with SDPA and the cache that `generate()` makes. Repeating and comparing
passes is left to the callers.
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
    """One timed pass, in seconds. Encoders have a prefill alone.

    prefill: the forward pass over the prompt. first_token: from the start until the next token is known.
    decode: the mean of each token decoded after that. cache_bytes: the cache in the end.
    """

    prefill: float
    first_token: float | None = None
    decode: float | None = None
    cache_bytes: int = 0


def now(device: torch.device) -> float:
    """The time of a clock in seconds, read once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds that ``call`` and its work on the device take."""
    start = now(device)
    call()
    return now(device) - start


def random_ids(model: PreTrainedModel, batch_size: int, length: int) -> Tensor:
    return torch.randint(model.config.get_text_config().vocab_size, (batch_size, length), device=model.device)


@torch.inference_mode()
def time_forward(model: PreTrainedModel, ids: Tensor, decode_tokens: int) -> Pass:
    """Times a prompt and ``decode_tokens`` greedy steps after its first token, by calling the model.

    ids: [B, N], token ids of the prompt.
    """
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
    """Seconds of each of ``tokens`` greedy steps.

    The clock waits for the device after each step, as `generate()` does to see whether the text is complete.

    cache: holds all tokens before ``token``.
    token: [B, 1], the token that the first step reads.
    """
    steps, start = [], now(model.device)
    for _ in range(tokens):
        token = model(input_ids=token, **with_cache(model, cache)).logits[:, -1:].argmax(-1)
        end = now(model.device)
        steps.append(end - start)
        start = end
    return steps


def time_generate(model: PreTrainedModel, ids: Tensor, decode_tokens: int, **options: Any) -> Pass:
    """`time_forward` through `generate()`, with all that `generate()` does beside calling the model.

    The mean over steps includes what it prepares for the first step. prefill and first_token are the same time.
    options: more arguments of `generate()`.
    """
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
    """Takes the time after each token, when `generate()` asks whether to stop, and never stops."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.times.append(now(input_ids.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def with_cache(model: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """The keyword arguments that give a model its cache."""
    return {str(cache_argument(model.forward)): cache, "use_cache": True}


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a cache of any kind."""
    return sum(t.nbytes for layer in cache.layers for value in vars(layer).values() for t in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an attribute of a cache's layer: the attribute itself, or those in its nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def peak_memory(device: torch.device, call: Callable[[], T]) -> tuple[T, int]:
    """What ``call`` returns, and the most bytes that its tensors take at a time, without those that were there before.

    torch's allocator counts them on a GPU, and torch's profiler on a CPU. The profiler slows ``call``, so a call that
    is timed must be another one.
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
