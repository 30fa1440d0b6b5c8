"""The command line: one clear line for bad input and nothing half-written, exit codes, and JSON on stdout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dijiang_convert.demo import MODEL
from tests.cli.commands import INDEX, error_line, refusal, run
from tests.hub import Hub
from tests.sources_on_disk import edit_config


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["convert"],
        ["convert", "a", "b"],
        ["convert", "a", "--no-such-option"],
        ["push", "a"],
        ["finetune", "--tokens", "0"],
        ["finetune", "--recipe", "pure"],
        ["finetune", "--tokens", "many"],
        ["eval", "a", "--max-tokens", "1"],
        ["bench", "a", "--lengths", "long"],
        ["bench", "a", "--lengths", ""],
        ["bench", "a", "--batch-size", "1,"],
        ["generate", "a", "b", "--temperature", "-1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Usage:" in result.stderr


def test_an_unexpected_error_is_one_line_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("two\nlines")

    import dijiang_convert.convert

    monkeypatch.setattr(sys.modules[dijiang_convert.convert.__module__], "write_card", fail)
    result = run("convert", "source")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == "error: unexpected RuntimeError: two lines: --debug shows where\n"
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dijiang_convert", "push", "--debug", str(tmp_path), "no-owner"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" in done.stderr and "DijiangError: 'no-owner' is not a repository name" in done.stderr
    done = subprocess.run([*command[:4], *command[5:]], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "'no-owner' is not a repository name" in error_line(done.stderr)


LIGHT = """
import sys
from dijiang_convert.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(sorted(name for name in sys.modules if name.count(".") < 2))
"""


VERBS = ("convert", "finetune", "eval", "generate", "bench", "inspect", "push", "demo")


TRAINING = {"datasets", "pandas", "peft", "matplotlib", "transformers.trainer", "dijiang_convert.finetune"}


def imported(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and the modules that it needs."""
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *output, modules = done.stdout.splitlines()
    return "\n".join(output), set(ast.literal_eval(modules))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_is_light(arguments: list[str]) -> None:
    output, modules = imported(*arguments)
    assert "Usage:" in output or arguments == ["--version"]
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub", *TRAINING}


