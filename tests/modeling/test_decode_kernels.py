"""A decoded token in Triton's kernels, by Triton's interpreter on the CPU, against the same in torch.

The interpreter takes a tenth of a second for what a GPU does in microseconds, so that layers are tiny and a prompt of
many windows goes in by torch; what follows reaches beyond the window once more.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb as complex_numbers

from dijiang_convert.modeling import accelerated, rotary
from dijiang_convert.modeling.attention import Call, DiJiangAttention
from dijiang_convert.modeling.cache import StaticDiJiangCacheLayer
from dijiang_convert.modeling.configuration_dijiang import Kernel, Layers
from tests.models import checkpoint, difference

pytest.importorskip("triton", reason="triton is not installed")

TOLERANCE = 2e-5
WINDOW, HIDDEN, PROMPT = 3, 12, 40
DEFAULT = Kernel(window=WINDOW, decay_rank=2)
PURE = Kernel(window=0, rotary="keep", shift=True, decay_rank=2)
PAPER = Kernel(
    window=0, signed=False, frequency="quasi-random", projection=False, learned_features=False, rotary="keep",
    decay="retnet", selective=False, decay_rank=0, normalize=False, gate=True,
)  # fmt: skip
FIXED = Kernel(window=WINDOW, decay="retnet", selective=False, decay_rank=0, rotary="keep")
NO_DECAY = Kernel(window=WINDOW, decay="none", selective=False, decay_rank=0, signed=False)
HEADS_PER_KEY = 2


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches Triton's kernels on and off."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/test_gpu.py runs the kernels on it")
    return lambda on: monkeypatch.setattr(accelerated, "MODE", "interpret" if on else "torch")


def layer(kernel: Kernel, dim: int, value_dim: int, rotary_dim: int, kv_heads: int = 1) -> DiJiangAttention:
    """A layer of its own with parameters away from their start."""
    torch.manual_seed(0)
    layers = Layers("", "", (0,), HEADS_PER_KEY * kv_heads, kv_heads, dim, value_dim, HIDDEN, True, rotary_dim)
    child = DiJiangAttention(kernel, layers, halves)
    child.reset_parameters()
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return child


class Inputs:
    """What the attention function gives a layer, drawn for any places of two rows."""

    def __init__(self, child: DiJiangAttention, length: int, dtype: torch.dtype) -> None:
        layers = child.layers
        torch.manual_seed(1)
        heads = (layers.heads, layers.head_dim), (layers.kv_heads, layers.head_dim), (layers.kv_heads, layers.value_dim)
        self.qkv = [torch.randn(2, count, length, dim).to(dtype) for count, dim in heads]
        self.hidden = torch.randn(2, length, HIDDEN).to(dtype)
        angles = torch.arange(length)[:, None] * torch.rand(layers.rotary_dim // 2)
        angles = torch.cat([angles, angles], -1)[None].expand(2, -1, -1)
        self.cos_sin = (1.1 * angles.cos()).to(dtype), (1.1 * angles.sin()).to(dtype)
        self.mask = torch.ones(2, length, dtype=torch.bool)
        self.mask[0, :7] = self.mask[1, :31] = self.mask[1, PROMPT + 2 : PROMPT + 3] = False  # the last in a step
        self.options: dict[str, Any] = {"scaling": layers.head_dim**-0.5}

    @torch.no_grad()
    def run(self, child: DiJiangAttention, cache: StaticDiJiangCacheLayer, places: slice) -> Tensor:
        q, k, v = (x[:, :, places] for x in self.qkv)
        cos_sin = self.cos_sin[0][:, places], self.cos_sin[1][:, places]
        call = Call(cache, self.hidden[:, places], cos_sin, **self.options)
        mask = self.mask[:, places]
        cache.update(k, v)
        return child(q, k, v, None if mask.all() else mask, call)


def decoded(
    kernels: Callable[[bool], None], child: DiJiangAttention, inputs: Inputs
) -> tuple[tuple[Tensor, list[Tensor]], ...]:
    """Outputs of the tokens after the prompt, and all that the cache keeps then: in torch, and in kernels."""
    cache, results = StaticDiJiangCacheLayer(child.kept, 100), []
    kernels(False)
    inputs.run(child, cache, slice(0, PROMPT))
    for on in (False, True):
        kernels(on)
        own = copy.deepcopy(cache)
        steps = [inputs.run(child, own, slice(n, n + 1)) for n in range(PROMPT, inputs.hidden.shape[1])]
        results.append((torch.cat(steps, 2), own._tensors()))
    return tuple(results)


@pytest.mark.parametrize(
    "kernel, dim, value_dim, rotary_dim, options",
    [
        (DEFAULT, 8, 8, 8, {}),
        (DEFAULT, 12, 20, 4, {"softcap": 2.0, "sink": torch.tensor([0.5, -1.0])}),
        (PURE, 8, 8, 8, {}),
        (PAPER, 8, 8, 8, {}),
        (FIXED, 8, 8, 8, {}),
        (NO_DECAY, 8, 8, 8, {}),
    ],
    ids=["default", "odd sizes, soft-capped, sink", "pure", "paper", "fixed decay", "no decay"],
)  # fmt: skip
def test_equals_torch(kernels: Any, kernel: Kernel, dim: int, value_dim: int, rotary_dim: int, options: Any) -> None:
    """Beyond the window, with rows of different padding and a step in which one row's token is padding."""
    child = layer(kernel, dim, value_dim, rotary_dim)
    inputs = Inputs(child, PROMPT + WINDOW + 3, torch.float32)
    inputs.options.update(options)
    (expected, kept), (found, kept_in_kernels) = decoded(kernels, child, inputs)
    real = inputs.mask[:, PROMPT:]
    difference_of_real = (found - expected).transpose(1, 2)[real].abs().max()
    assert difference_of_real <= TOLERANCE and expected.abs().max() > 0.1
    for a, b in zip(kept, kept_in_kernels, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dim", [48, 64, 80, 96, 128, 256])
def test_sizes_of_heads(kernels: Any, dim: int) -> None:
    child = layer(DEFAULT, dim, dim, dim // 4)
    inputs = Inputs(child, PROMPT + 1, torch.float32)
    (expected, kept), (found, kept_in_kernels) = decoded(kernels, child, inputs)
    assert difference(found, expected) <= TOLERANCE
    for a, b in zip(kept, kept_in_kernels, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(kernels: Any, dtype: torch.dtype) -> None:
    """As near as the rounding of the ring's keys."""
    child = layer(DEFAULT, 8, 8, 8)
    (expected, kept), (found, kept_in_kernels) = decoded(kernels, child, Inputs(child, PROMPT + WINDOW + 1, dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for a, b in zip(kept, kept_in_kernels, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_rotation_of_another_kind(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is undone by the model's own function, and asked about once: a recorded step can't look at values."""

    asked: list[int] = []
    monkeypatch.setattr(rotary, "rotation", lambda *arguments: asked.append(1))
    monkeypatch.setattr(rotary, "_known", {})
    child = layer(DEFAULT, 8, 8, 8)
    (expected, _), (found, _) = decoded(kernels, child, Inputs(child, PROMPT + 2, torch.float32))
    assert difference(found, expected) <= TOLERANCE and len(asked) == 1


def test_far_part_matters(kernels: Any) -> None:
    child = layer(DEFAULT, 8, 8, 8)
    inputs, cache = Inputs(child, PROMPT + 1, torch.float32), StaticDiJiangCacheLayer(child.kept, 100)
    inputs.run(child, cache, slice(0, PROMPT))
    other = copy.deepcopy(cache)
    other.state.s.zero_()  # type: ignore[union-attr]
    kernels(True)
    found = [inputs.run(child, each, slice(PROMPT, PROMPT + 1)) for each in (cache, other)]
    assert difference(*found) > 100 * TOLERANCE


def test_compiled(kernels: Any) -> None:
    """One graph for all steps, with the operator in it, that writes to the cache."""
    torch._dynamo.reset()
    child = layer(DEFAULT, 8, 8, 8)
    inputs, cache = Inputs(child, PROMPT + 3, torch.float32), StaticDiJiangCacheLayer(child.kept, 100)
    inputs.mask[1, PROMPT:] = True
    (expected, kept), _ = decoded(kernels, child, inputs)
    kernels(False)
    inputs.run(child, cache, slice(0, PROMPT))
    kernels(True)
    step = torch.compile(child.forward, fullgraph=True, backend="aot_eager")
    child.forward = step  # type: ignore[method-assign]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [inputs.run(child, cache, slice(n, n + 1)) for n in range(PROMPT, PROMPT + 3)]
    assert difference(torch.cat(found, 2), expected) <= TOLERANCE
    for a, b in zip(kept, cache._tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    torch._dynamo.reset()


@pytest.mark.parametrize("function, is_known", [(halves, True), (interleaved, True), (complex_numbers, False)])
def test_rotation(function: Any, is_known: bool) -> None:
    """What the kernels undo is what the model's own function did."""
    rotation = rotary.rotation
    torch.manual_seed(0)
    angles = torch.rand(1, 1, 4)
    angles = torch.cat([angles, angles], -1) if function is halves else angles.repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    if not is_known:
        assert rotation(function, torch.polar(torch.ones(1, 1, 4), torch.rand(1, 1, 4)), sin, 8) is None
        return
    turn = rotation(function, cos, sin, 8)
    assert turn is not None
    x = torch.randn(1, 1, 1, 8)
    expected, _ = function(x, x, cos, sin)
    assert difference(x * cos + turn.sign * x[..., turn.partner] * sin, expected) < 1e-6
    wider = torch.cat([expected, expected], -1)  # of which half is turned
    back = turn.back(wider, cos, sin)
    assert difference(back, torch.cat([x, expected], -1)) < 1e-6


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from tests.modeling.test_decode_kernels import *
from dijiang_convert.modeling import decode_kernels

class Driver:  # of no device: kernels are compiled as for one, and not run
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=0: 0

def compile_only(self, *args, grid, warmup, **options):
    print(run(self, *args, grid=grid, warmup=True, **options).metadata.name)

triton.runtime.driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, compile_only
child = layer(DEFAULT, 16, 16, 8)
inputs, cache = Inputs(child, 1, torch.bfloat16), StaticDiJiangCacheLayer(child.kept, 1)
cache.update(*inputs.qkv[1:])
call = Call(cache, inputs.hidden, inputs.cos_sin, scaling=0.25, softcap=30.0)
turn = rotary.rotation(child.apply_rotary, *inputs.cos_sin, 8)
with torch.no_grad():
    decode_kernels.decode(child, cache, *inputs.qkv, None, turn, inputs.mask, call)
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(accelerated.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["gates", "find_features", "attend"]


def test_checkpoint_has_the_files() -> None:
    names = {path.name for path in checkpoint("llama").iterdir()}
    assert {"decode_kernels.py", "cuda_graph.py"} <= names
