"""Conversations: through the tokenizer's template, with the answers alone as targets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers.processors import ByteLevel
from transformers import PreTrainedTokenizerBase

from dijiang_convert.checkpoint.loading import load_tokenizer
from dijiang_convert.data import rows as data_module
from dijiang_convert.data.chat import chat_tokens
from dijiang_convert.data.readers import Chat, Sources
from dijiang_convert.data.rows import token_rows
from dijiang_convert.demo import MODEL
from tests.data.texts import refusal, words, write_lines, write_texts

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "def add(a, b):"},
    {"role": "assistant", "content": "return a + b"},
    {"role": "user", "content": "thanks\n\n  bye"},
    {"role": "assistant", "content": "  import this  \n"},
]


@pytest.fixture
def chatty() -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template that marks answers."""
    own = load_tokenizer(str(MODEL))
    own.chat_template = MARKED
    return own


def answers(row: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    """Runs of targets, as text."""
    found: list[list[int]] = []
    before = 0
    for token, target in zip(row["input_ids"].tolist(), row["loss_mask"].tolist(), strict=True):
        if target:
            found.append([token]) if not before else found[-1].append(token)
        before = target
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_answers_are_learnt(template: str, chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = template
    name = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    whole = chatty.apply_chat_template(CHAT, tokenize=False)
    length = len(chatty(whole, add_special_tokens=False)["input_ids"])
    rows = token_rows(name, chatty, seq_len=length, tokens=length)
    assert chatty.decode(rows[0]["input_ids"]) == whole  # nothing before, after or twice
    assert rows[0]["position_ids"].tolist() == list(range(length))
    assert answers(rows[0], chatty) == ["return a + b</s>", "  import this  \n</s>"]


@pytest.mark.parametrize("spaces_have_extent", [True, False])
def test_prefixes_find_what_marks_tell(spaces_have_extent: bool, chatty: Any) -> None:
    chatty.backend_tokenizer.post_processor = ByteLevel(trim_offsets=not spaces_have_extent)
    marked = chat_tokens(Chat(CHAT, None, "x"), chatty)
    chatty.chat_template = PLAIN
    assert chat_tokens(Chat(CHAT, None, "x"), chatty) == marked
    ids, mask = marked
    assert mask is not None
    answers = chatty.decode([token for token, target in zip(ids, mask, strict=True) if target])
    assert answers.replace("  import", " import") == "return a + b</s> import this  \n</s>"


def test_chats_are_read_from_parquet_and_mixed_with_text(chatty: Any, tmp_path: Path) -> None:
    pa.parquet.write_table(pa.Table.from_pylist([{"messages": CHAT, "score": 1.0}] * 50), tmp_path / "chats.parquet")
    text = write_texts(tmp_path / "w.jsonl", words(100))
    rows = token_rows(Sources([str(tmp_path / "chats.parquet"), text]), chatty, seq_len=256, tokens=4096)
    found = {answer for i in range(len(rows)) for answer in answers(rows[i], chatty)}
    assert "return a + b</s>" in found
    assert any(re.search(r"w\d+x3 w\d+x4", answer) for answer in found)


def test_a_column_of_tools_reaches_the_template(chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + MARKED
    chat = {"messages": CHAT, "tools": [{"name": "calculator"}]}
    rows = token_rows(write_lines(tmp_path / "a.jsonl", [chat]), chatty, seq_len=64, tokens=64)
    assert any("calculator" in chatty.decode(rows[i]["input_ids"]) for i in range(len(rows)))


def test_tools_may_be_json_text_and_contents_lists_of_parts(chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + MARKED
    parts = [{**m, "content": [{"type": "text", "text": m["content"][:3]}, m["content"][3:]]} for m in CHAT]
    tools = [{"name": "calculator"}]
    plain = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT, "tools": tools}])
    other = write_lines(tmp_path / "b.jsonl", [{"messages": parts, "tools": json.dumps(tools)}])
    one, two = (token_rows(name, chatty, seq_len=64, tokens=64) for name in (plain, other))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.marks, two.marks)
    assert "calculator" in chatty.decode(two.ids.flatten())

    image = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}, CHAT[2]]
    for rows, expected in (
        ({"messages": image}, "row 1 has content that is no text"),
        ({"messages": CHAT, "tools": "{not json"}, "'tools' of row 1 is no list of tools"),
        ({"messages": CHAT, "tools": {"name": "a"}}, "'tools' of row 1 is no list of tools"),
        ({"messages": [*CHAT, {**CHAT[2], "weight": 0.5}]}, "row 1 has weight 0.5: give 0 or 1"),
    ):
        name = write_lines(tmp_path / "c.jsonl", [rows])
        assert expected in refusal(lambda name=name: token_rows(name, chatty, seq_len=8, tokens=8))  # type: ignore[misc]


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_answers_of_weight_0_are_read_and_not_learnt(template: str, chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = template
    chat = [dict(message) for message in CHAT]
    chat[2]["weight"], chat[4]["weight"] = 0, 1
    rows = token_rows(write_lines(tmp_path / "a.jsonl", [{"messages": chat}]), chatty, seq_len=64, tokens=64)
    assert "return a + b" in chatty.decode(rows.ids[0])
    learnt = [answer for i in range(len(rows)) for answer in answers(rows[i], chatty)]
    assert learnt and all("import this" in answer and "return" not in answer for answer in learnt)


def test_a_template_that_marks_some_answers_can_not_have_weights(chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = MARKED.replace("== 'assistant'", "== 'assistant' and loop.last")
    chat = [*CHAT[:4], {**CHAT[4], "weight": 0}]
    name = write_lines(tmp_path / "a.jsonl", [{"messages": chat}])
    assert "marks 1 of 2 answers" in refusal(lambda: token_rows(name, chatty, seq_len=8, tokens=8))


def test_a_template_that_rewords_the_past_is_refused(chatty: Any, tmp_path: Path) -> None:
    """As those that drop the thoughts of all answers but the last."""
    chatty.chat_template = PLAIN.replace("</s>{% endif %}", "{% if loop.last %}!{% endif %}</s>{% endif %}")
    message = refusal(
        lambda: token_rows(write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), chatty, seq_len=8, tokens=8)
    )
    assert "can't tell the answers of the chats in" in message and "a.jsonl" in message
    assert "{% generation %}" in message
    token_rows(str(tmp_path / "a.jsonl"), chatty, seq_len=8, tokens=8, shuffle_seed=None)  # evaluation needs none


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (None, CHAT, "has no chat template: give plain text"),
        ("{{ raise_exception('roles must\nalternate') }}", CHAT, "does not fit the tokenizer's chat template: roles"),
        ("{{ messages[0]['content']['x'].y }}", CHAT, "does not fit"),
        (MARKED, CHAT[:2], "has no answer of an assistant to learn from"),
        (PLAIN, [CHAT[2], CHAT[1]], "has no answer of an assistant to learn from"),
    ],
)
def test_chats_that_teach_nothing(template: Any, messages: Any, expected: str, chatty: Any, tmp_path: Path) -> None:
    chatty.chat_template = template
    name = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    message = refusal(lambda: token_rows(name, chatty, seq_len=8, tokens=8))
    assert expected in message and "a.jsonl" in message


