"""The plan of a finetune run: which stages, in which order, how long, and whether the model can follow them."""

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DijiangError
from ..recipe import Recipe, Stage, adjust_stages, scale_tokens


def make_plan(
    recipe: Recipe,
    names: Sequence[str] = (),
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
        names: of the stages, in the order to run them, as often as they are named; the recipe's own order by default.
        skip: names of stages to leave out.
        tokens: of the whole plan; shortens or stretches its stages in proportion.
        train: "lora" or "full", for all stages that train more than the kernel.
        seq_len: tokens a row, in all stages.
        settings: ``key=value`` for every stage, ``stage.key=value`` for those of that name.
        own_data: False where a corpus is given for the run: then stages don't read their own.

    Raises:
        DijiangError: a stage that the recipe does not have, none left to run, or settings that mean nothing.
    """
    known = [stage.name for stage in recipe.stages]
    for name in (*names, *skip):
        if name not in known:
            raise DijiangError(f"the checkpoint's recipe has no stage {name!r}: valid are {', '.join(known)}")
    chosen = [stage for name in names or dict.fromkeys(known) for stage in recipe.stages if stage.name == name]
    plan = tuple(stage for stage in chosen if stage.name not in skip)
    if not plan:
        remedy = "--skip leaves none of them" if chosen else "give it some"
        raise DijiangError(f"recipe {recipe.name} has no stages to run: {remedy}")
    if train is not None:
        if all(stage.train == "kernel" for stage in plan):
            names = ", ".join(dict.fromkeys(stage.name for stage in plan))
            raise DijiangError(f"--{train} is of no use here: {names} trains the kernel alone; leave it out")
        plan = tuple(s if s.train == "kernel" else dataclasses.replace(s, train=train) for s in plan)
    if seq_len is not None:
        plan = tuple(dataclasses.replace(s, seq_len=seq_len) for s in plan)
    if not own_data:
        plan = tuple(dataclasses.replace(s, data=None) for s in plan)
    plan = adjust_stages(plan, settings)
    return plan if tokens is None else scale_tokens(plan, tokens)


def check_context(plan: Sequence[Stage], config: Any) -> None:
    """Whether rows are as long as the model can take them.

    config: the converted checkpoint's, as transformers parses it.

    Raises:
        DijiangError: a stage that learns from the softmax model beyond that model's context, or one whose rows reach
            beyond positions that are learned, as those of OPT and GPT-2.
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


def fit_rows(plan: Sequence[Stage], context: int) -> tuple[Stage, ...]:
    """The stages with rows no longer than ``context``, which recipes don't know."""
    return tuple(dataclasses.replace(stage, seq_len=min(stage.seq_len, context)) for stage in plan)


def check_objectives(plan: Sequence[Stage]) -> None:
    """Raises DijiangError for stages that train on the next token, which not every model predicts."""
    for stage in plan:
        if stage.objective == "cross_entropy" or stage.cross_entropy_weight:
            what = "objective cross_entropy" if stage.objective == "cross_entropy" else "cross_entropy_weight"
            raise DijiangError(f"stage {stage.name}: {what} needs a model that predicts the next token: leave it out")


def source_context(config: Any) -> int:
    """Tokens that the original takes: what its config says, or what its rope scaling stretches that to."""
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
    """Whether attention rotates queries and keys. Other decoders here learn their positions, up to a last one."""
    return bool(config.dijiang["rotates"])


def extended_config(content: Mapping[str, Any], config: Any, seq_len: int) -> dict[str, Any]:
    """config.json after training on rows of ``seq_len``: it names the longer context, and rotary tables stay.

    Some rope types derive their tables from max_position_embeddings where nothing else is given: the values that they
    took so far are written down for them. (Dynamic scaling, which always does, is not converted.)

    Args:
        content: config.json as it is.
        config: the same, as transformers parses it.
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
    """One section, or one a kind of layer."""
    if not parameters:
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
