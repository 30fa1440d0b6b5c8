"""The command line as a newcomer may have it: odd terminals, locales, folders and streams, and no rights."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from rich.console import Console

from dijiang_convert import progress
from tests.cli.commands import error_line, refusal, run
from tests.hub import Hub
from tests.sources_on_disk import llama_config, write_source
from tests.test_docs import QUICK, ROOT, text_of

DIJIANG = [sys.executable, "-m", "dijiang_convert"]
VERBS = ("convert", "finetune", "eval", "generate", "bench", "inspect", "push", "demo")
CAPABILITIES = (1, 2)  # of root: to write and to read what permissions forbid
DROP = 24  # PR_CAPBSET_DROP of prctl(2)


def without_rights() -> None:
    """Makes permissions hold for root, too, in a process that is about to run a command."""
    if os.geteuid() == 0:
        for number in CAPABILITIES:
            ctypes.CDLL(None).prctl(DROP, number, 0, 0, 0)


def dijiang(*arguments: str, unset: tuple[str, ...] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command as a process of its own. unset: variables that its environment lacks."""
    environment = {"PYTHONPATH": str(ROOT), **os.environ, **options.pop("env", {})}
    kept = {name: value for name, value in environment.items() if name not in unset}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.run([*DIJIANG, *arguments], env=kept, text=True, timeout=120, **{**streams, **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=1, max_position_embeddings=2048)
    return write_source(tmp_path_factory.mktemp("model") / "tiny", config)


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A folder that a process without rights can't write into."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    probe = subprocess.run(["test", "-w", str(folder)], preexec_fn=without_rights)
    if probe.returncode == 0:
        pytest.skip("nobody is kept from writing here")
    return folder


def test_the_readme_where_little_is_as_usual(hub: Hub, model: Path, locked: Path, tmp_path: Path) -> None:
    """README's commands in their order: in a folder with spaces, umlauts and quotes, where all names lie in; without a
    terminal, a locale, a home, a folder for temporary files or stdin; and nobody else may read what they write."""
    place = tmp_path / "a b" / "Größe 'x'"
    place.mkdir(parents=True)
    hub.add_repo("HuggingFaceTB/SmolLM2-135M-Instruct", model)
    (place / "Texte ß").mkdir()
    (place / "Texte ß" / "eins zwei.txt").write_text("Die Größe der Welt. " * 2000, encoding="utf-8")
    odd = {
        "HOME": str(locked), "XDG_CACHE_HOME": str(locked / "cache"), "XDG_CONFIG_HOME": str(locked / "config"),
        "TMPDIR": str(tmp_path / "nowhere"), "LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    for line in re.findall(r"^ {4}dijiang ([^#\n]+)", text_of(ROOT / "README.md"), re.M):
        name, *words = shlex.split(line)
        extra = ["Texte ß" if word == "text.txt" else word for word in QUICK.get(name, [])]
        if name == "convert" and "--calibrate" not in words:
            extra = ["--force"]
        done = dijiang(
            name, *words, *extra, unset=("TERM", "COLUMNS"), env=odd, cwd=place, umask=0o077, preexec_fn=without_rights
        )
        assert done.returncode == 0, f"dijiang {line}: {done.stderr}"
        assert done.stdout.isascii() and "Traceback" not in done.stderr and "atplotlib" not in done.stderr
    out = place / "SmolLM2-135M-Instruct-dijiang-finetuned"
    assert not [path for path in (out, *out.rglob("*")) if path.stat().st_mode & 0o077]
    assert "config.json" in hub.files("me/SmolLM2-135M-dijiang")


def test_the_next_command_can_be_copied(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are quoted for a shell."""
    place = tmp_path / "a b" / "it's"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    Path("the model").symlink_to(model)
    done = run("convert", "the model", "--out", "the result")
    (line,) = re.findall(r"next: dijiang (.*), or dijiang (.*)", done.stdout)
    assert shlex.split(line[0]) == ["eval", "the result", "--baseline", "the model"]
    assert shlex.split(line[1]) == ["finetune", "the result"]
    Path("the result", "config.json").write_text("{}")
    assert refusal("finetune", "the result") == "the result is not converted yet: run dijiang convert 'the result'"


# ------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "tiny"]])
def test_output_to_a_full_device(arguments: list[str], model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = dijiang(*arguments, stdout=full, cwd=model.parent)
    assert done.returncode == 1
    assert error_line(done.stderr).startswith("can't write the output (No space left on device): ")


def test_closed_streams(model: Path) -> None:
    """As of a service that has none: what is printed goes nowhere, and into no file that was opened meanwhile."""
    for closed, code in ((">&-", 0), ("<&-", 0), (">&- 2>&- <&-", 0)):
        done = subprocess.run([f"{shlex.join([*DIJIANG, '--version'])} {closed}"], shell=True, capture_output=True)
        assert (done.returncode, done.stderr) == (code, b""), closed
    failing = shlex.join([*DIJIANG, "inspect", "./nowhere"])
    assert subprocess.run(f"{failing} 2>&-", shell=True, stdout=subprocess.DEVNULL).returncode == 1


def test_a_reader_that_goes_away(model: Path) -> None:
    done = subprocess.run(
        f"{shlex.join([*DIJIANG, '--help'])} | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.count("\n") == 1 and done.stderr == ""


# ------------------------------------------------------------------------------------------------------ terminals


def in_terminal(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """The exit code and what a terminal of 80 columns would be sent, without colours."""
    pid, number = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execve(sys.executable, [*DIJIANG, *arguments], {**os.environ, "PYTHONPATH": str(ROOT), **environment})
    fcntl.ioctl(number, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    sent = b""
    while True:
        try:
            part = os.read(number, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        sent += part
    os.close(number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", sent.decode())


@pytest.mark.parametrize("verb", VERBS)
def test_help_in_a_terminal(verb: str, tmp_path: Path) -> None:
    code, shown = in_terminal(verb, "--help", cwd=tmp_path, TERM="xterm", COLUMNS="80")
    assert code == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown.replace("CHECKPOINT …", "").replace("cuda, …", "")
    text = " ".join(re.sub(r"[│\r\n]", " ", shown).split())
    defaults = {"convert": "./NAME-dijiang", "finetune": "(CHECKPOINT-finetuned)", "generate": "--chat if it has one"}
    assert defaults.get(verb, "") in text


def test_results_in_a_terminal(model: Path, tmp_path: Path) -> None:
    """A table breaks long names, and cuts nothing."""
    long = tmp_path / ("x" * 70) / ("y" * 70)
    long.parent.mkdir()
    long.symlink_to(model)
    code, shown = in_terminal("inspect", str(long), cwd=tmp_path, TERM="xterm")
    joined = re.sub(r"[│\s]", "", shown)
    assert code == 0 and str(long) in joined and "…" not in shown


def test_bars_are_drawn_where_the_cursor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    for terminal in ("xterm", "dumb"):
        monkeypatch.setenv("TERM", terminal)
        monkeypatch.setattr(progress, "console", Console(stderr=True, force_terminal=True))
        drawn[terminal] = progress.is_drawn()
    assert drawn == {"xterm": True, "dumb": False}


# ------------------------------------------------------------------------------------------------- rights and names


def test_a_cache_that_cannot_be_written(hub: Hub, model: Path, locked: Path) -> None:
    hub.add_repo("cli/locked", model)
    environment = {"HF_HOME": str(locked / "hub")}
    done = dijiang("inspect", "cli/locked", env=environment, cwd=locked, preexec_fn=without_rights)
    told = error_line(done.stderr)
    assert told.startswith(f"can't use {locked}/hub for cli/locked (Permission denied): ") and "set HF_HOME" in told


def test_a_token_that_cannot_be_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are searched for the user's token, so its file is read where everything else went wrong already."""

    def unreadable() -> str:
        raise PermissionError(13, "Permission denied", "token")

    monkeypatch.setattr(huggingface_hub, "get_token", unreadable)
    assert "no such folder: ./nowhere" in refusal("inspect", "./nowhere")
    assert "pushing to cli/token needs a token" in refusal("convert", "./nowhere", "--push", "cli/token")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    done = subprocess.run([*DIJIANG, "inspect", b"Gr\xf6\xdfe"], capture_output=True, text=True)
    assert done.returncode == 1
    assert error_line(done.stderr) == r"'Gr\udcf6\udcdfe' is not UTF-8: rename the file, or set LC_ALL=C.UTF-8"


def test_a_dry_run_stops_at_once(sources: Path, tmp_path: Path) -> None:
    """On `kill`, which does what Ctrl-C does; there is no step to be saved first."""
    (tmp_path / "text.txt").write_text("The sea. " * 2000)
    command = [*DIJIANG, "finetune", str(sources / "converted"), "--data", "text.txt", "--dry-run"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(scratch.iterdir()):  # until a step is being timed
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stdout) == (1, "")
    assert error_line(stderr) == "stopped; nothing half-written was left behind"
    assert not any(scratch.iterdir())
