"""`dijiang finetune`: a short distillation run that repairs what the swap lost. A checkpoint in, a checkpoint out.

The recipe's stages come from the checkpoint, where `convert` recorded them. While it runs, a folder OUT.run holds what
``resume`` needs; it goes when the result is written.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import write_card
from .checkpoint import check_out, new_folder, read_checkpoint, write_json
from .convert import LEFT_BEHIND, write_code
from .distill.data import Rows, token_rows
from .distill.log import TrainingLog
from .distill.trainer import StageResult, run_stage
from .errors import DijiangError
from .estimate import StageCost, free_memory, plan_costs, teacher_copies, timed, told, warning
from .models import converted_config, load_any, load_converted, load_tokenizer, silence
from .plan import check_context, extended_config, make_plan
from .probe import PROBES, HeldOut, Probe, first_probes, hold_out, probe, read_probes, write_probes
from .progress import console, count_bar
from .push import check_repo
from .push import push as push_checkpoint
from .recipe import Recipe, Stage, parse_recipe
from .report import LOG, REPORT, write_report
from .sources import is_hub_id


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did. plan: what it was going to take, and free_bytes of memory that there were; with ``dry_run``
    there is nothing else, but the time is estimated."""

    out: str
    stages: list[StageResult]
    seconds: float
    pushed: str | None = None
    plan: list[StageCost] = field(default_factory=list)
    free_bytes: int = 0
    dry_run: bool = False


def finetune(
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    *,
    data: str | Sequence[str] | None = None,
    tokens: int | None = None,
    stages: Sequence[str] = (),
    skip: Sequence[str] = (),
    train: str | None = None,
    seq_len: int | None = None,
    settings: Sequence[str] = (),
    teacher: str | None = None,
    resume: bool = False,
    push: str | None = None,
    force: bool = False,
    report: bool = True,
    dry_run: bool = False,
    seed: int = 0,
) -> FinetuneResult:
    """Trains a converted checkpoint by its recipe.

    Args:
        checkpoint: its folder; None takes the one converted checkpoint in the current folder.
        out: by default CHECKPOINT-finetuned.
        data: a file (.txt, .md, .jsonl, .json, .csv, .parquet), a folder of them, a Hub data set, or the documents
            themselves; None takes the recipe's default corpus from the Hub.
        tokens: of all stages together; shortens or stretches each in proportion.
        stages: names of the stages to run, in this order, as often as they are named; the recipe's by default.
        skip: names of stages to leave out.
        train: "lora" or "full", for all stages but attention transfer.
        seq_len: tokens a row.
        settings: ``key=value`` for every stage, ``stage.key=value`` for one.
        teacher: the original model, needed only where the checkpoint was trained before and its source is a folder.
        resume: go on where a run with the same ``out`` stopped.
        push: a Hub repository to push the result to.
        report: sets a little text aside, measures the model on it before and after, and leaves report.html and plots.
        dry_run: tell what the run would take, timed by two steps of each stage, and write nothing.

    Raises:
        DijiangError: with one line that says what is wrong and what to do.
    """
    start = time.perf_counter()
    folder = Path(checkpoint).expanduser() if checkpoint is not None else _only_checkpoint()
    config = read_checkpoint(folder)
    target = Path(out) if out is not None else folder.with_name(f"{folder.resolve().name}-finetuned")
    recipe = _recipe(config["dijiang"])
    plan = make_plan(recipe, stages, skip, tokens=tokens, train=train, seq_len=seq_len, settings=settings)
    parsed = converted_config(folder)
    check_context(plan, parsed)
    check_out(target, force)
    if push:
        check_repo(push)
    silence()
    copies = teacher_copies(plan, [step["train"] for step in config["dijiang"]["history"]], teacher is not None)
    costs, free = plan_costs(plan, parsed, copies), free_memory()
    if dry_run:
        if warning(costs, free) is None:
            costs = timed(costs, plan, folder, copies)
        return FinetuneResult(str(target), [], time.perf_counter() - start, None, costs, free, dry_run=True)
    run = _Run(target, plan, resume)
    tokenizer = load_tokenizer(folder)
    rows = _gather(data if data is not None else recipe.data, tokenizer, plan, seed)
    held = None
    if report:
        corpus = data if data is not None else recipe.data
        held, left = hold_out(corpus, tokenizer, list(rows.values()), sum(stage.tokens for stage in plan))
        rows = dict(zip(rows, left, strict=True))
    console.print(*told(costs, free), sep="\n", soft_wrap=True, highlight=False)
    run.begin()
    probes = read_probes(run.folder / PROBES)
    if held is not None and not probes and run.latest is None:
        probes = first_probes(folder, tokenizer, held)
        write_probes(run.folder / PROBES, probes)
    model = load_converted(run.latest or folder)
    results = list(run.results)
    for i, stage in enumerate(plan):
        if i < len(results):
            continue
        guide = _teacher(stage, model, folder, config["dijiang"], [*config["dijiang"]["history"], *plan[:i]], teacher)
        model, result = run_stage(
            model,
            stage,
            rows[stage.seq_len],
            teacher=guide,
            folder=run.stage(i),
            resume=resume,
            seed=seed + i,
            log=TrainingLog(run.folder / LOG, stage, i),
        )
        results.append(result)
        if i + 1 < len(plan):
            run.record(i, results, lambda path: _write(path, model, folder, config, plan, results))  # noqa: B023
    with new_folder(target, force) as new:
        _write(new, model, folder, config, plan, results)
        run.move_logs(new)
    if report:  # once the result is safe
        _report(target, tokenizer, recipe, plan, probes, held, data)
    run.remove()
    pushed = push_checkpoint(target, push).url if push else None
    return FinetuneResult(str(target), results, time.perf_counter() - start, pushed, costs, free)


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


