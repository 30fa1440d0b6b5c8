"""Recipes: which kernel replaces softmax attention, and how to train it. Recipes are YAML files, checked when read.

A recipe has a kernel (see `modeling.configuration_dijiang.Kernel`), a default corpus, and a list of stages. Whether a
model can follow a recipe is checked elsewhere.
"""

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .errors import DijiangError
from .files import RECIPES, read_yaml
from .kernel_keys import OF_THE_STATE
from .modeling.configuration_dijiang import Kernel

OBJECTIVES = ("attention_transfer", "distillation", "cross_entropy")
TRAIN = ("kernel", "lora", "full")
Data = str | list  # the name of one corpus, or a list of names


@dataclass(frozen=True)
class Stage:
    """One training stage. Raises DijiangError for values that are not valid.

    objective: "attention_transfer" (each layer learns its softmax output, and only the kernel trains), "distillation"
        (KL to the softmax model's logits) or "cross_entropy" (next-token loss).
    tokens: tokens that the stage trains on.
    train: "kernel" (nothing else), "lora" (kernel and adapters) or "full" (the whole model).
    seq_len: tokens per row. batch_tokens: tokens per optimizer step, at most.
    learning_rate: of LoRA or the full model, for hidden_size 1024. kernel_learning_rate: of the kernel's parameters.
    warmup: share of the steps in which the rates rise.
    lora_targets: "attention" for its projections, or "all" linear layers.
    cross_entropy_weight: share of next-token loss mixed into distillation, from 0 to 1.
    data: the stage's own corpora, in place of the recipe's.
    """

    name: str
    objective: str
    tokens: int
    train: str = "kernel"
    seq_len: int = 2048
    batch_tokens: int = 16384
    learning_rate: float = 2e-4
    kernel_learning_rate: float = 1e-2
    warmup: float = 0.05
    weight_decay: float = 0.0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_targets: str = "attention"
    cross_entropy_weight: float = 0.0
    data: Data | None = None

    def __post_init__(self) -> None:
        _check_types(self, f"stage {self.name}")
        if not self.name.isprintable() or re.search(r"[/\\:]", self.name) or self.name in ("", ".", ".."):
            raise DijiangError(f"stage {self.name}: its name is that of a folder, too: leave out / \\ and :")
        if self.data is not None:
            _check_data(self.data, f"stage {self.name}")
        if self.objective not in OBJECTIVES:
            near = _nearest(self.objective, OBJECTIVES)
            raise DijiangError(f"stage {self.name}: no objective {self.objective!r}{near}")
        if self.train not in TRAIN:
            raise DijiangError(f"stage {self.name}: train is {self.train!r}{_nearest(self.train, TRAIN)}")
        if self.lora_targets not in ("attention", "all"):
            raise DijiangError(f"stage {self.name}: lora_targets is {self.lora_targets!r}: give attention or all")
        if self.objective == "attention_transfer" and self.train != "kernel":
            raise DijiangError(f"stage {self.name}: attention_transfer trains the kernel alone: set train: kernel")
        for key in ("tokens", "seq_len", "batch_tokens", "lora_rank"):
            if getattr(self, key) < 1:
                raise DijiangError(f"stage {self.name}: {key} is {getattr(self, key)}: give at least 1")
        for key in ("learning_rate", "kernel_learning_rate", "weight_decay"):
            if not 0 <= getattr(self, key) < math.inf:
                raise DijiangError(f"stage {self.name}: {key} is {getattr(self, key)}: give 0 or more")
        for key in ("warmup", "cross_entropy_weight"):
            if not 0 <= getattr(self, key) <= 1:
                raise DijiangError(f"stage {self.name}: {key} is {getattr(self, key)}: give a share from 0 to 1")