def test_chats_without_answers_are_left_out_and_counted(
    chatty: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = {"messages": [{"role": "user", "content": "anyone?"}]}
    name = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT}, silent, silent])
    rows = token_rows(name, chatty, seq_len=16, tokens=160)
    assert "anyone" not in chatty.decode(rows.ids.flatten())
    assert "2 chats without an answer to learn from are left out" in capsys.readouterr().err


def test_rows_without_a_target_are_left_out(chatty: Any, tmp_path: Path) -> None:
    """A long question fills rows that no loss could be computed on."""
    chat = [{"role": "user", "content": "why " * 500}, CHAT[2]]
    rows = token_rows(write_lines(tmp_path / "a.jsonl", [{"messages": chat}] * 3), chatty, seq_len=32, tokens=640)
    assert len(rows) == 20
    assert all(rows[i]["loss_mask"][1:].any() for i in range(len(rows)))


def test_rows_that_never_have_a_target_end_the_run(chatty: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(data_module, "LOST_ROWS", 50)
    chatty.chat_template = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}]
    out: Any = {"input_ids": []}
    seq_len = 1
    while len(out["input_ids"]) < 2 * seq_len:  # the only target is the first token of the second row
        chat[2]["content"] += " c"
        out = chatty.apply_chat_template(chat, return_assistant_tokens_mask=True)
        seq_len = out["assistant_masks"].index(1)
    assert len(out["input_ids"]) == 2 * seq_len and sum(out["assistant_masks"]) == 1
    name = write_lines(tmp_path / "a.jsonl", [{"messages": chat}])
    message = refusal(lambda: token_rows(name, chatty, seq_len=seq_len, tokens=100))
    assert "50 rows one after another have nothing to learn from" in message
