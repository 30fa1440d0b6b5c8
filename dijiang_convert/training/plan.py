"""The plan of a finetune run: which stages, in which order, how long, and whether the model can follow them.

Only recipes and configs are read here; `estimate` tells what a plan costs.
"""

import copy
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import DijiangError
from ..modeling.configuration_dijiang import Kernel, Layers
from ..recipe import Recipe, Stage, adjust_stages, scale_tokens


def make_plan(
    recipe: Recipe,
    stages: Sequence[str] = (),
    skip: Sequence[str] = (),
    *,
    tokens: int | None = None,
    train: str | None = None,
    seq_len: int | None = None,
    settings: Sequence[str] = (),
    own_data: bool = True,
) -> tuple[Stage, ...]:
    """The stages to run.

    Args:
        stages: names of the stages to run, in this order, as often as they are named; by default all of the recipe.
        skip: names of stages to leave out.
        tokens: tokens of the whole plan; all stages are scaled in proportion.
        train: "lora" or "full", for all stages that train more than the kernel.
        seq_len: tokens per row, in all stages.
        settings: ``key=value`` for every stage, ``stage.key=value`` for the stages of that name.
        own_data: whether stages keep the corpora of the recipe; False where the run has a corpus of its own.

    Raises:
        DijiangError: a stage that the recipe does not have, none left to run, or settings that mean nothing.
    """
    known = [stage.name for stage in recipe.stages]
    for name in (*stages, *skip):
        if name not in known:
            raise DijiangError(f"the checkpoint's recipe has no stage {name!r}: valid are {', '.join(known)}")
    chosen = [stage for name in stages or dict.fromkeys(known) for stage in recipe.stages if stage.name == name]
    plan = tuple(stage for stage in chosen if stage.name not in skip)
    if not plan:
        remedy = "--skip leaves none of them" if chosen else "give it some"
        raise DijiangError(f"recipe {recipe.name} has no stages to run: {remedy}")
    if train is not None:
        if all(stage.train == "kernel" for stage in plan):
            kernels = ", ".join(dict.fromkeys(stage.name for stage in plan))
            raise DijiangError(f"--{train} is of no use here: {kernels} trains the kernel alone; leave it out")
        plan = tuple(s if s.train == "kernel" else dataclasses.replace(s, train=train) for s in plan)
    if seq_len is not None:
        plan = tuple(dataclasses.replace(s, seq_len=seq_len) for s in plan)
    if not own_data:
        plan = tuple(dataclasses.replace(s, data=None) for s in plan)
    plan = adjust_stages(plan, settings)
    return plan if tokens is None else scale_tokens(plan, tokens)


def check_context(plan: Sequence[Stage], config: Any) -> None:
    """Checks that no stage has longer rows than the model can take.

    config: the config of the converted checkpoint, as transformers parses it.

    Raises:
        DijiangError: a stage learns from the softmax model beyond that model's context, or its rows reach beyond the
            positions of a model that has learned them one by one, as OPT and GPT-2 have.
    """
    context = source_context(config)
    for stage in plan:
        if stage.seq_len <= context:
            continue
        where = f"stage {stage.name}: seq_len {stage.seq_len} is beyond"
        if stage.objective != "cross_entropy":
            raise DijiangError(
                f"{where} the original's context of {context}, and {stage.objective} learns from the original: "
                f"--set {stage.name}.seq_len={context}, or take objective cross_entropy"
            )
        if not has_rotary_positions(config):
            kind = config.model_type.removeprefix("dijiang_")
            raise DijiangError(
                f"{where} the {context} positions that {kind} has learned: --set {stage.name}.seq_len={context}"
            )


def held_whole(kernel: Kernel, layers: Layers) -> int:
    """How long a text may be for the table of every head to hold all of its keys; 0 without exact rows."""
    memory = min((rows for layer in layers.memory for rows in layer), default=kernel.memory)
    return kernel.sinks + memory + kernel.window if kernel.window and layers.causal else 0


def rows_too_short(plan: Sequence[Stage], kernel: Kernel, layers: Layers) -> Iterator[str]:
    """A line for each stage that learns from the original on rows which the table of every head holds whole, so that
    the converted model gives what the original gives already."""
    held = held_whole(kernel, layers)
    for stage in plan:
        if stage.objective != "cross_entropy" and stage.seq_len <= held:
            yield (
                f"warning: stage {stage.name} has rows of {stage.seq_len:,} tokens, and the table holds {held:,}: "
                "there is nothing to learn; take longer rows, or convert with a smaller memory"
            )


def fit_rows(plan: Sequence[Stage], context: int) -> tuple[Stage, ...]:
    """The stages with rows of at most ``context`` tokens: recipes are written without knowing a model's context."""
    return tuple(dataclasses.replace(stage, seq_len=min(stage.seq_len, context)) for stage in plan)


def check_objectives(plan: Sequence[Stage]) -> None:
    """Raises DijiangError for stages that train on the next token. Call it for models that don't predict it."""
    for stage in plan:
        if stage.objective == "cross_entropy" or stage.cross_entropy_weight:
            what = "objective cross_entropy" if stage.objective == "cross_entropy" else "cross_entropy_weight"
            raise DijiangError(f"stage {stage.name}: {what} needs a model that predicts the next token: leave it out")


def source_context(config: Any) -> int:
    """The context of the original in tokens, stretched by its rope scaling; sys.maxsize if its config names none."""
    recorded = config.dijiang.get("source_context")
    if recorded is not None:
        return recorded
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return sys.maxsize
    scaled = [
        int(rope["factor"] * (rope.get("original_max_position_embeddings") or context))
        for rope in _rope_sections(getattr(config, "rope_parameters", None))
        if rope.get("factor")
    ]
    return max(context, *scaled) if scaled else context


def has_rotary_positions(config: Any) -> bool:
    """Whether attention rotates queries and keys. Other decoders that convert learn positions, up to a last one."""
    return bool(config.dijiang["rotates"])


def extended_config(content: Mapping[str, Any], config: Any, seq_len: int) -> dict[str, Any]:
    """config.json after training on rows of ``seq_len`` tokens: the context grows, and rotary tables stay as they are.

    Some rope types derive their tables from max_position_embeddings where nothing else is given. For these, the values
    that have been used so far are written down. (Dynamic scaling always derives its tables, and is not converted.)

    Args:
        content: config.json before training.
        config: the same config, as transformers parses it.
    """
    result = dict(content)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    parameters = copy.deepcopy(getattr(config, "rope_parameters", None))
    ropes = _rope_sections(parameters)
    if context is None or seq_len <= context:
        return result
    result[config.attribute_map.get("max_position_embeddings", "max_position_embeddings")] = seq_len
    result["dijiang"] = {**result["dijiang"], "source_context": source_context(config)}
    derived = [rope for rope in ropes if _rope_type(rope) in ("llama3", "yarn", "longrope")]
    for rope in derived:
        original = rope.setdefault("original_max_position_embeddings", context)
        if rope.get("factor") is None:
            rope["factor"] = context / original
    if derived:
        result.pop("rope_scaling", None)
        result["rope_parameters"] = parameters
    return result


def _rope_sections(parameters: Any) -> list[dict[str, Any]]:
    """The sections of rope_parameters: one for all layers, or one for each kind of layer."""
    if not parameters:
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
