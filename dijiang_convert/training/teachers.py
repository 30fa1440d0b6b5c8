"""Which model a stage of distillation learns from, and whether it has to be loaded beside the one that trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.loading import load_any, load_converted
from ..checkpoint.shards import digest, read_checkpoint
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


def holds_original(folder: Path) -> bool:
    """Whether a converted checkpoint's base weights are still its original's: no stage has trained them, and nothing
    but `convert` and `finetune` has written them."""
    section = read_checkpoint(folder)["dijiang"]
    untrained = all(step["train"] == "kernel" for step in section["history"])
    return untrained and digest(folder) == section.get("base_weights")


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
    names as the teacher. Raises DijiangError where the original can't be told.
    """
    original = holds_original(folder)
    return [
        _find_teacher(stage, folder, section, {each.train for each in plan[:i]} if original else None, given)
        for i, stage in enumerate(plan)
    ]


def _find_teacher(
    stage: Stage, folder: Path, section: dict[str, Any], trained: set[str] | None, given: str | None
) -> Teacher | None:
    """trained: what the stages before it train, None where the checkpoint no longer holds its original's weights."""
    if stage.objective != "distillation":
        return None
    if given is not None:
        return Teacher(given)
    if trained is None:
        if not is_hub_id(str(section["source"])):
            raise DijiangError(
                f"the base weights of {folder} were trained or changed, so they are not the original's: "
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
