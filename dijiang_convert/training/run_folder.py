"""The folder OUT.run: what a finetune run keeps until its result is written, so that the run can be resumed.

What a checkpoint of the Trainer or a result folder holds is decided elsewhere.
"""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoint.shards import write_json
from ..errors import DijiangError
from ..files import new_folder
from ..progress import say
from ..recipe import Stage
from .checkpoints import GO_ON, remove_broken
from .trainer import StageResult

PLAN, RESULTS = "plan.json", "results.json"  # files of the run's folder, and of the folder of a model after a stage
MAY_CHANGE = ("learning_rate", "kernel_learning_rate", "warmup")  # keys of a stage that may change in a resumed run


class RunFolder:
    """The folder OUT.run: the plan, the model after the last finished stage, the Trainer's checkpoints of the next.

    A run that is killed at any moment leaves a folder that can be used: its parts appear whole, and an old part goes
    only once its replacement is there. All processes read the folder, and the main process alone writes to it.

    target: the folder of the result. options: settings besides the plan that a resumed run must share. force: replaces
    an unfinished run. Raises DijiangError for an unfinished run without ``resume`` or ``force``, and where there is
    nothing to resume or the options are those of another run.
    """

    def __init__(
        self, target: Path, plan: Sequence[Stage], options: dict[str, Any], resume: bool, force: bool = False
    ) -> None:
        self.target, self.folder = target, target.with_name(target.name + ".run")
        self.content = {**options, "stages": [dataclasses.asdict(stage) for stage in plan]}
        self.results: list[StageResult] = []
        self.latest: Path | None = None
        self.resumed = resume
        if resume:
            before = self._read(force)
            last = max((i for i in range(len(plan)) if self._after(i).is_dir()), default=-1)
            if last >= 0:
                self.latest = self._after(last)
                self.results = [StageResult(**r) for r in json.loads((self.latest / RESULTS).read_text())]
            self._compare(before)
        elif (self.folder / PLAN).is_file() and not force:
            raise DijiangError(
                f"{self.folder} holds an unfinished run: go on with --resume, or start anew with --force"
            )

    def _read(self, force: bool) -> dict[str, Any]:
        try:
            return json.loads((self.folder / PLAN).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            if (self.target / "config.json").is_file() and not force:
                raise DijiangError(f"nothing to resume: {self.target} is finished") from None
            raise DijiangError(f"nothing to resume: no {self.folder}; run without --resume") from None

    def _compare(self, before: dict[str, Any]) -> None:
        """Raises DijiangError if more than MAY_CHANGE has changed: a run that diverged needs other learning rates."""
        if _fixed(before) != _fixed(self.content):
            raise DijiangError(
                f"{self.folder} is from another run, of {_other(_fixed(before), _fixed(self.content))}: "
                "repeat its options, or start anew with --force instead of --resume"
            )
        to_do = slice(len(self.results), None)
        for stage, now in zip(before["stages"][to_do], self.content["stages"][to_do], strict=True):
            for key in MAY_CHANGE:
                if stage[key] != now[key]:
                    say(f"stage {now['name']}: {key} is {now[key]} from here on, it was {stage[key]}")

    @property
    def finished(self) -> bool:
        """Whether the result is in its place already, and this folder only waits to be removed."""
        same = self.latest is not None and len(self.results) == len(self.content["stages"])
        return same and _text(self.target / "config.json") == _text(self.latest / "config.json")  # type: ignore[operator]

    def begin(self) -> None:
        """Makes the folder of a new run, or removes what was half-written from the folder of a resumed one."""
        here = PartialState()
        here.wait_for_everyone()  # until every process has read the folder
        if here.is_main_process:
            if not self.resumed:
                (self.folder / PLAN).unlink(missing_ok=True)
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            for folder in self.folder.glob(".*.partial"):
                shutil.rmtree(folder, ignore_errors=True)
            for i in range(len(self.content["stages"])):
                remove_broken(self.stage(i))
            write_json(self.folder / f".{PLAN}", self.content)
            (self.folder / f".{PLAN}").replace(self.folder / PLAN)
        here.wait_for_everyone()

    @property
    def log(self) -> Path:
        """The training log of all stages."""
        return self.folder / "training.jsonl"

    def stage(self, index: int) -> Path:
        """The folder of the Trainer in a stage."""
        return self.folder / f"stage-{index}"

    def wait_for(self, path: Path) -> None:
        """Waits until the main process has put ``path`` there. (A barrier would give up after some minutes.)"""
        while not (PartialState().is_main_process or path.exists()):
            time.sleep(0.5)

    def discard(self) -> None:
        """Removes the folder of a run that never began."""
        if PartialState().is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _after(self, index: int) -> Path:
        return self.folder / f"after-{index}"

    def record(self, index: int, results: list[StageResult], write: Callable[[Path], None]) -> None:
        """Keeps the model after a stage, which ``write`` writes, and removes the model and checkpoints from before."""
        here = PartialState()
        if here.is_main_process:
            with new_folder(self._after(index), force=True, remedy=GO_ON) as folder:
                write(folder)
                write_json(folder / RESULTS, [dataclasses.asdict(result) for result in results])
            shutil.rmtree(self._after(index - 1), ignore_errors=True)
            for folder in self.stage(index).glob("checkpoint-*"):
                shutil.rmtree(folder, ignore_errors=True)
        here.wait_for_everyone()
        self.latest = self._after(index)

    def finish(self, target: Path, force: bool) -> None:
        """Puts the model after the last stage into ``target``, with the log, and TensorBoard's files in runs/STAGE."""
        here = PartialState()
        if here.is_main_process and not self.finished:
            assert self.latest is not None
            with new_folder(target, force, GO_ON) as new:
                shutil.copytree(
                    self.latest, new, copy_function=_link, ignore=shutil.ignore_patterns(RESULTS), dirs_exist_ok=True
                )
                if self.log.is_file():
                    shutil.copyfile(self.log, new / self.log.name)
                for i, stage in enumerate(self.content["stages"]):
                    if (self.stage(i) / "runs").is_dir():
                        shutil.copytree(self.stage(i) / "runs", new / "runs" / stage["name"], dirs_exist_ok=True)
        here.wait_for_everyone()

    def remove(self) -> None:
        """Removes the folder, once nothing in it is needed any more."""
        here = PartialState()
        if here.is_main_process:
            gone = self.folder.with_name(f".{self.target.name}.run.partial")
            self.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
        here.wait_for_everyone()


def _fixed(plan: dict[str, Any]) -> dict[str, Any]:
    """The part of a plan that must stay the same in a resumed run."""
    stages = [{key: value for key, value in stage.items() if key not in MAY_CHANGE} for stage in plan["stages"]]
    return {**plan, "stages": stages}


def _other(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names the first difference between two plans: an option, a key of a stage, or their stages."""
    for key in now:
        if key != "stages" and before.get(key) != now[key]:
            return f"another --{key.replace('_', '-')}"
    if len(before["stages"]) == len(now["stages"]):
        for old, new in zip(before["stages"], now["stages"], strict=True):
            for key in new:
                if old.get(key) != new[key]:
                    return f"another {new['name']}.{key} ({old.get(key)}, now {new[key]})"
    return "other stages"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _link(source: str, target: str) -> None:
    """Hard-links a file, or copies it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