@dataclass(frozen=True)
class Recipe:
    """A kernel and how to train it. Raises DijiangError for values that are not valid.

    data: the corpus for a user who names none, or a list of several. Each is a Hub data set (``owner/name`` or
        ``owner/name:config``), a file, a folder or a glob, with ``@weight`` behind it for more or less than an equal
        share of the tokens.
    """

    name: str
    kernel: Kernel
    stages: tuple[Stage, ...]
    description: str = ""
    data: Data = "HuggingFaceFW/fineweb-edu:sample-10BT"

    def __post_init__(self) -> None:
        for key in ("name", "description"):
            if not isinstance(getattr(self, key), str):
                raise DijiangError(f"recipe: {key} is {getattr(self, key)!r}, not str")
        _check_data(self.data, "recipe")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stages": [asdict(stage) for stage in self.stages]}


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Reads a recipe by name or from a YAML file, and applies ``key=value`` settings of the kernel.

    Raises DijiangError: no such recipe, an unknown key (the nearest valid one is named), or a bad value.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            raise DijiangError(f"no recipe {name!r}{_nearest(name, recipe_names())}; or give a .yaml file")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DijiangError(f"no such recipe file: {name}") from None
    except OSError as error:
        raise DijiangError(f"can't read recipe {name}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or an impossible date
        raise DijiangError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise DijiangError(f"recipe {path} is not a mapping: start it with 'kernel:' and 'stages:'")
    content = {"name": path.stem, **content}
    kernel, changes = content.get("kernel", {}), parse_settings(settings)
    if isinstance(kernel, Mapping):
        content["kernel"] = {**kernel, **changes}
        named = [*changes, *(kernel if kernel.get("far") is False else ())]  # --set may take a recipe's state away
        unused = [key for key in named if key in OF_THE_STATE]
        if unused and content["kernel"].get("far") is False:
            raise DijiangError(
                f"kernel.{unused[0]} is of the state, which recipe {path.stem} has not: take --recipe frequency, "
                "or add --set far=true"
            )
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as YAML files and a checkpoint's config hold it. Raises DijiangError."""
    known = [field.name for field in fields(Recipe)]
    _check_keys(content, known, "recipe")
    stages = content.get("stages", [])
    if not isinstance(stages, (list, tuple)):
        raise DijiangError(f"recipe: stages is {stages!r}: give a list")
    stages = tuple(_build(Stage, stage, _stage_name(stage)) for stage in stages)
    kernel = _build(Kernel, content.get("kernel", {}), "kernel")
    return _build(Recipe, {**content, "kernel": kernel, "stages": stages}, "recipe")


def _stage_name(stage: Any) -> str:
    return f"stage {stage.get('name', '?')}" if isinstance(stage, Mapping) else "a stage"


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["window=16", "rotary=keep"]`` → {"window": 16, "rotary": "keep"}, with values read as YAML.

    Raises DijiangError for a setting of another form.
    """
    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise DijiangError(f"--set {setting!r} is not of the form key=value")
        try:
            values[key.strip()] = _number(read_yaml(value))
        except (yaml.YAMLError, ValueError):
            raise DijiangError(f"--set {setting!r}: {value!r} is not a value") from None
    return values


def adjust_stages(stages: Iterable[Stage], settings: Iterable[str]) -> tuple[Stage, ...]:
    """Applies ``key=value`` to every stage, or ``stage.key=value`` to the stage of that name. Raises DijiangError."""
    stages = list(stages)
    for key, value in parse_settings(settings).items():
        stage_name, _, field = key.rpartition(".")
        if field in [f.name for f in fields(Kernel)]:
            raise DijiangError(f"{field} is a key of the kernel: dijiang convert --set {field}={value} sets it")
        if stage_name and stage_name not in [stage.name for stage in stages]:
            raise DijiangError(f"no stage {stage_name!r}{_nearest(stage_name, [stage.name for stage in stages])}")
        _check_keys({field: value}, [f.name for f in fields(Stage)], "stage")
        stages = [replace(s, **{field: value}) if stage_name in ("", s.name) else s for s in stages]
    return tuple(stages)


def scale_tokens(stages: Iterable[Stage], tokens: int) -> tuple[Stage, ...]:
    """The stages scaled in proportion, to ``tokens`` in all. Each keeps at least one row."""
    stages = tuple(stages)
    total = sum(stage.tokens for stage in stages)
    return tuple(replace(s, tokens=max(round(s.tokens * tokens / total), s.seq_len)) for s in stages)


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise DijiangError(f"{where} must be a mapping of keys to values, not {values!r}")
    _check_keys(values, [field.name for field in fields(cls)], where)
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
    if missing:
        raise DijiangError(f"{where} lacks {', '.join(missing)}")
    texts = [field.name for field in fields(cls) if field.type in (str, Data, Data | None)]
    try:
        return cls(**{key: value if key in texts else _number(value) for key, value in values.items()})
    except ValueError as error:  # `Kernel` raises it, with its own message
        raise DijiangError(str(error)) from None


def _number(value: Any) -> Any:
    """The number that a text holds, if it does: YAML 1.1 reads 1e-3 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_keys(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise DijiangError(f"{where} has no key {key!r}{_nearest(str(key), known)}")


def _check_types(record: Any, where: str) -> None:
    for field in fields(record):
        value, kind = getattr(record, field.name), field.type
        good = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)  # type: ignore[arg-type]
        if not good or isinstance(value, bool):
            raise DijiangError(f"{where}: {field.name} is {value!r}, not {getattr(kind, '__name__', 'text or a list')}")


def _check_data(data: Any, where: str) -> None:
    names = data if isinstance(data, list) else [data]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DijiangError(f"{where}: data is {data!r}: give the name of a corpus, or a list of names")


def _nearest(word: str, words: Iterable[str]) -> str:
    """The end of an error message: `: did you mean …?`, or all valid words."""
    words = list(words)
    close = difflib.get_close_matches(word[:100], words, 1, cutoff=0.5)  # the time grows with the square of its length
    return f": did you mean {close[0]}?" if close else f": valid are {', '.join(words)}"
