"""The command line on bad sources, options and data: one line, exit code 1, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import INDEX, error_line, refusal, run, shard, write
from tests.sources_on_disk import edit_config


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pythia-411m", "no folder, no alias and no Hub id of the form owner/name: did you mean pythia-41"),
        ("./nowhere", "no such folder: ./nowhere"),
        ("nobody/nothing", "nobody/nothing is not on the Hub, or is private"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "inspect"])
def test_no_such_source(verb: str, name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in refusal(verb, name)
    assert tree(tmp_path) == []


def test_a_misspelt_folder_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books-dijiang").mkdir()
    (tmp_path / "books-dijiang/config.json").write_text("{}")
    assert "did you mean books-dijiang?" in refusal("eval", "books-dijang")


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def edit(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes) and None


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return spoil


def become(config: Any) -> Callable[[Path], None]:
    return write("config.json", json.dumps(config))


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (remove("config.json"), "has no config.json"),
    "config no JSON": (write("config.json", "{"), "config.json is no readable JSON"),
    "config a list": (write("config.json", "[]"), "config.json holds no JSON object"),
    "no weights": (remove("*.safetensors*"), "no weights in source"),
    "no tokenizer": (remove("tokenizer*"), "no tokenizer in source"),
    "truncated": (lambda f: cut(shard(f, -1), -10)(f), "is not a whole safetensors file: download the model again"),
    "header cut": (lambda f: cut(shard(f, 0), 50)(f), "is not a whole safetensors file: download the model again"),
    "corrupt": (lambda f: write(shard(f, 0), "<html>" * 99)(f), "is not a whole safetensors file"),
    "empty": (lambda f: write(shard(f, 0), "")(f), "is not a whole safetensors file"),
    "missing shard": (lambda f: (f / shard(f, 1)).unlink(), "not in the folder: download the model again"),
    "index no JSON": (write(INDEX, "{"), f"{INDEX} is no readable JSON"),
    "index elsewhere": (write(INDEX, '{"weight_map": {"a": "../a.safetensors"}}'), "outside its folder"),
    "unsupported": (become({"model_type": "bloom"}), "bloom does not route its attention through AttentionInterface"),
    "unknown": (become({"model_type": "hyperformer"}), "knows no model type 'hyperformer'"),
    "own code": (become({"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}), "own comes with its own code"),
    "encoder-decoder": (become({"model_type": "t5", "is_encoder_decoder": True}), "t5 is an encoder-decoder"),
    "sound": (become({"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}), "takes input_values"),
    "quantised": (edit(quantization_config={"quant_method": "awq"}), "the weights are quantised (awq)"),
    "converted": (edit(dijiang={}), "the model is converted already: go on with dijiang finetune"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_sources(case: str, source: Path) -> None:
    spoil, expected = SPOILED[case]
    spoil(source)
    assert expected in refusal("convert", "source")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--layers", "2,9"], "there is no layer 9, the model has 0 to 3"),
        (["--layers", "some"], "--layers 'some' is not valid"),
        (["--dtype", "int4"], "no dtype 'int4'"),
        (["--link", "--dtype", "float16"], "--link keeps the source's files and --dtype rewrites them"),
        (["--recipe", "defualt"], "no recipe 'defualt': did you mean default?"),
        (["--recipe", "nowhere.yaml"], "no such recipe file: nowhere.yaml"),
        (["--recipe", "source/own.yaml"], "kernel has no key 'windw': did you mean window?"),
        (["--set", "windw=3"], "kernel has no key 'windw': did you mean window?"),
        (["--set", "window"], "--set 'window' is not of the form key=value"),
        (["--set", "window=-1"], "kernel.window is -1: give 0 or more"),
        (["--revision", "main"], "only the Hub has revisions"),
        (["--push", "no-owner"], "'no-owner' is not a repository name"),
        (["--out", "source"], "source exists and is not empty: choose another --out, or --force to replace it"),
        (["--out", "source/new"], "source/new lies in source, which is read: give another --out, as /"),
        (["--out", "source/config.json"], "source/config.json lies in source, which is read"),
        (["--out", "file/out"], "can't write beside"),
    ],
)
def test_bad_options(options: list[str], expected: str, source: Path) -> None:
    (source / "own.yaml").write_text("kernel: {windw: 3}\nstages: []\n")
    Path("file").write_text("")
    before = tree(source.parent)
    assert expected in refusal("convert", "source", *options)
    assert tree(source.parent) == before


def test_no_checkpoint_is_written_into_another(sources: Path) -> None:
    checkpoint = sources / "converted"
    told = refusal("finetune", str(checkpoint), "--out", str(checkpoint / "new"))
    assert f"{checkpoint}/new lies in {checkpoint}, which is read: give another --out, as {sources}/new" in told


def test_no_space_is_seen_before(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "on the disk of source-dijiang, which has 1.0 kB" in refusal("convert", "source")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_no_space_while_writing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    assert "no space left on the disk of source-dijiang: free some or choose another --out" in refusal(
        "convert", "source"
    )
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("verb", ["finetune", "eval"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nowhere.txt", None, "no such file, folder or data set: nowhere.txt"),
        ("data.csv", "title,body\na,b\n", "has no column 'text' or 'messages', only title, body"),
        ("data.jsonl", '{"body": "a"}\n', "has no column 'text' or 'messages', only body"),
        ("data.txt", "too short", "less than one row of 128"),
        ("data.pdf", "text", "data.pdf is not text"),
        ("folder", None, "no text in folder"),
    ],
)
def test_bad_data(
    verb: str, name: str, content: str | None, expected: str, sources: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    elif name == "folder":
        Path(name).mkdir()
    before = tree(tmp_path)
    out = ["--out", "out"] if verb == "finetune" else []
    assert expected in refusal(verb, str(sources / "converted"), "--data", name, "--seq-len", "128", *out)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["finetune", "nowhere"], "no checkpoint folder nowhere: make one with dijiang convert"),
        (["finetune", "source"], "source is not converted yet: run dijiang convert source"),
        (["finetune"], "no converted checkpoints in the current folder"),
        (["eval", "./nowhere"], "no such folder: ./nowhere"),
        (["generate", "./nowhere", "The sea"], "no such folder: ./nowhere"),
        (["bench", "./nowhere"], "no such folder: ./nowhere"),
        (["push", "nowhere", "a/b"], "nowhere"),
        (["push", "source", "a/b"], "source"),
        (["push", "source", "no-owner"], "'no-owner' is not a repository name"),
    ],
)
def test_other_verbs_on_what_is_no_checkpoint(arguments: list[str], expected: str, source: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 1 and expected in error_line(result.stderr)
    assert [path.name for path in source.parent.iterdir()] == ["source"]
