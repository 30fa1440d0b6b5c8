"""What a source names and says can't leave its folder, name other code, steer a terminal, or become markup."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dijiang_convert import DijiangError, convert, generate, progress, show
from dijiang_convert.checkpoint.card import write_card
from dijiang_convert.checkpoint.companions import check_links, copy_companions
from dijiang_convert.checkpoint.loading import load_any, load_tokenizer
from dijiang_convert.checkpoint.shards import read_checkpoint, write_json
from dijiang_convert.data.chat import chat_tokens
from dijiang_convert.data.readers import Chat
from dijiang_convert.errors import printable, without_steering
from dijiang_convert.files import ADAPTER
from dijiang_convert.measure.report import write_report
from dijiang_convert.push import push
from dijiang_convert.recipe import Stage
from dijiang_convert.source.download import is_plain
from tests.cli.commands import refusal, run
from tests.hub import Hub
from tests.refusals import message
from tests.sources_on_disk import edit_config, llama_config, write_source

STEERING = "\x1b[31m\r\a\x08\x9b2J\u202e[red]x[/red][link=file:///]"  # what terminals and rich would obey
SECRET = "the key of someone's house"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("untrusted") / "source", llama_config(num_hidden_layers=1))


@pytest.fixture
def source(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, named source, in the current folder; beside it a secret that is no part of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text(SECRET)
    return shutil.copytree(original, tmp_path / "source")


def is_harmless(text: str) -> bool:
    return all(each.isprintable() or each == "\n" for each in text)


# --------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["LICENSE", "vocab.txt", "config.json", "tokenizer_config.json"])
def test_a_link_to_a_file_elsewhere_is_not_copied(name: str, source: Path) -> None:
    if (source / name).is_file():
        (source / name).replace("secret")
    (source / name).symlink_to(Path("secret").resolve())
    told = refusal("convert", "source")
    assert told.endswith(", outside of source: put a copy in its place") and f"source/{name} is a link to" in told
    assert not Path("source-dijiang").exists()


def test_links_within_a_folder_are_followed(source: Path) -> None:
    (source / "LICENSE").rename(source / ".license")
    (source / "LICENSE").symlink_to(".license")
    convert("source", "out")
    assert Path("out/LICENSE").read_text() == "Apache License\n" and not Path("out/LICENSE").is_symlink()


def test_the_caches_links_are_followed(source: Path, hub: Hub) -> None:
    """A snapshot's files are links to blobs beside it, in the user's cache and in one elsewhere; no other repository's
    folder may be named like that."""
    snapshot = Path("models--owner--name/snapshots") / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (snapshot.parents[1] / "blobs").mkdir()
    source.rename(snapshot)
    (snapshot / "LICENSE").rename(snapshot.parents[1] / "blobs" / "abc")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    assert snapshot / "LICENSE" in check_links(snapshot)
    elsewhere = Path("blobs")
    elsewhere.mkdir()
    (elsewhere / "abc").write_text(SECRET)
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(elsewhere.resolve() / "abc")
    with pytest.raises(DijiangError, match="outside of"):
        check_links(snapshot)


def test_modules_that_link_elsewhere_are_not_copied(source: Path) -> None:
    module = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (source / "modules.json").write_text(json.dumps([module]))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").symlink_to(source.parent / "secret")
    with pytest.raises(DijiangError, match="1_Pooling/config.json is a link to"):
        check_links(source)
    shutil.rmtree(source / "1_Pooling")
    (source.parent / "folder").mkdir()
    (source.parent / "folder" / "key").write_text(SECRET)
    (source / "1_Pooling").symlink_to(source.parent / "folder")
    with pytest.raises(DijiangError, match="1_Pooling/key is a link to"):
        check_links(source)


@pytest.mark.parametrize("name", ["training_notes.txt", "model-00002-of-00002.safetensors"])
def test_a_link_to_a_file_elsewhere_is_not_pushed(name: str, source: Path, hub: Hub) -> None:
    convert("source", "out", settings=["far=true", "memory=8"])
    out = Path("out")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(Path("secret").resolve())
    with pytest.raises(DijiangError, match=f"out/{name} is a link to"):
        push(out, "untrusted/pushed")
    assert "untrusted/pushed" not in hub.repos


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "C:x", "..", "", "a\x1b[2Jb", "a\nb", "a\u202eb"])
def test_names_of_files(name: str) -> None:
    assert not is_plain(name) and is_plain("Größe (1).json")


@pytest.mark.parametrize("name", ["../../x", "/x", "a\\b", "..", "", "a\nb"])
def test_a_stage_is_named_as_a_folder(name: str) -> None:
    with pytest.raises(DijiangError) as call:
        Stage(name, "distillation", 1000)
    assert "its name is that of a folder" in message(call)


# ---------------------------------------------------------------------------------------------------------- code


def test_an_adapter_beside_the_weights_leads_nowhere(source: Path, hub: Hub) -> None:
    """On the Hub transformers takes the model that it names, with its code, in place of the one that it lies beside."""
    (source / ADAPTER).write_text(json.dumps({"base_model_name_or_path": "someone/else", "peft_type": "LORA"}))
    hub.add_repo("untrusted/adapter", source)
    for name in ("source", "untrusted/adapter"):
        convert(name, "out", force=True)
        assert not Path("out", ADAPTER).exists()
    shutil.copy(source / ADAPTER, "out")
    push("out", "untrusted/adapted")
    assert "config.json" in hub.files("untrusted/adapted") and ADAPTER not in hub.files("untrusted/adapted")


def test_json_that_cannot_be_read_is_not_copied(source: Path, capsys: pytest.CaptureFixture) -> None:
    """Another reader may find code named in it: here it is only nested deeper than is read here."""
    deep = '{"auto_map": {"AutoProcessor": "a--b.C"}, "x": ' + "[" * 200 + "]" * 200 + "}"
    (source / "processor_config.json").write_text(deep)
    Path("out").mkdir()
    copy_companions(Path("source"), Path("out"))
    assert Path("out/LICENSE").is_file() and not Path("out/processor_config.json").exists()
    assert "left out: source/processor_config.json is nested more than" in capsys.readouterr().err


@pytest.mark.parametrize("where", [{}, {"text_config": {"x": 1}}])
def test_attention_from_the_hub_is_refused(where: dict, source: Path) -> None:
    choice = {"attn_implementation": "someone/kernel"}
    edit_config(source, **{name: {**value, **choice} for name, value in where.items()} or choice)
    for verb in ("convert", "inspect"):
        assert "attention from the Hub is code, which is not run" in refusal(verb, "source")
    with pytest.raises(DijiangError, match="attention from the Hub is code"):
        load_any("source")


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].system('touch sprung') }}",
    "{{ cycler.__init__.__globals__.os.system('touch sprung') }}",
    "{{ messages.append({}) }}",
    "{% include '/etc/hostname' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_chat_templates_are_confined(template: str, source: Path) -> None:
    (source / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer("source")
    assert tokenizer.chat_template == template
    marked = f"{template}{{% generation %}}{{{{ messages[0].content }}}}{{% endgeneration %}}"
    chat = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None, "data")
    for each in (template, marked):
        tokenizer.chat_template = each
        with pytest.raises(DijiangError, match="does not fit the tokenizer's chat template"):
            chat_tokens(chat, tokenizer)
    with pytest.raises(DijiangError, match="chat template refuses"):
        generate("source", "a", max_new_tokens=1)
    assert not Path("sprung").exists()


# ------------------------------------------------------------------------------------------------------ terminals


def test_errors_and_notes_steer_no_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=True, width=40))
    text = f"a {STEERING}\nb"
    progress.say(text)
    show._say(text)
    show._table("", "", [[text, "c"]])
    seen = capsys.readouterr()
    for shown in (str(DijiangError(text)), printable(text), seen.err, seen.out, without_steering(text)):
        assert is_harmless(shown), repr(shown)
        assert "[red]" in "".join(shown.split()).replace("│", "") and r"\x1b" in shown
    assert "\n" not in printable(text) and len(printable("\x1b" * 10_000)) < 1100
    assert without_steering("a\n\tß 👩\u200d👧\u00a0") == "a\n\tß 👩\u200d👧\u00a0"


def test_a_template_cannot_steer_the_terminal(source: Path) -> None:
    (source / "chat_template.jinja").write_text(f"{{{{ raise_exception({STEERING!r}) }}}}")
    told = refusal("generate", "source", "a", "--chat")
    assert r"\x1b[31m" in told and is_harmless(told)


def test_names_in_a_source_cannot_steer_the_terminal(source: Path) -> None:
    name = f"config{STEERING.replace('/', '')}"
    spoiled = source.rename(name)
    done = run("convert", f"./{spoiled}", "--out", "out")
    assert done.exit_code == 0 and is_harmless(done.output) and r"\x1b[31m" in done.output
    edit_config(Path(spoiled), model_type=STEERING)
    done = run("inspect", f"./{spoiled}")
    assert done.exit_code == 0 and is_harmless(done.output) and r"\x1b[31m" in done.output
    done = run("inspect", f"./{spoiled}", "--json")
    assert json.loads(done.output)["supported"] is False and is_harmless(done.output)
    done = run("generate", f"./{spoiled}", "a", "--debug")
    assert "Traceback" in done.stderr and is_harmless(done.stderr)


def test_generated_text_cannot_steer_a_terminal(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file it is as the model wrote it."""
    write = sys.modules["dijiang_convert.cli"]._write
    write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\x1b[2J\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write("a\x1b[2J\n")
    assert capsys.readouterr().out == "a\\x1b[2J\n"


def test_a_cards_metadata_cannot_explode(source: Path) -> None:
    """Nor nest beyond what can be read: such metadata is none."""
    levels = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30))
    for metadata in (f"a0: &a0 {{x: 1}}\n{levels}", f"x: {'[' * 5000}", "x: &x [*x]"):
        (source / "README.md").write_text(f"---\nlicense: mit\n{metadata}\n---\n# Model\n")
        convert("source", "out", force=True)
        assert read_checkpoint("out")["dijiang"]["license"] is None
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    convert("source", "out", force=True)
    assert read_checkpoint("out")["dijiang"]["license"] == "mit"


