"""The config.json of a converted checkpoint: the source's, with the classes that run it and a section ``dijiang``."""

import dataclasses
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .. import __version__
from ..architecture.examine import Architecture
from ..architecture.trace import skeleton
from ..modeling.configuration_dijiang import REQUIRES_TRANSFORMERS, Kernel
from ..modeling.modeling_dijiang import attach
from ..recipe import Recipe
from ..source.resolve import Source
from .companions import made_with, without_attention, without_code


def config_content(
    config: dict[str, Any], architecture: Architecture, recipe: Recipe, source: Source, dtype: str | None
) -> dict[str, Any]:
    """The source's config.json, with the classes that run the checkpoint and the section ``dijiang``."""
    config = without_attention(without_code(config))
    kind, model = config["model_type"], class_name(architecture.model_class, architecture.config)
    result = {**config, "architectures": [model], "model_type": f"dijiang_{kind}"}
    result["auto_map"] = {
        "AutoConfig": f"configuration_dijiang.DiJiang{type(architecture.config).__name__}",
        **{auto: f"modeling_dijiang.{name}" for auto, name in auto_classes(kind, architecture).items()},
    }
    if "AutoModelForCausalLM" in result["auto_map"]:  # `transformers serve` asks for custom code by this name alone
        result["auto_map"].setdefault("AutoModelForDecision", result["auto_map"]["AutoModelForCausalLM"])
    if dtype is not None:
        result.pop("torch_dtype", None)
        result["dtype"] = dtype
    tokenizer = TOKENIZER_MAPPING_NAMES.get(kind)  # AutoTokenizer asks by model type, and ours is new to it
    if "tokenizer_class" not in config and isinstance(tokenizer, str):
        result["tokenizer_class"] = tokenizer
    details = recipe.to_dict()
    result["dijiang"] = {
        "version": __version__,
        "requires_transformers": REQUIRES_TRANSFORMERS,
        "source": source.repo_id or source.name,
        "source_revision": source.revision,
        "license": None,
        **source.card,
        "made_with": made_with(),
        "recipe": recipe.name,
        "kernel": details["kernel"],
        "stages": details["stages"],
        "data": details["data"],
        **dataclasses.asdict(architecture.layers),
        "history": [],
    }
    return result


def class_name(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """What `modeling_dijiang` calls a converted model class: with its config's name, where that is not its own."""
    config_class, own = type(config), model_class.config_class
    return f"DiJiang{model_class.__name__}" + ("" if config_class is own else f"Of{config_class.__name__}")


def auto_classes(kind: str, architecture: Architecture) -> dict[str, str]:
    """The Auto classes that know a model type, with the class that each gives for it: one for every kind of head."""
    parts = [type(getattr(architecture.config, name)) for name in architecture.config.sub_configs]
    found = {}
    for auto, value in vars(modeling_auto).items():
        names = getattr(getattr(value, "_model_mapping", None), "_model_mapping", {})
        if not auto.startswith("AutoModel") or kind not in names:
            continue
        model_class = getattr(transformers, names[kind] if isinstance(names[kind], str) else names[kind][0])
        if model_class.config_class in parts:  # the class is of a part, whose weights have other names in the whole
            if auto != "AutoModelForCausalLM":
                continue
            model_class = architecture.model_class
        if architecture.layers.causal or _has_the_layers(model_class, architecture):
            found[auto] = class_name(model_class, architecture.config)
    if not architecture.layers.causal:
        found.pop("AutoModelForCausalLM", None)
    if getattr(type(architecture.config)(), "is_encoder_decoder", False):  # its decoder alone was converted
        found = {auto: name for auto, name in found.items() if auto == "AutoModelForCausalLM"}
    return found


def _has_the_layers(model_class: type[PreTrainedModel], architecture: Architecture) -> bool:
    """Whether the converted layers are in this class too, with its head and this config. (Encoders have many kinds of
    head, and some of them a body of their own.)"""
    try:
        attach(skeleton(model_class, architecture.config), Kernel(), architecture.layers)
    except Exception:  # the source's class refuses a config that is not for this head
        return False
    return True
