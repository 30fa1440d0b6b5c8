"""Small converted models, made once a run: a Llama with grouped heads and a GPT-NeoX with partial rotary embedding.

Weights are large enough and kernels far enough from their start that every kind of row of the table shows in logits.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Cache, PreTrainedModel

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from dijiang_convert.modeling.attention import DiJiangAttention
from dijiang_convert.modeling.cache import DiJiangCacheLayer
from tests.sources_on_disk import edit_config, llama_config, neox_config, write_source

# Sizes of the table: a text of 100 tokens has keys in the window, in the memory and in the state alone.
WINDOW, BLOCK, MEMORY = 16, 16, 8
VOCABULARY = 256  # of random prompts: without the special tokens
KINDS = ("llama", "neox")
_BLOCKS = (f"window={WINDOW}", f"block={BLOCK}")
_SMALL = (*_BLOCKS, f"memory={MEMORY}")
# name: recipe, settings, layers
VARIANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "frequency": ("frequency", _SMALL, "all"),
    "keep": ("frequency", (*_SMALL, "rotary=keep", "shift=true"), "all"),
    "wide": ("frequency", ("window=32", f"block={BLOCK}", f"memory={MEMORY}"), "all"),
    "retnet": ("frequency", (*_SMALL, "decay=retnet", "selective=false", "decay_rank=0"), "all"),
    "default": ("default", _SMALL, "all"),
    "no-memory": ("frequency", (*_BLOCKS, "memory=0"), "all"),
    "pure": ("pure", (), "all"),
    "paper": ("paper", (), "all"),
    "window-only": ("window-only", _BLOCKS, "all"),
    "partial": ("frequency", _SMALL, "1"),
    "partial-first": ("frequency", _SMALL, "0"),
    "shared": ("frequency", _SMALL, "all"),
    "shared-default": ("default", _SMALL, "all"),
}
# Without keys that are rounded to 8 bits, where a difference of 1e-7 can become a step of theirs.
UNROUNDED = {"no-rows": ("frequency", (*_BLOCKS, "sinks=0", "memory=0"), "all")}
# Rows of memory of each head of the layers of "shared" and "shared-default", as a calibration gives them.
SHARED = {"llama": [[3, 13], [5, 5]], "neox": [[3, 13, 13, 6], [5, 5, 5, 5]]}
# Those that remember in a state what is in no exact row.
WITH_STATE = tuple(name for name in VARIANTS if name not in ("default", "shared-default", "window-only"))
MODELS = (*(f"llama-{variant}" for variant in VARIANTS), "neox-frequency", "neox-pure", "neox-partial", "neox-shared")
_FOLDER = tempfile.TemporaryDirectory(prefix="converted-")


@functools.cache
def source(kind: str) -> Path:
    """A softmax model of two layers on disk, with its tokenizer."""
    make = llama_config if kind == "llama" else neox_config
    changes: dict[str, Any] = {"num_hidden_layers": 2, "initializer_range": 0.25}
    if kind == "neox":
        changes["num_attention_heads"] = 4
    return write_source(Path(_FOLDER.name) / kind, make(**changes))


def checkpoint(kind: str, variant: str = "frequency") -> Path:
    """That model converted, its kernel parameters as `convert` starts them."""
    return _checkpoint(kind, variant)


@functools.cache
def _checkpoint(kind: str, variant: str) -> Path:
    recipe, settings, layers = {**VARIANTS, **UNROUNDED}[variant]
    out = Path(_FOLDER.name) / f"{kind}-{variant}"
    convert(str(source(kind)), out, recipe=recipe, settings=settings, layers=layers)
    if variant.startswith("shared"):
        section = json.loads((out / "config.json").read_text())["dijiang"]
        edit_config(out, dijiang={**section, "memory": SHARED[kind]})
    return out


def load(kind: str, variant: str = "frequency", attention: str = "dijiang") -> PreTrainedModel:
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
    """Makes the code in a checkpoint another version: one that reads no row of the state."""
    file, asked, instead = folder / "kernel.py", 'if "features" in part:', 'if "features" in part and False:'
    code = file.read_text()
    assert code.count(asked) == 1
    file.write_text(code.replace(asked, instead))


def forget(layer: Any, part: str) -> None:
    """Zeroes what a layer of a cache keeps in one part: its ``state``, or the values of ``sinks``, ``memory`` or
    ``window``. (The best rows come last, and sinks are the best.)"""
    if layer.past.state is not None:
        layer.past.state.value.zero_()
    for table in layer.past.tables:
        if part == "state":
            table.value.zero_()
            continue
        if part == "window":
            table.v.zero_()
        else:
            sinks = table.score.shape[2] - 4
            table.memory_v[:, :, slice(sinks) if part == "memory" else slice(sinks, None)] = 0


def window_and_state(model: Any) -> Any:
    """The model without sinks and memory, whose keys are rounded as they were rotated: a shift of all positions rounds
    them another way."""
    for child in kernels(model):
        child.resize(replace(child.kernel, sinks=0, memory=0))
    return model


def assert_state_is_float32(cache: Any) -> None:
    """Or more, in every converted layer, and so are the scores that choose what stays in the memory."""
    found = 0
    for layer in cache.layers:
        if isinstance(layer, DiJiangCacheLayer):
            past: Any = layer.past
            kept = list(past.state or ())
            for table in past.tables:
                kept += [table.log_weight, table.value, table.received, table.score]
            assert kept and all(x.dtype in (torch.float32, torch.float64) for x in kept)
            found += 1
    assert found


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


def root_mean_square(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


def typical(x: Tensor) -> float:
    """The root mean square of the median token's numbers, x [B, N, numbers]. Of two keys whose scores are nearly the
    same, rounding decides which stays in the memory: the tokens that see it differ by more than rounding."""
    return x.float().square().mean(-1).sqrt().median().item()


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()