@pytest.mark.parametrize("arguments", [["bench", "a", "--lengths", "long"], ["finetune", "--recipe", "pure"]])
def test_wrong_usage_is_light(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dijiang_convert", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2 and "Usage:" in done.stderr and " torch\n" not in done.stderr
    assert arguments[0] == "bench" or "the checkpoint has its recipe from" in done.stderr


@pytest.mark.parametrize("arguments", [["inspect"], ["convert", "--dry-run"]])
def test_what_does_not_train_imports_nothing_that_does(arguments: list[str], source: Path) -> None:
    """transformers' own model class imports much, and no more is needed."""
    output, modules = imported(*arguments, "source")
    assert "GPTNeoXForCausalLM" in output or "would write" in output
    assert "torch" in modules and not modules & TRAINING


def test_every_verb_has_help() -> None:
    text = run("--help").stdout
    for verb in VERBS:
        assert verb in text
        result = run(verb, "--help")
        assert result.exit_code == 0 and "--json" in result.stdout and "--debug" in result.stdout


def json_of(*arguments: str) -> dict[str, Any]:
    """The one object on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)  # refuses anything before or behind it
    assert isinstance(content, dict) and result.stdout.count("\n") == 1
    return content


CONVERT = {
    "out", "source", "source_revision", "recipe", "layers_converted", "new_parameters", "total_parameters", "seconds",
}  # fmt: skip


INSPECT = {"architecture", "supported", "reason", "layers", "state_bytes", "kv_cache_bytes_at"}


def test_convert_json(source: Path) -> None:
    content = json_of(
        "convert", "source", "--layers", "0-2", "--set", "window=8", "--set", "block=8", "--set", "memory=8"
    )
    assert content.keys() >= CONVERT
    assert (content["out"], content["source"], content["source_revision"]) == ("source-dijiang", "source", None)
    assert (content["recipe"], content["layers_converted"]) == ("default", 3)
    assert content["new_parameters"] == 0 < content["total_parameters"] and content["seconds"] > 0
    config = json.loads(Path("source-dijiang/config.json").read_text())
    assert config["dijiang"]["layers"] == [0, 1, 2] and config["dijiang"]["kernel"]["window"] == 8


def test_dry_run_json(source: Path) -> None:
    assert json_of("convert", "source", "--dry-run").keys() >= CONVERT
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_dry_run_tells_of_the_calibration(source: Path) -> None:
    Path("text.txt").write_text("The sea. " * 100)
    options = ["convert", "source", "--dry-run", "--data", "text.txt"]
    for more in (["--calibrate"], ["--layers", "auto:1"]):
        assert "would calibrate on about 4,096 tokens, forwards and backwards" in run(*options, *more).stdout
    assert "calibrate on" not in run("convert", "source", "--dry-run").stdout


def test_link(source: Path) -> None:
    assert json_of("convert", "source")["linked"] is None
    how = json_of("convert", "source", "--link", "--force")["linked"]
    assert how in ("reflink", "hard link")
    assert f"weights are {how}s to the source's" in run("convert", "source", "--link", "--force").stdout


def test_force(source: Path) -> None:
    json_of("convert", "source", "--out", "out")
    Path("out/old").write_text("old")
    assert json_of("convert", "source", "--out", "out", "--force")["out"] == "out"
    assert not Path("out/old").exists() and Path("out/config.json").is_file()


def test_inspect_json(source: Path) -> None:
    content = json_of("inspect", "source")
    assert content.keys() >= INSPECT
    assert (content["architecture"], content["supported"], content["reason"]) == ("GPTNeoXForCausalLM", True, None)
    assert content["layers"] == 4 and content["kv_cache_bytes_at"]["1024"] > content["state_bytes"] > 0
    edit_config(source, model_type="bloom", architectures=["BloomForCausalLM"])
    content = json_of("inspect", "source")
    assert not content["supported"] and "AttentionInterface" in content["reason"]


def test_push_json(hub: Hub, sources: Path) -> None:
    before = hub.bytes_received
    content = json_of("push", str(sources / "converted"), "cli/pushed")
    assert content.keys() >= {"repo", "commit", "bytes_uploaded"}
    assert content["repo"] == "cli/pushed" and content["commit"] == hub.history("cli/pushed")[0].sha
    held = hub.files("cli/pushed")
    assert content["bytes_uploaded"] == sum(len(data) for name, data in held.items() if name != ".gitattributes")
    assert hub.bytes_received > before
    assert json_of("push", str(sources / "converted"), "cli/pushed")["bytes_uploaded"] == 0


def test_push_on_convert(hub: Hub, source: Path) -> None:
    assert json_of("convert", "source", "--push", "cli/converted", "--dry-run")["pushed"] is None
    assert "cli/converted" not in hub.repos
    content = json_of("convert", "source", "--push", "cli/converted")
    assert content["pushed"].endswith("/cli/converted") and "config.json" in hub.files("cli/converted")


def test_private_and_tag(hub: Hub, source: Path) -> None:
    json_of("convert", "source", "--push", "cli/private", "--private")
    assert hub.repos["cli/private"].private
    content = json_of("push", "source-dijiang", "cli/private", "--revision", "dev", "--tag", "v1")
    assert hub.repos["cli/private"].tags == {"v1": content["commit"]}
    assert set(hub.repos["cli/private"].branches) == {"main", "dev"}


def test_results_for_people(source: Path, hub: Hub) -> None:
    result = run("inspect", "source")
    assert result.exit_code == 0 and "GPTNeoXForCausalLM" in result.stdout and "at any length" in result.stdout
    result = run("convert", "source")
    assert result.exit_code == 0 and result.stdout.startswith("wrote source-dijiang: 4 layers converted")
    assert "or dijiang finetune source-dijiang" in result.stdout
    result = run("push", "source-dijiang", "cli/people")
    assert result.exit_code == 0 and f"{hub.url}/cli/people" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_an_interrupted_conversion_leaves_nothing(source: Path) -> None:
    """The last shard holds 4 GB of nothing, which take longer to copy than the signal takes to arrive."""
    name, count = "model-huge.safetensors", 1 << 30
    header = json.dumps({"huge": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    with (source / name).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * count)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["huge"] = name
    (source / INDEX).write_text(json.dumps(index))
    if shutil.disk_usage(source).free < 8 * count:
        pytest.skip("needs 8 GB of free disk, to write little of it")

    process = subprocess.Popen(
        [sys.executable, "-m", "dijiang_convert", "convert", "source"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background may ignore it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in source.parent.glob(".source-dijiang.*/*.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and stdout == ""
    assert error_line(stderr) == "stopped; nothing half-written was left behind"
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_an_interrupt_from_within(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "copy_file_range", interrupt)
    assert refusal("convert", "source") == "stopped; nothing half-written was left behind"
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_nothing_is_said_at_the_end() -> None:
    """Libraries that are imported on the way complain of leaks, where the garbage collector was tampered with."""
    command = [sys.executable, "-m", "dijiang_convert", "inspect", str(MODEL), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "" and json.loads(done.stdout)["supported"]


END = """
import atexit, sys, threading, time
from dijiang_convert.__main__ import main
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
main()
"""


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--nonsense", 2)])
def test_the_end_waits_for_what_is_still_to_do(argument: str, code: int) -> None:
    """Modules are not torn down one by one; threads, what was registered for the end, and output are as ever."""
    done = subprocess.run([sys.executable, "-c", END, argument], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.splitlines()[-2:] == ["thread", "registered"]
