"""Conversations as tokens, through the tokenizer's chat template, with the assistant's answers marked."""

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import DijiangError
from .corpus import Chat

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, answers: bool = True
) -> tuple[list[int], list[int] | None]:
    """Token ids of a conversation, and as many 0 or 1: 1 where the assistant speaks; None if not asked for ``answers``.

    The template tells by its ``{% generation %}`` marks. Without them an answer is what the conversation up to it has
    more than the prompt for it; that a conversation's start is templated as the start of the whole is checked.

    Raises:
        DijiangError: there is no template, it refuses the conversation, or the answers can't be told from the rest.
    """
    if not tokenizer.chat_template:
        raise DijiangError(f"{chat.where} holds chats, and the tokenizer has no chat template: give plain text")
    if not tokenizer.is_fast:
        raise DijiangError(f"{chat.where} holds chats, and this slow tokenizer can't tell where its tokens are from")
    try:
        if not answers:
            out: Any = tokenizer.apply_chat_template(
                chat.messages, tools=chat.tools, tokenizer_kwargs={"verbose": False}
            )
            return out["input_ids"], None
        if GENERATION.search(tokenizer.get_chat_template(tools=chat.tools)):
            out = tokenizer.apply_chat_template(
                chat.messages, tools=chat.tools, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
            return out["input_ids"], out["assistant_masks"]
        text, spans = _rendered(chat, tokenizer)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DijiangError(f"a chat in {chat.where} does not fit the tokenizer's chat template: {reason}") from error
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [0] * len(out["input_ids"])
    for start, end in spans:
        # Tokens of mere space may have no extent of their own: what lies between two of an answer belongs to it.
        inside = [i for i, (left, right) in enumerate(out["offset_mapping"]) if start <= left < end and left < right]
        if inside:
            mask[inside[0] : inside[-1] + 1] = [1] * (inside[-1] + 1 - inside[0])
    return out["input_ids"], mask


def _rendered(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where its answers start and end."""

    def render(count: int, prompt: bool = False) -> str:
        messages = chat.messages[:count]
        return str(
            tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, add_generation_prompt=prompt)
        )

    text, answers = render(len(chat.messages)), []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant" or i == 0:  # nothing asks for what the assistant opens with
            continue
        before, through = render(i, prompt=True), render(i + 1)
        if not (text.startswith(through) and through.startswith(before)):
            raise DijiangError(
                f"can't tell the answers of the chats in {chat.where}: the tokenizer's chat template words a "
                "conversation's start differently once it goes on; mark them in it by {% generation %}"
            )
        answers.append((len(before), len(through)))
    return text, answers
