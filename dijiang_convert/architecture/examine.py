"""Whether a model converts, by its config.json alone: which of its layers a kernel can replace, and their shape.

Nothing is downloaded and no weights are loaded: `trace` runs the model on the meta device.
"""

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
from .config import check_config
from .trace import FOLLOWERS, Notes, first_line, skeleton

# Model classes by model type. Those of text come first; the others may also take images, sound or video, and convert by
# their text part.
LANGUAGE_MODELS = (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)


@dataclass(frozen=True)
class Architecture:
    """A model that converts.

    model_class: the class of the source's weights, with the weights' head. config: the source's.
    layers: which layers a kernel would replace, and their shape. parameters: how many numbers the model has.
    rotary_removable: whether these layers have no rotary embedding, or one that the kernel can undo.
    has_sinks: whether heads of these layers have a logit without a value, which takes a share of the softmax.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    layers: Layers
    parameters: int
    rotary_removable: bool
    has_sinks: bool

    @property
    def recipe(self) -> str:
        """The recipe by which the model is converted if none is asked for."""
        return "default" if self.layers.causal else "encoder"

    def new_parameters(self, kernel: Kernel) -> int:
        """How many numbers a conversion adds. None of them is made: a config.json may lie about the size of a model."""
        with torch.device("meta"):
            child = DiJiangAttention(kernel, self.layers, None)
        return len(self.layers.layers) * sum(t.numel() for t in child.state_dict().values())

    def new_tensors(self, kernel: Kernel) -> dict[str, torch.Tensor]:
        """Every tensor that a conversion adds, initialised, by its name in the checkpoint. Random numbers follow the
        kernel's seed: converting twice gives the same bytes."""
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
    """Finds the attention that a kernel replaces in a model with this config.json.

    layers: which layers to convert, see `select_layers`. Raises Unsupported with the reason where the model or a layer
    can't be converted, and DijiangError for bad ``layers``, an invalid config or a model that is converted already.
    """
    model_class, parsed = _classes(config)
    if not model_class._can_set_attn_implementation():
        raise Unsupported(f"{parsed.model_type} does not route its attention through AttentionInterface: {FOLLOWERS}")
    parsed._attn_implementation = "eager"
    try:
        model = skeleton(model_class, parsed)
    except Exception as error:
        raise Unsupported(f"{parsed.model_type} can't be built from this config ({first_line(error)})") from error
    seen = Notes(model.bfloat16())  # grouped expert kernels take no other dtype on the meta device
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
    """The model class and the config that a config.json is of. Raises as `examine`."""
    kind = str(config.get("model_type"))
    if "dijiang" in config or kind.startswith("dijiang_"):
        raise DijiangError("the model is converted already: go on with dijiang finetune")
    if config.get("is_encoder_decoder"):
        raise Unsupported(f"{kind} is an encoder-decoder: only decoders and encoders are converted")
    if config.get("quantization_config"):
        section = config["quantization_config"]
        method = section.get("quant_method", "unknown") if isinstance(section, dict) else section
        raise Unsupported(f"the weights are quantised ({method}): convert the unquantised model instead")
    if config.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"{kind} comes with its own code: only architectures that transformers has are converted")
    if kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"transformers {transformers.__version__} knows no model type {kind!r}: a newer one may")
    check_config(config)
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
    """Raises Unsupported where a kernel can't do what the layers of an architecture need."""
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