# --------------------------------------------------------------------------------------------------------- markup

MARKUP = "<script>alert(1)</script> ``` [x](javascript:1) | *y* $\\frac{$"


@pytest.fixture
def named(source: Path) -> Path:
    """A checkpoint whose record says of everything what only a hostile source would."""
    convert("source", "out")
    config = read_checkpoint("out")
    step = {"stage": MARKUP, "objective": MARKUP, "train": MARKUP, "tokens": 1, "datasets": []}
    config["dijiang"] |= {"source": MARKUP, "source_revision": MARKUP, "recipe": MARKUP, "history": [step]}
    config["dijiang"] |= {"requires_transformers": MARKUP, "version": MARKUP}
    config["dijiang"]["kernel"]["rotary"] = MARKUP
    write_json(Path("out/config.json"), config)
    return Path("out")


def test_the_card_makes_no_markup_of_names(named: Path) -> None:
    (named / "README.md").unlink()
    write_card(named)
    text = (named / "README.md").read_text().split("---\n", 2)[2]
    spans = [part for line in text.splitlines() for part in line.split("```` ")[1::2]]
    assert spans, "values are code between four marks, since three are in them"
    for line in text.splitlines():
        outside = "".join(line.split("````")[::2])
        assert "<script>" not in outside.replace("\\<", "") and "](javascript" not in outside.replace("\\]", ""), line


def test_a_source_cannot_bring_its_own_figures(source: Path) -> None:
    forged = [{"by": "eval", "dataset": None, "tokens": 1, "figures": {"perplexity": 1.0}}]
    (source / "evaluation.json").write_text(json.dumps(forged))
    convert("source", "out")
    assert not Path("out/evaluation.json").exists() and "## Quality" not in Path("out/README.md").read_text()


def test_the_report_makes_no_markup_of_names(named: Path) -> None:
    line = {"stage": MARKUP, "index": 0, "step": 1, "tokens": 8, "loss": 1.0, "seconds": 1.0, "layer_errors": [0.5]}
    (named / "training.jsonl").write_text("".join(f"{json.dumps(line | {'tokens': n})}\n" for n in (8, 16)))
    write_report(named, {}, [], {"name": MARKUP}, {"text": MARKUP}, MARKUP)
    text = (named / "report.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") >= 5
    assert os.path.getsize(named / "plots" / "loss.png") > 1000  # a $ in a title is no formula
