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
from .distill.data import Rows, token_rows
from .distill.run_folder import RunFolder
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
    resume: bool = False,
    push: str | None = None,
    force: bool = False,
    seed: int = 0,
) -> FinetuneResult:
    """Trains a converted checkpoint by its recipe.

    Args:
        checkpoint: its folder; None takes the one converted checkpoint in the current folder.
        out: by default CHECKPOINT-finetuned.
        data: a file (.txt, .md, .jsonl, .json, .csv, .parquet), a folder of them, a Hub data set, or the documents
            themselves; None takes the recipe's default corpus from the Hub.
        tokens: of all stages together; shortens or stretches each in proportion.
        stages: names of the stages to run; all by default.
        train: "lora" or "full", for all stages but attention transfer.
        seq_len: tokens a row.
        settings: ``key=value`` for every stage, ``stage.key=value`` for one.
        teacher: the original model, needed only where the checkpoint was trained before and its source is a folder.
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
    plan = _plan(recipe, stages, tokens, train, seq_len, settings)
    if push:
        check_repo(push)
    silence()
    options = {"data": _fingerprint(data if data is not None else recipe.data), "seed": seed, "teacher": teacher}
    run = RunFolder(target, plan, options, resume)
    if not run.finished:
        check_out(target, force)
    tokenizer = load_tokenizer(folder)
    rows = _gather(data if data is not None else recipe.data, tokenizer, plan, seed)
    run.begin()
    device = default_device() if here.num_processes == 1 else here.device
    if processes.is_sharded():  # the whole model may not fit a GPU
        device = torch.device("cpu")
    results = list(run.results)
    for i, stage in enumerate(plan):
        if i < len(results):
            continue
        # Each stage starts from what the one before wrote: so a resumed run can't differ from an unbroken one.
        load = functools.partial(load_converted, run.latest or folder, device=device)
        trained = [*config["dijiang"]["history"], *plan[:i]]
        guide = _teacher(stage, folder, config["dijiang"], trained, teacher, device)
        model, result = run_stage(
            load(), stage, rows[stage.seq_len], teacher=guide, folder=run.stage(i), reload=load, resume=resume,
            seed=seed,
        )  # fmt: skip
        results.append(result)
        run.record(i, results, functools.partial(_write, model, folder, config, plan, results))
        del model, guide
    run.finish(target, force)
    pushed = push_checkpoint(target, push).url if push and here.is_main_process else None
    here.wait_for_everyone()
    return FinetuneResult(str(target), results, time.perf_counter() - start, pushed)


def _fingerprint(data: str | Sequence[str]) -> str:
    """What tells a corpus from another: its name, or a hash of documents."""
    return data if isinstance(data, str) else hashlib.blake2b("\0".join(data).encode()).hexdigest()


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
    plan = adjust_stages(plan, settings)
    return plan if tokens is None else scale_tokens(plan, tokens)


def _gather(
    data: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, plan: Sequence[Stage], seed: int
) -> dict[int, Rows]:
    """Rows of every length in the plan. All stages draw from the same text."""
    rows = {}
    for seq_len in {stage.seq_len for stage in plan}:
        total = sum(stage.tokens for stage in plan if stage.seq_len == seq_len)
        with count_bar("reading text (tokens)", total) as advance:
            rows[seq_len] = token_rows(
                data, tokenizer, seq_len=seq_len, tokens=total, shuffle_seed=seed, progress=advance
            )
    return rows


def _teacher(
    stage: Stage,
    folder: Path,
    section: dict[str, Any],
    before: Sequence[Any],
    given: str | None,
    device: torch.device,
) -> PreTrainedModel | None:
    """The softmax model to learn from, or None where the model itself is it once adapters and kernels are off."""
    if stage.objective != "distillation":
        return None
    trains = [step["train"] if isinstance(step, dict) else step.train for step in before]
    if given is not None:
        guide = load_any(given, device)
    elif any(step["train"] != "kernel" for step in section["history"]):
        if not is_hub_id(str(section["source"])):
            raise DijiangError(
                f"{folder} was trained before, so its base weights are not the original's: "
                f"give that model with --teacher (it was {section['source']})"
            )
        guide = load_any(section["source"], device)
    elif stage.train == "lora" and all(kind == "kernel" for kind in trains):
        return None
    else:
        guide = load_converted(folder, attention="sdpa", device=device)
    return guide.eval().requires_grad_(False)  # type: ignore[return-value]


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
