"""Whether a model converts, by its config.json alone: which of its layers a kernel can replace, and their shape."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from ..errors import DijiangError, Unsupported
from ..modeling.attention import DiJiangAttention
from ..modeling.configuration_dijiang import Kernel, Layers
from ..modeling.modeling_dijiang import attach
from .trace import FOLLOWERS, Notes, first_line, skeleton

# By model type, text models first; the others take images, sound or film as well, and their text part converts.
LANGUAGE_MODELS = (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Architecture:
    """A source that converts.

    model_class: of the source's weights, with the head that they have.
    layers: what a kernel would replace; parameters: how many numbers the model has.
    rotary_removable: whether there is no rotary embedding, or one that the kernel can undo in all these layers.
    has_sinks: whether each head has a logit that takes its share of the weights (attention sinks).
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    layers: Layers
    parameters: int
    rotary_removable: bool
    has_sinks: bool

    @property
    def recipe(self) -> str:
        """The recipe that it gets where none is asked for."""
        return "default" if self.layers.causal else "encoder"

    def new_tensors(self, kernel: Kernel) -> dict[str, torch.Tensor]:
        """Every tensor that a conversion adds, initialised, under the name the checkpoint gives it. What starts at
        random follows the kernel's seed: converting twice gives the same bytes."""
        tensors: dict[str, torch.Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(kernel.seed)
            for name in attach(self._skeleton(), kernel, self.layers):
                child = DiJiangAttention(kernel, self.layers, None)
                child.reset_parameters()
                tensors |= {f"{name}.dijiang.{key}": value for key, value in child.state_dict().items()}
        return tensors

    def _skeleton(self) -> PreTrainedModel:
        return skeleton(self.model_class, self.config)


def examine(config: dict[str, Any], layers: str = "all") -> Architecture:
    """Finds the attention that the kernel replaces in a model with this config.json.

    Raises Unsupported with the true reason where it can't be, and DijiangError for a bad ``layers``.
    """
    model_class, parsed = _classes(config)
    if not model_class._can_set_attn_implementation():
        raise Unsupported(f"{parsed.model_type} does not route its attention through AttentionInterface: {FOLLOWERS}")
    parsed._attn_implementation = "eager"
    try:
        model = skeleton(model_class, parsed)
    except Exception as error:
        raise Unsupported(f"{parsed.model_type} can't be built from this config ({first_line(error)})") from error
    seen = Notes(model.bfloat16())  # grouped expert kernels take no other type on the meta device
    seen.run()
    found = seen.layers(layers)
    parsed._attn_implementation = "eager"
    parameters = sum(p.numel() for p in model.parameters())
    picked = seen.of(found)
    return Architecture(
        model_class, parsed, found, parameters, seen.rotary_removable(found),
        has_sinks=any(call.arguments.get("s_aux") is not None for call in picked),
    )  # fmt: skip


def _classes(config: dict[str, Any]) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    kind = str(config.get("model_type"))
    if "dijiang" in config or kind.startswith("dijiang_"):
        raise DijiangError("the model is converted already: go on with dijiang finetune")
    if config.get("is_encoder_decoder"):
        raise Unsupported(f"{kind} is an encoder-decoder: only decoders and encoders are converted")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise Unsupported(f"the weights are quantised ({method}): convert the unquantised model instead")
    if config.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"{kind} comes with its own code: only architectures that transformers has are converted")
    if kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"transformers {transformers.__version__} knows no model type {kind!r}: a newer one may")
    known = [names[kind] for names in (*LANGUAGE_MODELS, MODEL_MAPPING_NAMES) if isinstance(names.get(kind), str)]
    name = (config.get("architectures") or [*known, "none"])[0]
    model_class = getattr(transformers, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise Unsupported(f"transformers {transformers.__version__} has no model class {name!r}: a newer one may")
    if name not in known and model_class.config_class is not transformers.CONFIG_MAPPING[kind]:
        raise Unsupported(f"{name} is no model of type {kind}: its config.json was put together from two models")
    if model_class.main_input_name not in ("input_ids", "pixel_values"):
        raise Unsupported(f"{name} takes {model_class.main_input_name}: only models of text and images are converted")
    try:
        parsed = transformers.CONFIG_MAPPING[kind].from_dict(PreTrainedConfig._decode_special_floats(config))
    except Exception as error:
        raise DijiangError(f"config.json is not valid for {kind} ({first_line(error)}): get the model again") from None
    return model_class, parsed


def check_kernel(kernel: Kernel, architecture: Architecture) -> None:
    """Raises Unsupported where this kernel can't do what these layers need."""
    kind = architecture.config.model_type
    if kernel.far and kernel.rotary == "remove" and not architecture.rotary_removable:
        raise Unsupported(
            f"the kernel can't undo the rotary embedding of these layers of {kind}: "
            "--set rotary=keep leaves it in the far features, --layers chooses others"
        )
    if architecture.has_sinks and kernel.window == 0:
        raise Unsupported(
            f"the attention sinks of {kind} need a window: take a recipe that has one, or --set window=64"
        )
