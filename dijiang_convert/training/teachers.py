"""Which model a stage of distillation learns from, and whether it has to be loaded beside the one that trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.loading import load_any, load_converted
from ..checkpoint.shards import digest
from ..errors import DijiangError
from ..recipe import Stage
from ..source.names import is_hub_id
from ..source.resolve import read_config, resolve


def is_its_own_teacher(stage: Stage, trained: set[str]) -> bool:
    """Whether a model gives its original's logits while it trains, with adapters and kernels off: the stage must not
    train the base weights, and no stage before may have.

    trained: what the stages before trained: "kernel", "lora" or "full".
    """
    return stage.train != "full" and trained <= {"kernel"}


@dataclass(frozen=True)
class Teacher:
    """A softmax model to learn from, not loaded: a converted folder's base weights, or the original by its name."""

    name: str
    is_converted: bool = False
    revision: str | None = None

    def load(self, device: torch.device) -> PreTrainedModel:
        if self.is_converted:
            model = load_converted(self.name, attention="softmax", device=device)
        else:
            model = load_any(self.name, device, self.revision)
        return model.eval().requires_grad_(False)  # type: ignore[return-value]


def find_teachers(
    plan: Sequence[Stage], folder: Path, section: dict[str, Any], given: str | None
) -> list[Teacher | None]:
    """The model that each stage learns from, None where there is none to load.

    folder, section: the converted checkpoint and the section ``dijiang`` of its config. given: a source that the user
    names as the teacher. Raises DijiangError where the original can't be told: the checkpoint's base weights may be
    the teacher only as long as nothing but `convert` and `finetune` has written them.
    """
    before = {step["train"] for step in section["history"]}
    distills = any(stage.objective == "distillation" for stage in plan)
    if distills and given is None and before <= {"kernel"} and digest(folder) != section.get("base_weights"):
        raise DijiangError(
            f"{folder} has other base weights than `dijiang` wrote, so they may not be the original's: "
            f"give that model with --teacher (it was {section['source']})"
        )
    return [
        _find_teacher(stage, folder, section, before | {each.train for each in plan[:i]}, given)
        for i, stage in enumerate(plan)
    ]


def _find_teacher(
    stage: Stage, folder: Path, section: dict[str, Any], trained: set[str], given: str | None
) -> Teacher | None:
    if stage.objective != "distillation":
        return None
    if given is not None:
        return Teacher(given)
    if any(step["train"] != "kernel" for step in section["history"]):
        if not is_hub_id(str(section["source"])):
            raise DijiangError(
                f"{folder} was trained before, so its base weights are not the original's: "
                f"give that model with --teacher (it was {section['source']})"
            )
        return Teacher(section["source"], revision=section.get("source_revision"))
    if is_its_own_teacher(stage, trained):
        return None
    return Teacher(str(folder), is_converted=True)


def check_teachers(teachers: Sequence[Teacher | None], given: str | None, vocabulary: int) -> None:
    """Before anything that takes long, whether those with a name are there and have the same tokens, and whether one is
    given for nothing."""
    if given is not None and not any(teachers):
        raise DijiangError(f"--teacher {given} is of no use here: no stage is a distillation; leave it out")
    for name in {each.name for each in teachers if each is not None and not each.is_converted}:
        theirs = read_config(resolve(name)).get("vocab_size", vocabulary)
        if theirs != vocabulary:
            raise DijiangError(
                f"teacher {name} has a vocabulary of {theirs:,} and the checkpoint one of {vocabulary:,}: give the "
                "model that was converted, with --teacher"
            )
