"""`dijiang finetune`: a short distillation run that repairs what the swap lost. A checkpoint in, a checkpoint out.

The recipe's stages come from the checkpoint, where `convert` recorded them. While it runs, a folder OUT.run holds what
``resume`` needs; it goes when the result is written.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import write_card
from .checkpoint import check_out, new_folder, read_checkpoint, write_json
from .convert import LEFT_BEHIND, write_code
from .distill.corpus import Sources
from .distill.data import Rows, check_data, token_rows
from .distill.teacher_cache import CachedRows
from .distill.teacher_cache import cache_teacher as write_cache
from .distill.trainer import StageResult, run_stage
from .errors import DijiangError
from .models import load_any, load_converted, load_tokenizer, silence
from .progress import console, count_bar
from .push import check_repo
from .push import push as push_checkpoint
from .recipe import Recipe, Stage, adjust_stages, parse_recipe, scale_tokens
from .sources import is_hub_id


@dataclass(frozen=True)
class FinetuneResult:
    out: str
    stages: list[StageResult]
    seconds: float
    pushed: str | None = None


def finetune(
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    *,
    data: str | Sequence[str] | None = None,
    tokens: int | None = None,
    stages: Sequence[str] = (),
    train: str | None = None,
    seq_len: int | None = None,
    settings: Sequence[str] = (),
    teacher: str | None = None,
    cache_teacher: int | None = None,
    resume: bool = False,
    push: str | None = None,
    force: bool = False,
    seed: int = 0,
) -> FinetuneResult:
    """Trains a converted checkpoint by its recipe.

    Args:
        checkpoint: its folder; None takes the one converted checkpoint in the current folder.
        out: by default CHECKPOINT-finetuned.
        data: a file (.txt, .md, .jsonl, .json, .csv, .parquet), a folder or glob of them, or a Hub data set; `Sources`
            of several; or the documents themselves. None takes the recipe's and its stages' own.
        tokens: of all stages together; shortens or stretches each in proportion.
        stages: names of the stages to run; all by default.
        train: "lora" or "full", for all stages but attention transfer.
        seq_len: tokens a row.
        settings: ``key=value`` for every stage, ``stage.key=value`` for one.
        teacher: the original model, needed only where the checkpoint was trained before and its source is a folder.
        cache_teacher: write down the teacher's so many likeliest tokens of every position first, so that training needs
            no second model in memory. For stages that have one: LoRA's teacher is the model itself.
        resume: go on where a run with the same ``out`` stopped.
        push: a Hub repository to push the result to.

    Raises:
        DijiangError: with one line that says what is wrong and what to do.
    """
    start = time.perf_counter()
    folder = Path(checkpoint).expanduser() if checkpoint is not None else _only_checkpoint()
    config = read_checkpoint(folder)
    target = Path(out) if out is not None else folder.with_name(f"{folder.resolve().name}-finetuned")
    recipe = _recipe(config["dijiang"])
    plan = _plan(recipe, stages, tokens, train, seq_len, settings, own_data=data is None)
    section = config["dijiang"]
    teachers = [
        _teacher(stage, folder, section, [*section["history"], *plan[:i]], teacher) for i, stage in enumerate(plan)
    ]
    _check_cache(cache_teacher, teachers)
    corpora = [_corpus(stage.data, data, recipe) for stage in plan]
    if not resume:  # whose rows are kept, whatever has happened to the corpus
        for corpus in corpora:
            check_data(corpus)
    check_out(target, force)
    if push:
        check_repo(push)
    silence()
    run = _Run(target, plan, resume)
    tokenizer = load_tokenizer(folder)
    here = PartialState()
    if here.is_main_process:
        run.begin()
    here.wait_for_everyone()
    try:
        rows = _gather(corpora, tokenizer, plan, seed, run.folder, writes=here.is_main_process)
    except DijiangError:
        if not resume:
            run.remove()
        raise
    model = load_converted(run.latest or folder)
    results = list(run.results)
    for i, stage in enumerate(plan):
        if i < len(results):
            continue
        text: Rows | CachedRows = rows[i]
        source, guide = teachers[i], None
        if source is not None and cache_teacher is not None:
            text = write_cache(
                rows[i], -(-stage.tokens // stage.seq_len), source.load, top=cache_teacher,
                folder=run.cache(i), name=source.name,
            )  # fmt: skip
        elif source is not None:
            guide = source.load()
        model, result = run_stage(model, stage, text, teacher=guide, folder=run.stage(i), resume=resume, seed=seed)
        results.append(result)
        if i + 1 < len(plan):
            run.record(i, results, lambda path: _write(path, model, folder, config, plan, results))  # noqa: B023
    with new_folder(target, force) as new:
        _write(new, model, folder, config, plan, results)
        run.move_logs(new)
    run.remove()
    pushed = push_checkpoint(target, push).url if push else None
    return FinetuneResult(str(target), results, time.perf_counter() - start, pushed)


def _only_checkpoint() -> Path:
    """The converted, not yet finetuned checkpoint in the current folder."""
    here = Path()
    found = []
    for path in sorted([here, *(p for p in here.iterdir() if p.is_dir())]):
        config = path / "config.json"
        if config.is_file() and not path.name.startswith("."):
            section = json.loads(config.read_text(encoding="utf-8")).get("dijiang")
            if section is not None and not section.get("history"):
                found.append(path)
    if len(found) != 1:
        names = f": {', '.join(map(str, found))}" if found else ""
        count = len(found) or "no"
        raise DijiangError(f"{count} converted checkpoints in the current folder{names}: name the one to finetune")
    console.print(f"finetuning {found[0]}")
    return found[0]


def _recipe(section: dict[str, Any]) -> Recipe:
    keys = ("kernel", "stages", "data")
    return parse_recipe({"name": section["recipe"], **{key: section[key] for key in keys if key in section}})


def _plan(
    recipe: Recipe,
    names: Sequence[str],
    tokens: int | None,
    train: str | None,
    seq_len: int | None,
    settings: Sequence[str],
    own_data: bool,
) -> tuple[Stage, ...]:
    known = [stage.name for stage in recipe.stages]
    for name in names:
        if name not in known:
            raise DijiangError(f"the checkpoint's recipe has no stage {name!r}: valid are {', '.join(known)}")
    plan = tuple(stage for stage in recipe.stages if not names or stage.name in names)
    if not plan:
        raise DijiangError(f"recipe {recipe.name} has no stages to run: give it some")
    if train is not None:
        plan = tuple(s if s.train == "kernel" else dataclasses.replace(s, train=train) for s in plan)
    if seq_len is not None:
        plan = tuple(dataclasses.replace(s, seq_len=seq_len) for s in plan)
    if not own_data:
        plan = tuple(dataclasses.replace(s, data=None) for s in plan)
    plan = adjust_stages(plan, settings)
    return plan if tokens is None else scale_tokens(plan, tokens)


def _corpus(own: str | list[str] | None, data: str | Sequence[str] | None, recipe: Recipe) -> Sequence[str]:
    """What a stage reads: its own corpora, those of the run, or the recipe's."""
    if own is None and data is not None and not isinstance(data, str):
        return data if isinstance(data, Sources) else tuple(data)
    names = own or data or recipe.data
    return Sources([names] if isinstance(names, str) else names)


