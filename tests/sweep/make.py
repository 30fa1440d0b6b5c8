"""Makes what is checked of one model type: a random source on disk, its conversion, and what the source itself answers.

Run as a module it serves such jobs (`forks`).
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dijiang_convert.architecture.examine import Architecture, check_kernel, examine
from dijiang_convert.checkpoint.loading import silence
from dijiang_convert.convert import convert
from dijiang_convert.errors import DijiangError, Unsupported
from dijiang_convert.modeling.configuration_dijiang import Kernel
from tests.sources_on_disk import write_tokenizer
from tests.sweep.feed import PIECES, fed
from tests.sweep.forks import Answer, serve
from tests.sweep.tiny import tiny_config

SECONDS = 120
WINDOW = 8
LENGTH, PADDING = 160, 50
# In a refusal they only tell what broke.
NO_REASON = ("can't be traced", "can't be built")
# What a type is converted with: the first of these that it takes.
CHOICES: tuple[tuple[str, list[str]], ...] = (
    ("all", []),
    ("all", ["rotary=keep"]),
    ("sliding-only", []),
    ("sliding-only", ["rotary=keep"]),
)


def make(kind: str, folder: str) -> Answer:
    """Writes below ``folder`` the source in each layout that transformers knows, what each converts to, and
    reference.safetensors: the source's weights as loaded (``state.*``) and its logits.

    Returns:
        ``refused``: the reason why it does not convert; or how it was converted, and the layouts.
    """
    torch.set_num_threads(1)
    silence()
    target = Path(folder)
    config = tiny_config(kind)
    model_class = class_of(kind, config)
    content = {**config.to_dict(), "architectures": [model_class.__name__]}
    try:
        architecture, layers, settings = choose(content)
    except Unsupported as error:
        reason = str(error)
        if any(words in reason for words in NO_REASON):
            check_that_it_breaks(model_class, config)
            reason += "; nor does it run with softmax"
        return {"refused": reason}
    model = random_model(model_class, config)
    layouts = write_layouts(model, target)
    answer = describe(architecture, layers, settings)
    for layout in layouts:
        out = target / f"{layout}-converted"
        options = {"settings": [f"window={WINDOW}", f"block={WINDOW}", f"memory={WINDOW}", *settings], "layers": layers}
        convert(str(target / layout), out, recipe="frequency", **options)  # type: ignore[arg-type]
        move_kernels(out)
    if layers != "all":
        answer["window"] = local_window(architecture.config)
    answer |= {"layouts": layouts, "parameters": architecture.parameters, "source": write_reference(model, target)}
    return answer


def notes(architecture: Architecture) -> list[str]:
    """What the kernel follows besides plain attention, and which layers stay as they are."""
    text: Any = architecture.config.get_text_config(decoder=True)
    found = ["attention sinks"] if architecture.has_sinks else []
    if getattr(text, "attn_logit_softcapping", None) is not None:
        found.append("soft-capped logits")
    types = getattr(text, "layer_types", None) or []
    left = [kind for index, kind in enumerate(types) if index not in architecture.layers.layers]
    return found + [f"{left.count(kind)} {kind.replace('_', ' ')} left" for kind in dict.fromkeys(left)]


def check_that_it_breaks(model_class: Any, config: Any) -> None:
    """Raises RuntimeError where the source itself runs, on rows of tokens with a cache: then a refusal for what broke
    does not say the true reason."""
    try:
        random_model(model_class, config)(input_ids=inputs()[0], use_cache=True)
    except Exception:
        return
    raise RuntimeError("refused for a technical reason, though the source runs")


def local_window(config: Any) -> int:
    """How many keys, the token's own included, the layers with a sliding window see."""
    text = config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_window_size", "local_attention")
    return next(value for name in names if (value := getattr(text, name, None)))


