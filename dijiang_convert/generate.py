"""`dijiang generate`: text from a model, as it comes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .checkpoint.loading import generates, load_any, load_tokenizer, silence
from .errors import DijiangError


@dataclass(frozen=True)
class GenerateResult:
    """``text`` is what was generated, without the prompt, and ``tokens`` how many; the speed includes the prompt."""

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = None,
    write: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Continues ``prompt`` with a checkpoint, converted or not.

    Args:
        temperature: 0 takes the likeliest token every time, more samples.
        seed: makes sampling repeatable.
        write: called with each piece of text as soon as it is there.

    Raises:
        DijiangError: no such checkpoint, or a prompt without a token.
    """
    silence()
    model = load_any(str(checkpoint))
    if not generates(model):
        raise DijiangError(f"{checkpoint} predicts no next token: it can't continue a text")
    return complete(
        model, load_tokenizer(checkpoint), prompt,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, write=write,
    )  # fmt: skip


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    write: Callable[[str], None] | None = None,
) -> GenerateResult:
    """`generate` with a model that is loaded already."""
    if temperature < 0 or max_new_tokens < 1:
        raise DijiangError("--temperature must be at least 0 and --max-new-tokens at least 1")
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise DijiangError("the prompt has no token: give it some text")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    start = time.perf_counter()
    output = model.eval().generate(  # type: ignore[operator]
        **inputs, **sampling, max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=_Streamer(tokenizer, write) if write else None,
    )[0, inputs["input_ids"].shape[1] :]  # fmt: skip
    seconds = time.perf_counter() - start
    text = tokenizer.decode(output, skip_special_tokens=True)
    return GenerateResult(prompt, str(text), len(output), len(output) / seconds)
