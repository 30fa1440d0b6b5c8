"""`dijiang generate`: text from a model, as it comes; in a chat, its answers."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from .checkpoint.loading import generates, load_any, load_tokenizer, silence
from .errors import DijiangError


@dataclass(frozen=True)
class GenerateResult:
    """What was generated.

    prompt: the text that was continued, or the user's last turn. text: what follows it, without the prompt. tokens: how
    many that are, by the last turn. tokens_per_second: their speed, which includes reading the prompt. messages: the
    whole conversation of a chat, else None.
    """

    prompt: str
    text: str
    tokens: int
    tokens_per_second: float
    messages: list[dict[str, str]] | None = None


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def generate(
    checkpoint: str | Path,
    prompt: str | Sequence[str],
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int | None = None,
    write: Callable[[str], None] | None = None,
) -> GenerateResult:
    """Continues ``prompt`` with a checkpoint, converted or not, or answers it.

    Args:
        prompt: in a chat, what the user says. Several are the user's turns, each said after the answer to the one
            before.
        chat: ask through the tokenizer's chat template, or continue the prompt as it stands. None asks through the
            template where there is one.
        system: opens a chat with this message of the system.
        max_new_tokens: of each answer.
        temperature: 0 takes the likeliest token every time, more samples.
        seed: makes sampling repeatable.
        write: called with each piece of text as soon as it is there: the prompt and what continues it; in a chat the
            answers, and between them the user's turns.

    Raises:
        DijiangError: no such checkpoint, a prompt without a token, or a chat that has no template or does not fit it.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise DijiangError("--temperature must be at least 0 and --max-new-tokens at least 1")
    silence()
    model = load_any(str(checkpoint))
    if not generates(model):
        raise DijiangError(f"{checkpoint} predicts no next token: it can't continue a text")
    tokenizer = load_tokenizer(checkpoint)
    turns = [prompt] if isinstance(prompt, str) else list(prompt)
    chat = bool(tokenizer.chat_template) if chat is None else chat
    if chat and not tokenizer.chat_template:
        raise DijiangError(f"the tokenizer of {checkpoint} has no chat template: leave --chat out")
    if not chat and (len(turns) != 1 or system is not None):
        raise DijiangError("several prompts and --system are for a chat through a chat template: give one prompt alone")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if seed is not None:
        torch.manual_seed(seed)
    if not chat:
        ids: Any = tokenizer(turns[0], return_tensors="pt")["input_ids"]
        return _continue(model, tokenizer, turns[0], ids, write, turns[0], options)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        between = "\n\n" if i else ""
        opening = f"{between}> {turn}\n" if len(turns) > 1 else ""
        result = _continue(model, tokenizer, turn, _asked(tokenizer, messages), write, opening, options)
        messages.append({"role": "assistant", "content": result.text})
    return GenerateResult(turns[-1], result.text, result.tokens, result.tokens_per_second, messages)


def _asked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Any:
    """The tokens of a conversation up to where its next answer starts, [1, N]. Raises DijiangError."""
    try:
        found: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DijiangError(f"the tokenizer's chat template refuses this conversation: {reason}") from error
    return found["input_ids"]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ids: Tensor,
    write: Callable[[str], None] | None,
    opening: str,
    options: dict[str, Any],
) -> GenerateResult:
    """Generates what follows the tokens ``ids`` of a prompt, [1, N]. opening: is written before the first text, so that
    an error comes alone."""
    if ids.shape[1] == 0:
        raise DijiangError("the prompt has no token: give it some text")
    before = iter([opening])
    streamer = None if write is None else _Streamer(tokenizer, lambda text: write(next(before, "") + text))
    ids = ids.to(model.device)
    start = time.perf_counter()
    try:
        output = model.eval().generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), **options, streamer=streamer, tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            return_dict_in_generate=False,
        )[0, ids.shape[1] :]  # fmt: skip
    except (ValueError, ImportError) as error:  # what a generation_config.json asks for may not run
        reason = " ".join(str(error).split())[:200]
        raise DijiangError(
            f"this model's generate() refuses: {reason}; its generation_config.json may ask for it"
        ) from error
    seconds = time.perf_counter() - start
    text = str(tokenizer.decode(output, skip_special_tokens=True))
    return GenerateResult(prompt, text, len(output), len(output) / seconds)
