"""Turns conversations into tokens by the tokenizer's chat template, and marks the tokens of the assistant's answers."""

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import DijiangError
from .readers import Chat

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(
    chat: Chat, tokenizer: PreTrainedTokenizerBase, answers: bool = True
) -> tuple[list[int], list[int] | None]:
    """The token ids of a conversation, and a mask of the same length, 1 for tokens of the assistant's answers.

    The mask is None without ``answers``, and 0 for answers of weight 0. A template may mark answers by
    ``{% generation %}``. If it does not, an answer is what follows the prompt for it in the rendered conversation up to
    that answer. This needs a template that renders the start of a conversation as the start of the whole, which is
    checked.

    Raises:
        DijiangError: there is no template, it refuses the conversation, or the answers can't be told from the rest.
    """
    if not tokenizer.chat_template:
        raise DijiangError(f"{chat.where} holds chats, and the tokenizer has no chat template: give plain text")
    if not tokenizer.is_fast:
        raise DijiangError(f"{chat.where} holds chats, and this slow tokenizer can't tell where its tokens are from")
    try:
        text = _render(chat, tokenizer, len(chat.messages))
        if not answers:
            spans = []
        elif GENERATION.search(tokenizer.get_chat_template(tools=chat.tools)):
            spans = _marked(chat, tokenizer)
        else:
            spans = _found(chat, tokenizer, text)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DijiangError(f"a chat in {chat.where} does not fit the tokenizer's chat template: {reason}") from error
    out: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if not answers:
        return out["input_ids"], None
    mask = [0] * len(out["input_ids"])
    for start, end in spans:
        # Many tokenizers give tokens of white space an empty span: all from an answer's first token to its last counts.
        inside = [i for i, (left, right) in enumerate(out["offset_mapping"]) if start <= left < end and left < right]
        if inside:
            mask[inside[0] : inside[-1] + 1] = [1] * (inside[-1] + 1 - inside[0])
    return out["input_ids"], mask


def _marked(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """The start and end of each answer in the rendered conversation, by the template's marks.

    `apply_chat_template` can mark the tokens itself. But where the tokenizer gives spaces an empty span, it loses an
    answer that starts with a space, and all after that answer (transformers 5.23).
    """
    options: dict[str, Any] = {"tools": chat.tools, "return_assistant_tokens_mask": True}
    options |= {"chat_template": tokenizer.get_chat_template(tools=chat.tools), **tokenizer.special_tokens_map}
    messages = [{key: value for key, value in message.items() if value is not None} for message in chat.messages]
    rendered: Any = render_jinja_template(conversations=[messages], **options)
    spans = rendered[1][0]
    if all(message.get("weight") != 0 for message in chat.messages):
        return spans
    answers = [message for message in chat.messages if message["role"] == "assistant"]
    if len(answers) != len(spans):
        raise DijiangError(
            f"a chat in {chat.where} has an answer of weight 0, and the tokenizer's chat template marks {len(spans)} "
            f"of {len(answers)} answers, so it can't be told which that is: leave weights out"
        )
    return [span for message, span in zip(answers, spans, strict=True) if message.get("weight") != 0]


def _found(chat: Chat, tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """The start and end of each answer in ``text``, the rendered conversation, found by rendering its starts."""
    spans = []
    for i, message in enumerate(chat.messages):
        if message["role"] != "assistant" or i == 0 or message.get("weight") == 0:
            continue  # an opening message answers nothing
        before, through = _render(chat, tokenizer, i, prompt=True), _render(chat, tokenizer, i + 1)
        if not (text.startswith(through) and through.startswith(before)):
            raise DijiangError(
                f"can't tell the answers of the chats in {chat.where}: the tokenizer's chat template words a "
                "conversation's start differently once it goes on; mark them in it by {% generation %}"
            )
        spans.append((len(before), len(through)))
    return spans


def _render(chat: Chat, tokenizer: PreTrainedTokenizerBase, count: int, prompt: bool = False) -> str:
    """The first ``count`` messages as text, with ``prompt`` followed by what opens an answer."""
    messages = chat.messages[:count]
    return str(tokenizer.apply_chat_template(messages, tools=chat.tools, tokenize=False, add_generation_prompt=prompt))
