"""Tiny random encoders of text and images, one of each model type: what is checked of it, as `make` does for decoders.

Run as a module it serves such jobs (`forks`).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from dijiang_convert.architecture.examine import examine
from dijiang_convert.checkpoint.loading import silence
from dijiang_convert.convert import convert
from dijiang_convert.errors import Unsupported
from tests.sweep.feed import output
from tests.sweep.forks import Answer, serve
from tests.sweep.make import SECONDS, WINDOW, choose, describe, move_kernels, random_model, write_layouts
from tests.sweep.tiny import tiny_config

LENGTH, PADDING = 160, 50
SIZE = {"image_size": 48, "patch_size": 4}  # 144 patches
# Their configs want lists.
CHANGES: dict[str, dict[str, Any]] = {
    "esmc": {"num_key_value_heads": 4},
    "mobilebert": {"normalization_type": "layer_norm"},  # random weights blow up without
    "esm": {"vocab_size": 258, "position_embedding_type": "rotary"},
    "neomme": {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
    "yolos": {"image_size": [48, 48]},
}


def _heads() -> dict[str, str]:
    found: dict[str, str] = {}
    for names in (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_FOR_IMAGE_MAPPING_NAMES,
    ):
        for kind, name in names.items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return {kind: name for kind, name in found.items() if not _is_decoder(kind)}


def _is_decoder(kind: str) -> bool:
    """Decoders are swept as such, the decoders of encoder-decoders too."""
    is_both = getattr(transformers.CONFIG_MAPPING[kind], "is_encoder_decoder", False)
    return bool(is_both) or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


HEADS = _heads()
KINDS: tuple[str, ...] = tuple(sorted(HEADS))


def tiny_encoder(kind: str) -> PreTrainedConfig:
    names = {*transformers.CONFIG_MAPPING[kind].__dataclass_fields__}
    changes: dict[str, Any] = {"is_decoder": False, **SIZE, **CHANGES.get(kind, {})}
    return tiny_config(kind, **{name: value for name, value in changes.items() if name in names})


def encoder_inputs(model: Any) -> dict[str, Tensor]:
    """Two rows of tokens without special ones and a mask that pads the first to the right, or two images."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 48, 48, generator=generator)}
    ids = torch.randint(1, 256, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, LENGTH - PADDING :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def make(kind: str, folder: str) -> Answer:
    """Writes below ``folder`` the source, what it converts to, and reference.safetensors: the source's weights as
    loaded (``state.*``), inputs (``input.*``), and its outputs: ``whole`` without a mask, ``padded``, and ``alone`` of
    the first row's real tokens.

    Returns:
        ``refused``: the reason why it does not convert; or how it was converted, ``padding_shifts``: whether padding
        changes the source's own answers, and ``rounding``: how far they are from what they are in float64.
    """
    torch.set_num_threads(1)
    silence()
    target = Path(folder)
    model_class = getattr(transformers, HEADS[kind])
    try:
        try:
            config = tiny_encoder(kind)
        except StrictDataclassError:  # of a model in stages, whose sizes are lists
            examine({"model_type": kind, "architectures": [model_class.__name__]})
            raise
        architecture, layers, settings = choose({**config.to_dict(), "architectures": [model_class.__name__]})
    except Unsupported as error:
        return {"refused": str(error)}
    except ImportError as error:
        return {"refused": f"{kind} needs another library: {' '.join(str(error).split())[:80]}"}
    model = random_model(model_class, config)
    layouts = write_layouts(model, target)
    for layout in layouts:
        out = target / f"{layout}-converted"
        convert(
            str(target / layout),
            out,
            recipe="frequency" if architecture.layers.causal else None,
            settings=[f"window={WINDOW}", f"block={WINDOW}", f"memory={WINDOW}", *settings],
            layers=layers,
        )
        move_kernels(out)
    answer = describe(architecture, layers, settings)
    return {**answer, "layouts": layouts, "causal": architecture.layers.causal, **write_reference(model, target)}


def write_reference(model: Any, target: Path) -> Answer:
    model.set_attn_implementation("eager")
    inputs = encoder_inputs(model)
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    found = {"whole": output(model, **whole)}
    answer: Answer = {"padding_shifts": False}
    if "attention_mask" in inputs:
        real = LENGTH - PADDING
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        found["padded"] = output(model, input_ids=ids * mask, attention_mask=mask)
        found["alone"] = output(model, input_ids=ids[:1, :real])
        answer["padding_shifts"] = bool((found["padded"][:1, :real] - found["alone"]).abs().max() > 1e-2)
    doubled = {name: value.double() if value.is_floating_point() else value for name, value in whole.items()}
    exact = output(copy.deepcopy(model).double(), **doubled)
    answer["rounding"] = (exact - found["whole"]).abs().max().item()
    state = {f"state.{name}": tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    given = {f"input.{name}": tensor for name, tensor in inputs.items()}
    save_file({**state, **given, **found}, target / "reference.safetensors")
    return answer


if __name__ == "__main__":
    serve(make, SECONDS)