def class_of(kind: str, config: Any) -> Any:
    """The class that checkpoints of this type are of: with all that it takes in, where that is more than text."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    if config.get_text_config(decoder=True) is not config:
        name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, name)
    return getattr(transformers, name)


def choose(content: dict[str, Any]) -> tuple[Architecture, str, list[str]]:
    """How to convert a model of this config.json. Raises what the first choice raises where there is no way."""
    first: DijiangError | None = None
    for layers, settings in CHOICES:
        try:
            architecture = examine(content, layers)
            check_kernel(Kernel(rotary="keep" if settings else "remove"), architecture)
            return architecture, layers, settings
        except DijiangError as error:
            first = first or error
    assert first is not None
    raise first


def describe(architecture: Architecture, layers: str, settings: list[str]) -> Answer:
    found = architecture.layers
    text = architecture.config.get_text_config(decoder=True)
    return {
        "architecture": architecture.model_class.__name__,
        "attention": found.attention_class,
        "layers": list(found.layers),
        "of": text.num_hidden_layers,
        "notes": notes(architecture),
        "options": [*([f"--layers {layers}"] if layers != "all" else []), *(f"--set {each}" for each in settings)],
    }


def random_model(model_class: Any, config: Any) -> Any:
    """Always the same, with noise on all that a checkpoint holds so that nothing is neutral, and enough of it that
    attention is sharp."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    kept = {*model.state_dict()}
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer), alpha=0.05)
    return model


def write_layouts(model: Any, target: Path) -> list[str]:
    """Saves the model as transformers does by default, which is the layout that the Hub has (an expert a tensor, old
    names), and, where that is another one, with the names and shapes that the model itself has."""
    model.save_pretrained(target / "hub")
    write_tokenizer(target / "hub")
    if tensor_shapes(target / "hub") == {k: tuple(v.shape) for k, v in model.state_dict().items()}:
        return ["hub"]
    model.save_pretrained(target / "own", save_original_format=False)
    write_tokenizer(target / "own")
    return ["hub"] if tensor_shapes(target / "hub") == tensor_shapes(target / "own") else ["hub", "own"]


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def move_kernels(folder: Path) -> None:
    """Moves kernel parameters away from their start, always to the same place."""
    generator = torch.Generator().manual_seed(1)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if not all(".dijiang." in name for name in tensors):
            continue
        for _, tensor in sorted(tensors.items()):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
        save_file(tensors, path, {"format": "pt"})


def write_reference(model: Any, target: Path) -> Answer:
    """What the source answers with softmax.

    Returns:
        ``padding_shifts``: whether left padding changes its answers: where positions are learned and count padding, it
        does; ``padding_shows``: whether another token as padding does. ``cached``, of each of `PIECES`, and
        ``padding``: how far its own answers differ with and without a cache, and beside padding, in units of their
        spread; ``positions``: whether it must be told positions to go on from a cache.
    """
    model.set_attn_implementation("eager")
    ids, mask = inputs()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        padded = model(input_ids=ids * mask, attention_mask=mask, use_cache=False).logits
        other = model(input_ids=torch.where(mask == 1, ids, 7), attention_mask=mask, use_cache=False).logits
        alone = model(input_ids=ids[:1, PADDING:], use_cache=False).logits
    state = {f"state.{name}": tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    answers = {"ids": ids, "mask": mask, "logits": whole, "padded": padded, "alone": alone}
    save_file({**state, **answers}, target / "reference.safetensors")
    unit = min(whole.std().item(), 1.0)
    padding = (padded[:1, PADDING:] - alone).abs().max().item() / unit
    shown = (padded - other)[mask == 1].abs().max().item() / unit

    def cached(positions: bool) -> list[float]:
        return [(fed(model, ids, sizes, positions) - whole).abs().max().item() / unit for sizes in PIECES]

    own, positions = cached(False), False
    if own[0] > 1e-2 and "position_ids" in inspect.signature(model.forward).parameters:
        own, positions = cached(True), True
    return {
        "padding_shifts": padding > 1e-2, "padding_shows": shown > 1e-2, "padding": padding,
        "cached": own, "positions": positions,
    }  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    """Two rows of tokens without special ones, and a mask that pads the first to the left."""
    ids = torch.randint(1, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return ids, mask


if __name__ == "__main__":
    sys.modules["fla"] = None  # type: ignore[assignment]  # transformers would hand CPU tensors to its kernels
    serve(make, SECONDS)