def _gather(
    corpora: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    plan: Sequence[Stage],
    seed: int,
    folder: Path,
    writes: bool,
) -> list[Rows]:
    """Rows for every stage, kept in the run's folder: one process ``writes`` them there, the others open them.

    Stages of one corpus and row length share one reading of it, each with rows of its own.
    """
    groups: dict[tuple[type, Sequence[str], int], list[int]] = {}
    for i, (corpus, stage) in enumerate(zip(corpora, plan, strict=True)):
        groups.setdefault((type(corpus), corpus, stage.seq_len), []).append(i)
    rows: dict[int, Rows] = {}
    for number, ((_, corpus, seq_len), members) in enumerate(groups.items()):
        counts = [max(-(-plan[i].tokens // seq_len), 1) for i in members]
        total = sum(counts) * seq_len
        kept = folder / f"rows-{number}"
        while not (writes or kept.is_dir()):  # a barrier would give up after some minutes: reading may take longer
            time.sleep(0.5)
        with count_bar("reading text (tokens)", total) as advance:
            gathered = token_rows(
                corpus, tokenizer, seq_len=seq_len, tokens=total, shuffle_seed=seed, progress=advance,
                folder=kept,
            )  # fmt: skip
        rows |= zip(members, gathered.split(counts), strict=True)
    return [rows[i] for i in range(len(plan))]


@dataclass(frozen=True)
class _Teacher:
    """A softmax model to learn from, not loaded: a converted folder's base weights, or the original by its name."""

    name: str
    is_converted: bool = False

    def load(self) -> PreTrainedModel:
        model = load_converted(self.name, attention="sdpa") if self.is_converted else load_any(self.name)
        return model.eval().requires_grad_(False)  # type: ignore[return-value]


def _teacher(
    stage: Stage, folder: Path, section: dict[str, Any], before: Sequence[Any], given: str | None
) -> _Teacher | None:
    """None where there is none to load: the model itself is it, once adapters and kernels are off."""
    if stage.objective != "distillation":
        return None
    trained = {step["train"] if isinstance(step, dict) else step.train for step in before}
    if given is not None:
        return _Teacher(given)
    if any(step["train"] != "kernel" for step in section["history"]):
        if not is_hub_id(str(section["source"])):
            raise DijiangError(
                f"{folder} was trained before, so its base weights are not the original's: "
                f"give that model with --teacher (it was {section['source']})"
            )
        return _Teacher(section["source"])
    if stage.train != "full" and trained <= {"kernel"}:
        return None
    return _Teacher(str(folder), is_converted=True)


def _check_cache(top: int | None, teachers: Sequence[_Teacher | None]) -> None:
    if top is None:
        return
    if top < 1:
        raise DijiangError(f"--cache-teacher {top}: give how many tokens to keep, 64 for example")
    if not any(teachers):
        raise DijiangError(
            "--cache-teacher is of no use here: no stage loads a teacher (LoRA's is the model itself); leave it out"
        )


class _Run:
    """The folder OUT.run: finished stages, and the Trainer's checkpoints of the one under way."""

    def __init__(self, target: Path, plan: Sequence[Stage], resume: bool) -> None:
        self.folder = target.with_name(target.name + ".run")
        self.plan = [dataclasses.asdict(stage) for stage in plan]
        self.results: list[StageResult] = []
        self.latest: Path | None = None
        self.resumed = resume
        if resume:
            if not (self.folder / "plan.json").is_file():
                raise DijiangError(f"nothing to resume: no {self.folder}; run without --resume")
            if json.loads((self.folder / "plan.json").read_text()) != self.plan:
                raise DijiangError(f"{self.folder} is from another run: repeat its options, or drop --resume")
            for i in range(len(plan)):
                done = self.folder / f"after-{i}"
                if done.is_dir():
                    self.latest = done
                    self.results = [StageResult(**r) for r in json.loads((done / "results.json").read_text())]

    def begin(self) -> None:
        """Makes the folder of a new run; one that is resumed has it."""
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(self.folder / "plan.json", self.plan)

    def stage(self, index: int) -> Path:
        return self.folder / f"stage-{index}"

    def cache(self, index: int) -> Path:
        """Of a stage's teacher."""
        return self.folder / f"teacher-{index}"

    def record(self, index: int, results: list[StageResult], write: Any) -> None:
        """Keeps the model after a stage; what came before it is no longer needed."""
        with new_folder(self.folder / f"after-{index}", force=True) as folder:
            write(folder)
            write_json(folder / "results.json", [dataclasses.asdict(result) for result in results])
        shutil.rmtree(self.folder / f"after-{index - 1}", ignore_errors=True)
        shutil.rmtree(self.cache(index), ignore_errors=True)
        for checkpoint in self.stage(index).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def move_logs(self, target: Path) -> None:
        """TensorBoard's files, to runs/STAGE in the result; `push` leaves them at home."""
        for i, stage in enumerate(self.plan):
            for logs in (self.stage(i) / "runs").glob("*"):
                folder = target / "runs" / stage["name"]
                folder.mkdir(parents=True, exist_ok=True)
                shutil.move(logs, folder)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(
    target: Path,
    model: PreTrainedModel,
    source: Path,
    config: dict[str, Any],
    plan: Sequence[Stage],
    results: Sequence[StageResult],
) -> None:
    """A checkpoint as `convert` writes it, with the trained weights and the history of how they came to be."""
    model.save_pretrained(target, max_shard_size="5GB")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_BEHIND):
            shutil.copyfile(path, target / path.name)
    done = [
        {
            "stage": result.name,
            "objective": stage.objective,
            "train": stage.train,
            "tokens": result.tokens,
            "seq_len": stage.seq_len,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
        }
        for stage, result in zip(plan, results, strict=False)
    ]
    section = {**config["dijiang"], "history": [*config["dijiang"]["history"], *done]}
    write_json(target / "config.json", {**config, "dijiang": section})
    write_code(target)
    write_card(target)
