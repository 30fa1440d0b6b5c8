"""`dijiang finetune`: a short distillation run that repairs what the swap lost. A checkpoint in, a checkpoint out.

The recipe's stages come from the checkpoint, where `convert` recorded them. While it runs, a folder OUT.run holds what
``resume`` needs; it goes when the result is written.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import write_card
from .checkpoint import check_out, read_checkpoint, write_json
from .convert import LEFT_BEHIND, write_code
from .distill import processes
from .distill.corpus import Sources
from .distill.data import Rows, check_data, token_rows
from .distill.run_folder import RunFolder
from .distill.teacher_cache import CachedRows
from .distill.teacher_cache import cache_teacher as write_cache
from .distill.trainer import StageResult, run_stage
from .errors import DijiangError
from .models import default_device, load_any, load_converted, load_tokenizer, silence
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
    here = processes.start()
    console.quiet = not here.is_main_process
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
    if push:
        check_repo(push)
    silence()
    options = {
        "data": [_fingerprint(corpus) for corpus in corpora], "seed": seed, "teacher": teacher,
        "cache_teacher": cache_teacher,
    }  # fmt: skip
    run = RunFolder(target, plan, options, resume)
    if not run.finished:
        check_out(target, force)
    tokenizer = load_tokenizer(folder)
    run.begin()
    try:
        rows = _gather(corpora, tokenizer, plan, seed, run)
    except DijiangError:
        if not resume:
            run.discard()
        raise
    device = default_device() if here.num_processes == 1 else here.device
    if processes.is_sharded():  # the whole model may not fit a GPU
        device = torch.device("cpu")
    results = list(run.results)
    for i, stage in enumerate(plan):
        if i < len(results):
            continue
        # Each stage starts from what the one before wrote: so a resumed run can't differ from an unbroken one.
        load = functools.partial(load_converted, run.latest or folder, device=device)
        text: Rows | CachedRows = rows[i]
        source, guide = teachers[i], None
        if source is not None and cache_teacher is not None:
            run.wait_for(run.cache(i))
            text = write_cache(
                rows[i], -(-stage.tokens // stage.seq_len), functools.partial(source.load, device), top=cache_teacher,
                folder=run.cache(i), name=source.name,
            )  # fmt: skip
        elif source is not None:
            guide = source.load(device)
        model, result = run_stage(
            load(), stage, text, teacher=guide, folder=run.stage(i), reload=load, resume=resume, seed=seed
        )
        results.append(result)
        run.record(i, results, functools.partial(_write, model, folder, config, plan, results))
        del model, guide
    run.finish(target, force)
    pushed = push_checkpoint(target, push).url if push and here.is_main_process else None
    here.wait_for_everyone()
    return FinetuneResult(str(target), results, time.perf_counter() - start, pushed)


def _fingerprint(corpus: Sequence[str]) -> str:
    """What tells a corpus from another: its names, or a hash of documents."""
    return " ".join(corpus) if isinstance(corpus, Sources) else hashlib.blake2b("\0".join(corpus).encode()).hexdigest()


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
    run: RunFolder,
) -> list[Rows]:
    """Rows for every stage, kept in the run's folder: one process writes them there, the others open them.

    Stages of one corpus and row length share one reading of it, each with rows of its own.
    """
    groups: dict[tuple[type, Sequence[str], int], list[int]] = {}
    for i, (corpus, stage) in enumerate(zip(corpora, plan, strict=True)):
        groups.setdefault((type(corpus), corpus, stage.seq_len), []).append(i)
    rows: dict[int, Rows] = {}
    for number, ((_, corpus, seq_len), members) in enumerate(groups.items()):
        counts = [max(-(-plan[i].tokens // seq_len), 1) for i in members]
        total = sum(counts) * seq_len
        kept = run.folder / f"rows-{number}"
        run.wait_for(kept)
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

    def load(self, device: torch.device) -> PreTrainedModel:
        if self.is_converted:
            model = load_converted(self.name, attention="sdpa", device=device)
        else:
            model = load_any(self.name, device)
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


def _write(
    model: PreTrainedModel | None,
    source: Path,
    config: dict[str, Any],
    plan: Sequence[Stage],
    results: Sequence[StageResult],
    target: Path,
) -> None:
    """A checkpoint as `convert` writes it, with the trained weights and the history of how they came to be."""
    assert model is not None  # on the main process, which alone writes
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
