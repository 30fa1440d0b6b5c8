"""What `faults.py` disturbs: convert, finetune and push of a tiny model, what each must leave, and how each is started.

Commands run as the command line runs them, forked from a server that has imported all they need.
"""

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.hub import Hub

LAUNCHER = multiprocessing.get_context("forkserver")
LAUNCHER.set_forkserver_preload(
    [
        "dijiang_convert.__main__", "dijiang_convert.convert", "dijiang_convert.finetune", "dijiang_convert.push",
        "dijiang_convert.data.readers", "torch.utils.tensorboard", "matplotlib.figure", "huggingface_hub.hf_api",
    ]
)  # fmt: skip
OPERATIONS = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
REPO = "tester/faults"

Contents = dict[str, bytes]


# ------------------------------------------------------------------------------------------------- running a command


def run_command(arguments: list[str], log: str, temporary: str, die_at: int | None, under: str) -> None:
    """What the child process does: the command, its output in a file. It writes to LOG.count how many file operations
    it made below ``under``, and dies at the one with the number ``die_at``."""
    import torch

    from dijiang_convert.__main__ import main

    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tempfile.tempdir = temporary
    count, dying = 0, False

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count, dying
        writes = event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR)
        beside = event in OPERATIONS and details[-1] not in (-1, None)  # rmtree names files beside an open folder
        if dying or not (writes or event in OPERATIONS) or not (beside or str(details[0]).startswith(under)):
            return
        if count == die_at:
            dying = True
            if writes:  # the moment after a file was opened, and is empty
                os.open(details[0], details[2])
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.pwrite(counter, str(count).encode(), 0)

    counter = os.open(f"{log}.count", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(watch)
    sys.argv = ["dijiang", *arguments]
    main()


class Runner:
    """Starts commands. log: the output of the last one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log_file = folder, folder / "log.txt"
        self.temporary = folder / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self(["--version"], folder)  # the first command starts the server, which takes longer than any other

    def start(self, arguments: list[str], under: Path, die_at: int | None = None) -> Any:
        details = (arguments, str(self.log_file), str(self.temporary), die_at, str(under))
        process = LAUNCHER.Process(target=run_command, args=details)  # type: ignore[attr-defined]
        process.start()
        return process

    def __call__(self, arguments: list[str], under: Path) -> int:
        """Runs a command to its end and returns its exit code."""
        process = self.start(arguments, under)
        process.join()
        return int(process.exitcode)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def error(self) -> str:
        """The line of the error, if there is one and nothing of a traceback."""
        lines = [line for line in self.log.splitlines() if line.startswith("error: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.log else ""


# ------------------------------------------------------------------------------------------------------------- cases


def contents(folder: Path) -> Contents:
    """The files of a folder; of those that hold times, what is left without them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith("runs/"):
            found[name] = _timeless(name, path.read_bytes())
    return found


def _timeless(name: str, data: bytes) -> bytes:
    if name == "training.jsonl":
        return re.sub(rb'"seconds": [0-9.]+', b"", data)
    if name == "report.html":
        return b"whole" if data.rstrip().endswith(b"</html>") else b"half"
    if name.endswith(".png"):
        return b"whole" if data.endswith(b"IEND\xaeB`\x82") else b"half"
    return data


class Case:
    """A command, what there was before it, and what it must leave.

    old: what stands under the final name before. versions: what the command makes of it, the last one in the end;
    the first, which finetune writes before its report, is complete too. place: an empty folder that the case runs in.
    seconds and operations: of an undisturbed run.
    """

    name: str
    verb: str
    place: Path
    seconds: float
    operations: int

    def __init__(self) -> None:
        self.old: Contents = {}
        self.versions: list[Contents] = []
        self.resume = False

    def prepare(self, place: Path) -> None:
        """Puts what there is before the command into ``place``."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.place, self.resume = place, False

    def remember(self) -> None:
        """Takes what stands there for a version of the result."""
        self.versions.append(self.result())

    def arguments(self) -> list[str]:
        raise NotImplementedError

    def result(self) -> Contents:
        """What stands under the final name."""
        raise NotImplementedError

    def standing(self) -> str:
        """Whether that is absent, old, new or half-written."""
        found = {name: data for name, data in self.result().items() if not name.endswith(".partial")}
        if found == self.old:
            return "old" if found else "absent"
        if not found:
            return "absent"
        known = all(any(v.get(name) == data for v in self.versions) for name, data in found.items())
        return "new" if known and self.versions[0].keys() <= found.keys() else "half"

    def corrupt(self) -> bool:
        """Whether anything that was read changed, or weights can't be read."""
        from dijiang_convert.checkpoint.shards import read_shard

        for folder in (path for path in self.place.iterdir() if path.name == "out"):
            for path in folder.glob("*.safetensors"):
                try:
                    read_shard(path)
                except Exception:
                    return True
        return False

    def left(self) -> list[str]:
        """What lies beside the result."""
        return sorted(path.name for path in self.place.iterdir() if path.name not in ("out", "checkpoint"))

    def phase(self) -> str:
        raise NotImplementedError

    def watch(self, kill: Callable[[], None], at: int) -> Any:
        """A context in which something else than file operations counts, see `PushCase`."""
        return nullcontext()


class FolderCase(Case):
    """convert or finetune of the folder ``source``, with ``options``, over the folder ``before`` if there is one."""

    def __init__(self, name: str, source: str, options: list[str], before: Path | None = None) -> None:
        super().__init__()
        self.name, self.verb, self.source, self.options, self.before = name, name.split()[0], source, options, before
        self.old = contents(before) if before else {}
        self.read = contents(Path(source)) if Path(source).is_dir() else {}

    def prepare(self, place: Path) -> None:
        super().prepare(place)
        if self.before is not None:
            shutil.copytree(self.before, place / "out")
        shutil.rmtree(self.cache(), ignore_errors=True)

    def cache(self) -> Path:
        """What the Hub's cache has of the source, if that is on the Hub."""
        return Path(os.environ["HF_HOME"]) / "hub" / f"models--{self.source.replace('/', '--')}"

    def arguments(self) -> list[str]:
        resume = ["--resume"] if self.resume else []
        return [self.verb, self.source, "--out", str(self.place / "out"), *self.options, *resume]

    def result(self) -> Contents:
        return contents(self.place / "out")

    def corrupt(self) -> bool:
        return bool(self.read and contents(Path(self.source)) != self.read) or super().corrupt()

    def phase(self) -> str:
        run, standing = self.place / "out.run", self.standing()
        if standing == "new":
            return "report" if run.exists() else "end"
        for folder in self.place.glob(".out.????????.partial"):
            if self.verb == "finetune":
                return "writing the result"
            if (folder / "README.md").exists():
                return "card"
            if list(folder.glob("*.index.json")):
                return "checking weights"
            return "writing weights" if list(folder.glob("*.safetensors")) else "writing what lies beside weights"
        if self.cache().is_dir():
            return "downloading"
        after = {
            "after-1": "after the last stage", ".after-1.*": "after the last stage", "stage-1": "second stage",
            "after-0": "between stages", ".after-0.*": "between stages", "stage-0": "first stage",
            "aside.pt": "measuring before", "rows-0": "setting text aside", "plan.json": "gathering rows",
        }  # fmt: skip
        return next((name for pattern, name in after.items() if list(run.glob(pattern))), "checking")


class PushCase(Case):
    """push of a copy of the checkpoint ``source`` without its card, over ``before`` if the repository has it."""

    verb = "push"

    def __init__(self, name: str, hub: Hub, source: Path, before: Contents | None = None) -> None:
        super().__init__()
        self.name, self.hub, self.source, self.before = name, hub, source, before
        self.old = before or {}
        self.read = {name: data for name, data in contents(source).items() if name != "README.md"}
        weights = (data for name, data in self.read.items() if name.endswith(".safetensors"))
        self.uploads = {hashlib.sha256(data).hexdigest() for data in weights}

    def prepare(self, place: Path) -> None:
        """Also takes the repository and the uploaded weights away from the Hub."""
        super().prepare(place)
        shutil.copytree(self.source, place / "checkpoint", ignore=shutil.ignore_patterns("README.md"))
        self.hub.repos.pop(REPO, None)
        for sha256 in self.uploads:
            self.hub.objects.pop(sha256, None)
        if self.before is not None:
            self.hub.add_repo(REPO, self.before)

    def arguments(self) -> list[str]:
        return ["push", str(self.place / "checkpoint"), REPO]

    def result(self) -> Contents:
        found = self.hub.files(REPO) if REPO in self.hub.repos else {}
        return {} if set(found) <= {".gitattributes"} else found

    def remember(self) -> None:
        super().remember()
        self.card = (self.place / "checkpoint" / "README.md").read_bytes()

    def corrupt(self) -> bool:
        here = contents(self.place / "checkpoint")
        card = here.pop("README.md", self.card)
        return (
            card != self.card
            or {name: data for name, data in here.items() if name != ".README.md.partial"} != self.read
        )

    def phase(self) -> str:
        if self.standing() == "new":
            return "end"
        if self.uploads & self.hub.objects.keys():
            return "uploading"
        return "comparing" if REPO in self.hub.repos else "checking"

    @contextmanager
    def watch(self, kill: Callable[[], None], at: int) -> Iterator[None]:
        """Calls ``kill`` at a request: when it arrived, or when what it asked for is done."""
        count = 0

        def look(*_: str) -> None:
            nonlocal count
            count += 1
            if count == at + 1:
                kill()
            self.operations = max(self.operations, count)

        with self.hub.watching(look):
            yield


def make_cases(work: Path, hub: Hub) -> dict[str, Case]:
    """All cases by their names. Their tiny Llama, its text and what is made of them are put into ``work``."""
    from dijiang_convert import convert
    from tests.sources_on_disk import llama_config, write_source

    model = llama_config(hidden_size=64, intermediate_size=256, num_hidden_layers=2, initializer_range=0.25)
    source = str(write_source(work / "source", model, shard_size="100KB"))
    text = work / "words.txt"
    text.write_text(" ".join(f"the {n} words of {n * n % 97} and {n % 7} more" for n in range(400)))
    settings = ["window=16", "block=16", "memory=8"]
    convert(source, work / "converted", recipe="frequency", settings=settings)
    convert(source, work / "older", recipe="pure", dtype="float16")
    older = {**contents(work / "older"), "model.safetensors": b"an older version's"}
    training = ["--data", str(text), "--seq-len", "32", "--tokens", "1500"]
    hub.add_repo("tester/source", work / "source")
    tuned = str(work / "converted")
    calibration = ["--layers", "auto:1", "--data", str(text), *(f"--set={each}" for each in settings)]
    cases: list[Case] = [
        FolderCase("convert", source, []),
        FolderCase("convert --force", source, ["--force"], work / "older"),
        FolderCase("convert --link", source, ["--link"]),
        FolderCase("convert --dtype", source, ["--dtype", "bfloat16"]),
        FolderCase("convert --layers auto:1", source, calibration),
        FolderCase("convert OWNER/NAME", "tester/source", []),
        FolderCase("finetune", tuned, training),
        FolderCase("finetune --full", tuned, [*training, "--full"]),
        FolderCase("finetune --force", tuned, [*training, "--force"], work / "older"),
        PushCase("push", hub, work / "converted"),
        PushCase("push over an older version", hub, work / "converted", older),
    ]
    return {case.name: case for case in cases}