def _report(
    target: Path,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    plan: Sequence[Stage],
    probes: dict[str, Probe],
    held: HeldOut | None,
    data: str | Sequence[str] | None,
) -> None:
    """Measures the result on the text set aside and draws what there is to see."""
    note, prompts = "", list[str]()
    if held is None:
        note = "Not measured: the run is too short, or its text too little, to set some aside."
    else:
        prompts = [str(text) for text in tokenizer.batch_decode(held.prompts)]
        probes = {**probes, "after": probe(load_converted(target), tokenizer, held)}
        note = f"{held.rows.tokens:,} tokens that no stage trained on."
        if "before" in probes and "original" not in probes:
            note += " The original is not in this checkpoint: its weights were trained before."
    name = data if data is not None else recipe.data
    facts = {"text": (Path(name).name if Path(name).exists() else name) if isinstance(name, str) else "given documents"}
    ran = {"name": recipe.name, "kernel": recipe.kernel.to_dict(), "stages": [dataclasses.asdict(s) for s in plan]}
    write_report(target, probes, prompts, ran, facts, note)
    write_card(target)  # which shows the plots


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
    model: PreTrainedModel,
    folder: Path,
    section: dict[str, Any],
    before: Sequence[Any],
    given: str | None,
) -> PreTrainedModel | None:
    """The softmax model to learn from, or None where the model itself is it once adapters and kernels are off."""
    if stage.objective != "distillation":
        return None
    trains = [step["train"] if isinstance(step, dict) else step.train for step in before]
    if given is not None:
        guide = load_any(given, model.device)
    elif any(step["train"] != "kernel" for step in section["history"]):
        if not is_hub_id(str(section["source"])):
            raise DijiangError(
                f"{folder} was trained before, so its base weights are not the original's: "
                f"give that model with --teacher (it was {section['source']})"
            )
        guide = load_any(section["source"], model.device)
    elif stage.train == "lora" and all(kind == "kernel" for kind in trains):
        return None
    else:
        guide = load_converted(folder, attention="sdpa", device=model.device)
    return guide.eval().requires_grad_(False)  # type: ignore[return-value]


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

    def record(self, index: int, results: list[StageResult], write: Any) -> None:
        """Keeps the model after a stage; what came before it is no longer needed."""
        with new_folder(self.folder / f"after-{index}", force=True) as folder:
            write(folder)
            write_json(folder / "results.json", [dataclasses.asdict(result) for result in results])
        shutil.rmtree(self.folder / f"after-{index - 1}", ignore_errors=True)
        for checkpoint in self.stage(index).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)

    def move_logs(self, target: Path) -> None:
        """The training log, and TensorBoard's files to runs/STAGE in the result; `push` leaves them at home."""
        if (self.folder / LOG).is_file():
            shutil.copyfile(self.folder / LOG, target / LOG)
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
        of_a_run = path.name in (LOG, REPORT)
        if path.is_file() and not of_a_run and not path.name.startswith(".") and not path.name.endswith(LEFT_BEHIND):
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
    longest = max(stage.seq_len for stage, _ in zip(plan, results, strict=False))
    config = extended_config(config, converted_config(source), longest)
    section = {**config["dijiang"], "history": [*config["dijiang"]["history"], *done]}
    write_json(target / "config.json", {**config, "dijiang": section})
    write_code(target)
    write_card(target)
