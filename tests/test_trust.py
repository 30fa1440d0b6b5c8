"""Whose code runs, and who gets to see a token."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dijiang_convert import DijiangError, convert
from dijiang_convert.checkpoint.companions import MODELING_FILES
from dijiang_convert.checkpoint.loading import load_any, load_tokenizer
from dijiang_convert.cli import app
from dijiang_convert.source.download import cache_folder
from dijiang_convert.source.hub import redact
from tests.hub import Hub
from tests.sources_on_disk import edit_config, llama_config, write_source

TOKEN = "hf_SomeoneElsesToken1"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A source that brings code for everything that transformers would run code for; it would leave a file."""
    folder = write_source(tmp_path / "model", llama_config(num_hidden_layers=1))
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\n"
    for name in ("modeling_trap", "configuration_trap", "tokenization_trap", "generate"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    pipelines = {"trap": {"impl": "generate.Trap", "pt": ["AutoModel"], "type": "text"}}
    auto_map = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "other/repo--modeling_trap.Trap"}
    edit_config(folder, auto_map=auto_map, custom_pipelines=pipelines)
    processor = {"processor_class": "Trap", "auto_map": {"AutoProcessor": "modeling_trap.Trap"}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def test_code_of_a_source_is_never_run(trap: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hub.add_repo("trust/trap", trap)
    for source in ("trust/trap", str(trap)):
        convert(source, tmp_path / "out", force=True)
        assert "left out: code of the source's own that processor_config.json names" in capsys.readouterr().err
        load_any(source)
        load_tokenizer(source)
    assert not list(cache_folder("trust/trap").rglob("*.py"))  # not even fetched

    out = tmp_path / "out"
    assert {path.name for path in out.rglob("*.py")} == set(MODELING_FILES)
    texts = [path.read_text() for path in out.rglob("*.json")]
    assert not any("trap" in text.replace("trust/trap", "") for text in texts if "weight_map" not in text)
    config = json.loads((out / "config.json").read_text())
    assert all(name.startswith(("configuration_dijiang.", "modeling_dijiang.")) for name in config["auto_map"].values())
    assert not (tmp_path / "sprung").exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused(trap: Path, hub: Hub, tmp_path: Path) -> None:
    path = trap / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization_trap.Trap", None]}}
    path.write_text(json.dumps(content))
    hub.add_repo("trust/tokenizer", trap)
    for source in ("trust/tokenizer", str(trap)):
        with pytest.raises(DijiangError, match="names code of the model's own for its tokenizer, which is not run"):
            convert(source, tmp_path / "out")
        load_tokenizer(source)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_a_model_that_needs_its_own_code_is_refused(trap: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("trust/custom", edit_config(trap, model_type="trap"))
    with pytest.raises(DijiangError) as call:
        convert("trust/custom", tmp_path / "out")
    assert "code" in str(call.value) and "\n" not in str(call.value)
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


def test_a_pickle_with_code_is_refused(hub: Hub, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(tmp_path / "sprung"), "w")

    folder = write_source(tmp_path / "source", llama_config(num_hidden_layers=1))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}))
    hub.add_repo("trust/pickle", folder)
    with pytest.raises(DijiangError, match="can't be read as weights"):
        convert("trust/pickle", tmp_path / "out")
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- tokens


def check_told(told: str, hub: Hub) -> None:
    assert not [word for word in (hub.token, TOKEN, "secret") if word in told], told


def echo(hub: Hub) -> str:
    """What a server would say that tells everything it was sent."""
    return f"refused: Authorization: Bearer {hub.token}, {TOKEN}, https://me:secret@host/x?X-Amz-Signature=secret"


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(("path", "status"), [("/", 403), ("*/tree/*", 400), ("/files/", 403)])
def test_a_download_tells_no_token(path: str, status: int, debug: bool, hub: Hub, tmp_path: Path) -> None:
    name = f"trust/echo-{status}-{debug}-{len(path)}"
    hub.add_repo(name, write_source(tmp_path / "source", llama_config(num_hidden_layers=1)))
    with hub.failing(path, status, echo(hub)):
        arguments = ["convert", name, "--out", str(tmp_path / "out"), *(["--debug"] if debug else [])]
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and ("Traceback" in done.stderr) is debug and "refused" in done.stderr
    check_told(done.output, hub)


@pytest.mark.parametrize(("path", "status"), [("/", 403), ("*/commit/*", 400)])
def test_a_push_tells_no_token(path: str, status: int, hub: Hub, tmp_path: Path) -> None:
    """With everything on that makes the client talk, and a password in the Hub's address."""
    source = write_source(tmp_path / "source", llama_config(num_hidden_layers=1))
    convert(str(source), tmp_path / "converted")
    loud = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_ENDPOINT": hub.url.replace("://", "://me:secret@")}
    command = [sys.executable, "-m", "dijiang_convert", "push", str(tmp_path / "converted"), "trust/echo", "--debug"]
    for environment in ({}, loud):
        with hub.failing(path, status, echo(hub)):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
        assert done.returncode == 1 and "Traceback" in done.stderr
        check_told(done.stdout + done.stderr, hub)


def test_what_is_redacted() -> None:
    text = f"{TOKEN}, hf_oauth_abc Bearer abc https://me:pw@host/a?sig=1 'http://host/b?c=d' hf_hub_download is fine?"
    hidden = "***, *** Bearer *** https://***@host/a?*** 'http://host/b?***' hf_hub_download is fine?"
    assert redact(text) == hidden


def test_what_is_written_holds_no_token(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("trust/plain", write_source(tmp_path / "source", llama_config(num_hidden_layers=1)))
    arguments = ["convert", "trust/plain", "--out", str(tmp_path / "out"), "--push", "trust/written", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] + [
        *hub.files("trust/written").values()
    ]
    assert not any(hub.token.encode() in content for content in [*files, done.output.encode()])


def test_a_push_that_fails_after_a_conversion_tells_how_to_go_on(hub: Hub, tmp_path: Path, waits: list[float]) -> None:
    source = write_source(tmp_path / "source", llama_config(num_hidden_layers=1))
    out = tmp_path / "out"
    with hub.failing("*/commit/*", 500):
        done = CliRunner().invoke(
            app, ["convert", str(source), "--out", str(out), "--push", "trust/later", "--private"]
        )
    assert done.exit_code == 1
    told = f"try again later; {out} is written: dijiang push {out} trust/later --private\n"
    assert done.stderr.endswith(told), done.stderr
    assert load_any(str(out)) is not None


def test_nobody_converts_to_push_without_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", llama_config(num_hidden_layers=1))
    command = ["convert", str(source), "--out", str(tmp_path / "out"), "--push", "trust/early"]
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert "the Hub wants a valid token for trust/early" in CliRunner().invoke(app, command).stderr
    monkeypatch.delenv("HF_TOKEN")
    told = "pushing to trust/early needs a token: run `hf auth login` or set HF_TOKEN"
    assert told in CliRunner().invoke(app, command).stderr
    assert not (tmp_path / "out").exists()
