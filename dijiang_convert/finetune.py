"""`dijiang finetune`: a short distillation run that repairs what the swap lost. A checkpoint in, a checkpoint out.

The recipe's stages come from the checkpoint, where `convert` recorded them. While it runs, a folder OUT.run holds what
``resume`` needs; it goes when the result is written.
"""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint.card import write_card
from .checkpoint.companions import check_links, copy_companions, made_with, write_code
from .checkpoint.loading import (
    converted_config,
    default_device,
    generates,
    load_converted,
    load_tokenizer,
    predicts,
    silence,
    takes_images,
)
from .checkpoint.quality import EVALUATION, add_quality
from .checkpoint.shards import digest, read_checkpoint, write_json, write_trained
from .data.images import Images, image_files, image_tokens, open_images
from .data.readers import Sources, hub_names
from .data.rows import Rows, check_data
from .errors import DijiangError
from .files import check_beside, check_out, paths_of, remove_leftovers, telling_full_disk
from .measure.likeness import Likeness
from .measure.probe import (
    PROBES,
    HeldOut,
    Probe,
    first_probes,
    images_aside,
    kept_aside,
    probe,
    probe_likeness,
    read_probes,
    write_probes,
)
from .measure.report import LOG, REPORT, write_report
from .modeling.configuration_dijiang import read_section
from .progress import console, say
from .recipe import Recipe, Stage, parse_recipe
from .training import processes
from .training.checkpoints import GO_ON
from .training.estimate import StageCost, free_memory, plan_costs, told, warning
from .training.gather import corpus_of, fingerprint, gather
from .training.log import TrainingLog
from .training.plan import (
    check_context,
    check_objectives,
    extended_config,
    fit_rows,
    make_plan,
    rows_too_short,
    source_context,
)
from .training.run_folder import RunFolder
from .training.teachers import check_teachers, find_teachers
from .training.trainer import StageResult, run_stage
from .training.trial import timed


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    plan: what each stage was going to take, and free_bytes the memory there was for it. With ``dry_run`` there is
        nothing else, and the plan has the time of each stage.
    pushed: the repository's address, set by the command line's ``--push``.
    """

    out: str
    stages: list[StageResult]
    seconds: float
    plan: list[StageCost] = field(default_factory=list)
    free_bytes: int = 0
    dry_run: bool = False
    pushed: str | None = None


class Run(TypedDict, total=False):
    """How a run differs from its recipe: keyword arguments of `finetune`, which explains them."""

    tokens: int | None
    stages: Sequence[str]
    skip: Sequence[str]
    train: str | None
    seq_len: int | None
    settings: Sequence[str]
    seed: int


def finetune(
    checkpoint: str | Path | None = None,
    out: str | Path | None = None,
    *,
    data: str | Sequence[str] | None = None,
    teacher: str | None = None,
    resume: bool = False,
    force: bool = False,
    report: bool = True,
    dry_run: bool = False,
    **run: Unpack[Run],
) -> FinetuneResult:
    """Trains a converted checkpoint by its recipe.

    Args:
        checkpoint: its folder; None takes the one converted checkpoint in the current folder.
        out: by default CHECKPOINT-finetuned.
        data: a file (.txt, .md, .jsonl, .json, .csv, .parquet), a folder or glob of them, or a Hub data set; `Sources`
            of several; or the documents themselves. None takes the recipe's and its stages' own.
        teacher: the original model, needed only where the base weights were trained or changed, and it was a folder.
        resume: go on where a run with the same ``out`` stopped.
        force: replace ``out`` if it exists.
        report: sets a little text aside, measures the model on it before and after, and leaves report.html and plots.
        dry_run: tell what the run would take, timed by two steps of each stage, and write nothing.
        tokens: of all stages together; shortens or stretches each in proportion.
        stages: names of the stages to run, in this order, as often as they are named; the recipe's by default.
        skip: names of stages to leave out.
        train: "lora" or "full", for all stages but attention transfer.
        seq_len: tokens a row.
        settings: ``key=value`` for every stage, ``stage.key=value`` for one.
        seed: decides the order of the text and the start of adapters, 0 by default.

    Raises:
        DijiangError: with one line that says what is wrong and what to do.
    """
    start = time.perf_counter()
    here = processes.start()
    console.quiet = not here.is_main_process
    folder = Path(checkpoint).expanduser() if checkpoint is not None else _only_checkpoint()
    config = read_checkpoint(folder)
    section = config["dijiang"]
    whole = folder.resolve()
    target = Path(out).expanduser() if out is not None else whole.with_name(f"{whole.name}-finetuned")
    check_beside(target, folder)
    if not section["layers"]:
        raise DijiangError(f"no layer of {folder} was converted: it is its original still, convert some with --layers")
    check_links(folder)
    recipe, seed = _recipe(section), run.pop("seed", 0)
    plan = make_plan(recipe, own_data=data is None, **run)  # type: ignore[misc]  # there is no seed in it any more
    parsed = converted_config(folder)
    of_images = takes_images(parsed)
    tokenizer = None if of_images else load_tokenizer(folder)
    plan = _fitted(plan, parsed, tokenizer, run)
    teachers = find_teachers(plan, folder, section, teacher)
    check_teachers(teachers, teacher, getattr(parsed.get_text_config(), "vocab_size", 0))
    corpora = [corpus_of(stage.data, data, recipe) for stage in plan]
    if not resume:  # a resumed run has its rows, whatever has happened to the corpus
        for corpus in corpora:
            (image_files if of_images else check_data)(corpus)
    silence()
    copies = [each is not None for each in teachers]
    notes = list(rows_too_short(plan, *read_section(parsed)))
    costs, free = plan_costs(plan, parsed, copies, here.num_processes), free_memory()
    if dry_run:
        check_out(target, force, [folder, *paths_of(data), *paths_of(teacher)])
        if warning(costs, free) is None:
            costs = timed(costs, plan, folder, copies)
        say(*notes)
        return FinetuneResult(str(target), [], time.perf_counter() - start, costs, free, dry_run=True)
    options = {
        "data": [fingerprint(corpus) for corpus in corpora], "seed": seed, "teacher": teacher, "report": report,
    }  # fmt: skip
    if here.is_main_process:
        remove_leftovers(target)
    kept = RunFolder(target, plan, options, resume, force)
    if not kept.finished:
        check_out(target, force, [folder, *paths_of(data), *paths_of(teacher)])
    probes = dict[str, Probe | Likeness]()
    rows: Sequence[Rows | Images]
    total = sum(stage.tokens for stage in plan)
    try:
        with telling_full_disk(kept.folder, "free some or choose another --out"):
            kept.begin()
            if tokenizer is None:
                rows = [open_images(corpus, folder, parsed) for corpus in corpora]
                held = images_aside(open_images(corpora[-1], folder, parsed, held_out=True), total) if report else None
            else:
                texts = gather(corpora, tokenizer, plan, seed, kept, whole=not predicts(parsed))
                rows, held = texts, None
                if report:
                    aside = kept.folder / "aside.pt"
                    kept.wait_for(aside)
                    held, rows = kept_aside(aside, corpora[-1], tokenizer, texts, total)
    except DijiangError:
        if not resume:
            kept.discard()
        raise
    say(*told(costs, free), *notes)
    if held is not None and here.is_main_process:
        probes = read_probes(kept.folder / PROBES)
        if not probes and kept.latest is None:
            probes = first_probes(folder, tokenizer, held)
            with telling_full_disk(kept.folder, GO_ON):
                write_probes(kept.folder / PROBES, probes)
    here.wait_for_everyone()
    device = default_device() if here.num_processes == 1 else here.device
    if processes.is_sharded():  # the whole model may not fit a GPU
        device = torch.device("cpu")
    results = list(kept.results)
    for i, stage in enumerate(plan):
        if i < len(results):
            continue
        # Each stage starts from what the one before wrote: so a resumed run can't differ from an unbroken one.
        load = functools.partial(load_converted, kept.latest or folder, device=device)
        source = teachers[i]
        guide = None if source is None else source.load(device)
        model, result = run_stage(
            load(), stage, rows[i], teacher=guide, folder=kept.stage(i), reload=load, seed=seed + i,
            log=TrainingLog(kept.log, stage, i),
        )  # fmt: skip
        results.append(result)
        kept.record(i, results, functools.partial(_write, model, folder, config, plan, corpora, results))
        del model, guide
    kept.finish(target, force)
    if report and here.is_main_process:  # the result is safe now
        with telling_full_disk(target, GO_ON):
            _report(target, folder, tokenizer, recipe, plan, probes, held, corpora[-1])
    kept.remove()
    here.wait_for_everyone()
    return FinetuneResult(str(target), results, time.perf_counter() - start, costs, free)


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
    say(f"finetuning {found[0]}")
    return found[0]


def _recipe(section: dict[str, Any]) -> Recipe:
    keys = ("kernel", "stages", "data")
    return parse_recipe({"name": section["recipe"], **{key: section[key] for key in keys if key in section}})


def _fitted(
    plan: tuple[Stage, ...], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, run: Run
) -> tuple[Stage, ...]:
    """The stages with rows that the model can read, where the recipe says how long they are and not ``run``."""
    seq_len = run.get("seq_len")
    follows_recipe = seq_len is None and not any("seq_len" in each for each in run.get("settings", ()))
    if predicts(config):
        if follows_recipe:
            most = source_context(config)
            plan = tuple(s if s.objective == "cross_entropy" else fit_rows([s], most)[0] for s in plan)
    else:
        check_objectives(plan)
        if tokenizer is None and seq_len is not None:
            raise DijiangError(f"--seq-len {seq_len} is of no use here: an image has {image_tokens(config)} tokens")
        if tokenizer is None:
            plan = tuple(dataclasses.replace(stage, seq_len=image_tokens(config)) for stage in plan)
        elif follows_recipe:
            plan = fit_rows(plan, min(source_context(config), tokenizer.model_max_length))
    check_context(plan, config)
    return plan


def _report(
    target: Path,
    source: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    plan: Sequence[Stage],
    probes: dict[str, Probe | Likeness],
    held: HeldOut | None,
    corpus: Sequence[str],
) -> None:
    """Measures the result on the text set aside and draws what there is to see."""
    note, prompts = "", list[str]()
    if held is None:
        note = "Not measured: the run is too short, or its text too little, to set some aside."
    else:
        model, note = load_converted(target), f"{held.rows.tokens:,} tokens that no stage trained on."
        if not generates(model) or tokenizer is None:
            after: Probe | Likeness | None = probe_likeness(model, source, held)
        else:
            prompts = [str(text) for text in tokenizer.batch_decode(held.prompts)]
            after = probe(model, tokenizer, held)
        if after is not None:
            probes = {**probes, "after": after}
        if after is None or ("before" in probes and "original" not in probes and isinstance(after, Probe)):
            note += " The original is not in this checkpoint: its weights were trained before."
    names = [Path(name).name if Path(name).exists() else name for name in corpus] if isinstance(corpus, Sources) else []
    facts = {"text": ", ".join(names) or "given documents"}
    ran = {"name": recipe.name, "kernel": recipe.kernel.to_dict(), "stages": [dataclasses.asdict(s) for s in plan]}
    write_report(target, probes, prompts, ran, facts, note)
    if held is not None and "after" in probes:
        sets = hub_names(corpus)
        dataset = sets[0] if len(sets) == len(corpus) == 1 else None
        add_quality(target, "finetune", dataset, held.rows.tokens, _figures(probes))
    write_card(target)  # the card shows the plots


def _figures(probes: Mapping[str, Probe | Likeness]) -> dict[str, float]:
    """What the card tells of the probes."""
    after = probes["after"]
    if not isinstance(after, Probe):
        return dataclasses.asdict(after)
    names = {"after": "perplexity", "before": "untrained_perplexity", "original": "baseline_perplexity"}
    figures = {names[name]: each.perplexity for name, each in probes.items() if isinstance(each, Probe)}
    if "original" in probes:
        figures["perplexity_ratio"] = figures["perplexity"] / figures["baseline_perplexity"]
    return figures


def _write(
    model: PreTrainedModel | None,
    source: Path,
    config: dict[str, Any],
    plan: Sequence[Stage],
    corpora: Sequence[Sequence[str]],
    results: Sequence[StageResult],
    target: Path,
) -> None:
    """A checkpoint as `convert` writes it, with the trained weights and the history of how they came to be."""
    assert model is not None  # the main process has the model, and it alone writes
    saved = target / ".saved"
    model.save_pretrained(saved, max_shard_size="5GB")
    prefix, tied = f"{model.base_model_prefix}.", model.all_tied_weights_keys

    def aliases(name: str) -> list[str]:
        """Names that a tensor may have been saved by: some sources leave out the prefix, or hold tied weights twice."""
        names = [name, prefix + name, name.removeprefix(prefix)]
        return [*names, *(tied[name] for name in names if name in tied)]

    write_trained(target, saved, source, aliases)
    shutil.rmtree(saved)
    copy_companions(source, target, without=("config.json", LOG, REPORT, EVALUATION))
    if (source / "README.md").is_file():  # `write_card` keeps what a person wrote in it
        shutil.copyfile(source / "README.md", target / "README.md")
    done = [
        {
            "stage": result.name,
            "objective": stage.objective,
            "train": stage.train,
            "tokens": result.tokens,
            "seq_len": stage.seq_len,
            "first_loss": result.first_loss,
            "last_loss": result.last_loss,
            "datasets": hub_names(corpus),
        }
        for stage, corpus, result in zip(plan, corpora, results, strict=False)
    ]
    longest = max(stage.seq_len for stage, _ in zip(plan, results, strict=False))
    config = extended_config(config, converted_config(source), longest)
    history = [*config["dijiang"]["history"], *done]
    section = {**config["dijiang"], "made_with": made_with(), "history": history}
    if digest(source) == section.get("base_weights"):  # else something other than this tool has changed them
        section["base_weights"] = digest(target)
    write_json(target / "config.json", {**config, "dijiang": section})
    write_code(target)
    write_card(target)
