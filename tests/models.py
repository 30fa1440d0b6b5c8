"""Small converted models, made once a run: a Llama with grouped heads and a GPT-NeoX with partial rotary embedding.

Weights are large enough and kernels far enough from their start that both attention and its far part show in logits.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dijiang_convert.convert import convert
from dijiang_convert.modeling.attention import DiJiangAttention
from dijiang_convert.models import load_converted
from tests.sources_on_disk import llama_config, neox_config, write_source

WINDOW = 16
VOCABULARY = 256  # of random prompts: without the special tokens
KINDS = ("llama", "neox")
# name: recipe, settings, layers
VARIANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "default": ("default", (f"window={WINDOW}",), "all"),
    "keep": ("default", (f"window={WINDOW}", "rotary=keep", "shift=true"), "all"),
    "pure": ("pure", (), "all"),
    "paper": ("paper", (), "all"),
    "window-only": ("window-only", (f"window={WINDOW}",), "all"),
    "partial": ("default", (f"window={WINDOW}",), "1"),
    "partial-first": ("default", (f"window={WINDOW}",), "0"),
}
_FOLDER = tempfile.TemporaryDirectory(prefix="converted-")


@functools.cache
def source(kind: str) -> Path:
    """A softmax model of two layers on disk, with its tokenizer."""
    make = llama_config if kind == "llama" else neox_config
    changes: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.25}
    if kind == "neox":
        changes["num_attention_heads"] = 4
    return write_source(Path(_FOLDER.name) / kind, make(**changes))


def checkpoint(kind: str, variant: str = "default") -> Path:
    """That model converted, its kernel parameters as `convert` starts them."""
    return _checkpoint(kind, variant)


@functools.cache
def _checkpoint(kind: str, variant: str) -> Path:
    recipe, settings, layers = VARIANTS[variant]
    out = Path(_FOLDER.name) / f"{kind}-{variant}"
    convert(str(source(kind)), out, recipe=recipe, settings=settings, layers=layers)
    return out


def load(kind: str, variant: str = "default", attention: str = "dijiang") -> PreTrainedModel:
    """A fresh copy in evaluation mode, its kernel parameters moved."""
    return randomise(load_converted(checkpoint(kind, variant), attention)).eval()


def randomise(model: Any) -> Any:
    """Moves kernel parameters away from their start, always to the same place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1 if name.endswith("gate") else 0.3)
    return model


def moved_checkpoint(kind: str, folder: Path) -> Path:
    """A copy of the checkpoint on disk with the parameters of `load`."""
    shutil.copytree(checkpoint(kind), folder)
    state = load(kind).state_dict()
    for path in folder.glob("*.safetensors"):
        moved = {name: state[name] if ".dijiang." in name else tensor for name, tensor in load_file(path).items()}
        save_file(moved, path, {"format": "pt"})
    return folder


def forget_far_part(folder: Path) -> None:
    """Makes the code in a checkpoint another version: one that attends to the window alone."""
    for file, returned, instead in (
        ("linear_attention.py", "return share * out + (1 - share) * near[0]", "return near[0]"),
        ("inference.py", "of_far, total = near.add_(of_far), total + 1", "of_far, total = near, total * 0 + 1"),
        ("decoding.py", "read = of_far @ s", "read = 0 * (of_far @ s)"),
    ):
        code = (folder / file).read_text()
        assert code.count(returned) == 1
        (folder / file).write_text(code.replace(returned, instead))


def kernels(model: Any) -> list[DiJiangAttention]:
    return [module for module in model.modules() if isinstance(module, DiJiangAttention)]


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Of the whole sequence at once."""
    return model(ids, use_cache=False, **options).logits


@torch.no_grad()
def feed(model: Any, ids: Tensor, sizes: Any, cache: Cache | None = None, **options: Any) -> tuple[Tensor, Cache]:
    """Logits of a sequence fed in pieces through a cache, the last size repeated to the end; and the cache."""
    parts, start, sizes = [], 0, list(sizes)
    while start < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        out = model(ids[:, start : start + size], past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        parts.append(out.logits)
        start += size
    assert cache is not None
    return torch.cat(parts, 1), cache


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()
