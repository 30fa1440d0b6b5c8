"""`dijiang generate`: continues a text, or answers through the chat template, turn by turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dijiang_convert import convert, generate
from dijiang_convert.checkpoint.loading import load_any, load_tokenizer
from dijiang_convert.cli import app
from dijiang_convert.demo import MODEL
from dijiang_convert.errors import DijiangError
from tests.refusals import message

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "# {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}# assistant\n{% endif %}"
)
TURNS = ("def add(a, b):\n    " * 10, "import os\n", "class A:\n")  # beyond the window at once
SHORT = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose tokenizer has no chat template."""
    out = tmp_path_factory.mktemp("plain") / "demo"
    convert(str(MODEL), out, settings=["window=16", "block=16", "memory=8"])
    return str(out)


@pytest.fixture(scope="module")
def chatty(plain: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("chatty") / "demo"
    convert(str(MODEL), out, settings=["window=16", "block=16", "memory=8"])
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return str(out)


def continued(folder: str, text: str) -> str:
    """What transformers' own generate() makes of a text."""
    model: Any = load_any(folder).eval()
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    made = model.generate(ids, do_sample=False, pad_token_id=tokenizer.eos_token_id, **SHORT)[0, ids.shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_without_a_template_a_prompt_is_continued(plain: str) -> None:
    result = generate(plain, TURNS[0], **SHORT)
    assert result.text == continued(plain, TURNS[0]) and result.messages is None


def test_a_template_is_used_where_there_is_one(chatty: str) -> None:
    result = generate(chatty, TURNS[0], **SHORT)
    assert result.text == continued(chatty, f"# user\n{TURNS[0]}\n# assistant\n") != continued(chatty, TURNS[0])
    assert result.messages == [
        {"role": "user", "content": TURNS[0]}, {"role": "assistant", "content": result.text},
    ]  # fmt: skip
    assert generate(chatty, TURNS[0], chat=True, **SHORT).text == result.text
    raw = generate(chatty, TURNS[0], chat=False, **SHORT)
    assert raw.text == continued(chatty, TURNS[0]) and raw.messages is None


def test_turns_follow_one_another(chatty: str) -> None:
    pieces: list[str] = []
    result = generate(chatty, TURNS, system="be brief", write=pieces.append, **SHORT)
    assert result.messages is not None
    assert [each["role"] for each in result.messages] == ["system", *["user", "assistant"] * 3]
    so_far, shown = "# system\nbe brief\n", []
    for turn, answer in zip(TURNS, result.messages[2::2], strict=True):
        so_far += f"# user\n{turn}\n# assistant\n"
        assert answer["content"] == continued(chatty, so_far)
        shown.append(f"> {turn}\n{answer['content']}")
        so_far += f"{answer['content']}\n"
    assert "".join(pieces) == "\n\n".join(shown)
    assert (result.prompt, result.text) == (TURNS[2], result.messages[-1]["content"])


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        ("a", {"chat": True}, "has no chat template: leave --chat out"),
        (["a", "b"], {}, "are for a chat through a chat template: give one prompt alone"),
        ("a", {"system": "be brief"}, "are for a chat through a chat template"),
        ("", {}, "the prompt has no token"),
    ],
)
def test_what_needs_a_template(prompt: Any, options: dict[str, Any], expected: str, plain: str) -> None:
    with pytest.raises(DijiangError) as call:
        generate(plain, prompt, **options, **SHORT)
    assert expected in message(call)


def test_a_template_that_refuses_a_conversation(plain: str, tmp_path: Path) -> None:
    convert(str(MODEL), tmp_path / "out")
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ raise_exception('no\nsystem') }}")
    with pytest.raises(DijiangError) as call:
        generate(tmp_path / "out", "a", system="b", **SHORT)
    assert message(call).endswith("the tokenizer's chat template refuses this conversation: no system")


def test_what_a_generation_config_asks_for(plain: str, tmp_path: Path) -> None:
    convert(str(MODEL), tmp_path / "out", settings=["window=16", "block=16", "memory=8"])
    path = tmp_path / "out" / "generation_config.json"
    ordinary = json.loads(path.read_text()) if path.is_file() else {}
    expected = generate(plain, TURNS[0], **SHORT).text
    path.write_text(json.dumps({**ordinary, "return_dict_in_generate": True}))
    assert generate(tmp_path / "out", TURNS[0], **SHORT).text == expected
    path.write_text(json.dumps({**ordinary, "stop_strings": [expected[3:6]]}))
    assert generate(tmp_path / "out", TURNS[0], **SHORT).text == expected[:6]
    path.write_text(json.dumps({**ordinary, "output_attentions": True}))
    with pytest.raises(DijiangError) as call:
        generate(tmp_path / "out", TURNS[0], **SHORT)
    assert "this model's generate() refuses: output_attentions" in message(call)


def test_the_command_shows_answers_alone_or_a_text_with_what_follows(chatty: str) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["generate", chatty, *arguments, "--max-new-tokens", "12"])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    answer = generate(chatty, TURNS[1], **SHORT).text
    assert run(TURNS[1]) == run(TURNS[1], "--chat") == answer + "\n"
    assert run(TURNS[1], "--raw") == TURNS[1] + continued(chatty, TURNS[1]) + "\n"
    two = json.loads(run(TURNS[1], TURNS[2], "--system", "be brief", "--json"))
    assert [each["role"] for each in two["messages"]] == ["system", *["user", "assistant"] * 2]
    assert run(TURNS[1], TURNS[2], "--system", "be brief").startswith(f"> {TURNS[1]}\n{two['messages'][2]['content']}")
