"""The Triton kernels against the definition in float64: on a GPU, or on the CPU through Triton's interpreter.

The interpreter runs one program after the other in numpy, so shapes are small, and only a compiler finds some errors of
typing: the last test compiles the kernels for a GPU, which needs none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dijiang_convert.modeling import accelerated
from dijiang_convert.modeling.configuration_dijiang import Kernel
from dijiang_convert.modeling.feature_map import FeatureMap, dct_matrix
from dijiang_convert.modeling.linear_attention import FarState, absorb, chunked, naive
from tests.interpreter import DEVICE, take_kernels
from tests.modeling.test_linear_attention import SCALING, double, inputs, keys_of, relative, unpadded
from tests.modeling.test_selective import decays, part_of
from tests.models import load, tokens

chunk_kernels = pytest.importorskip("dijiang_convert.modeling.chunk_kernels", exc_type=ImportError)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    take_kernels(monkeypatch)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_kernels, "chunk_size", lambda dtype: 16)


def moved(x: Any) -> Any:
    """x on the device, where it is a tensor or some of it is."""
    if isinstance(x, dict):
        return {name: moved(t) for name, t in x.items()}
    if isinstance(x, FarState):
        return FarState(x.s.to(DEVICE), x.m.to(DEVICE))
    return x.to(DEVICE) if isinstance(x, Tensor) else x


@torch.no_grad()
def run(x: dict[str, Tensor], **options: Any) -> tuple[Tensor, FarState]:
    """By `chunked`, which must have taken the kernels: they give v's dtype."""
    form = accelerated.chunked_form(x["q"].to(DEVICE), x["v"].to(DEVICE))
    assert form is chunk_kernels.prefill
    out, state = chunked(**moved(x), scaling=SCALING, **moved(options))
    assert state is not None and out.dtype == x["v"].dtype
    return out.cpu(), FarState(state.s.cpu(), state.m.cpu())


def reference_of(x: dict[str, Tensor], **options: Any) -> Tensor:
    options = {name: double(t) if isinstance(t, Tensor) else t for name, t in options.items()}
    return naive(**double(x), scaling=SCALING, **options)


def as_sums(state: FarState) -> Tensor:
    return state.s.double() * state.m.double().exp()[..., None, None]


@pytest.mark.parametrize(
    ("length", "window", "of"),
    [(1, 16, None), (63, 0, None), (63, 16, "both"), (130, 0, "both"), (130, 1, "keys"), (130, 64, "features")],
)
def test_values_and_state(length: int, window: int, of: str | None) -> None:
    x = inputs(length, batch=1, heads=2, kv_heads=1)
    given = {} if of is None else decays(x, of)
    out, state = run(x, window=window, **given)
    assert relative(out, reference_of(x, window=window, **given)) <= 1e-5
    passed = max(length - window, 0)
    expected = FarState.empty(1, 1, 24, 10, x["v"])
    if passed:
        expected = absorb(expected, **keys_of(x, slice(passed)), **part_of(given, slice(passed)))
        assert relative(as_sums(state), as_sums(expected)) <= 1e-5
    else:
        assert not as_sums(state).any()
    if length == 130:  # without the far part, or the chunks before, it would be another
        tail = {name: t[:, :, -(window + 32) :] for name, t in x.items()}
        near, _ = run(tail, window=window, **part_of(given, slice(-(window + 32), None)))
        assert relative(near[:, :, -1:], out[:, :, -1:].double()) > 1e-3


@pytest.mark.parametrize("dims", [(4, 2, 12, 10), (3, 1, 40, 24), (2, 2, 5, 36)])
def test_head_shapes_and_chunks(dims: tuple[int, int, int, int], small_chunks: None) -> None:
    heads, kv_heads, dim, value_dim = dims
    x = inputs(50, batch=1, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim)
    options = {"window": 16, "log_decay": -torch.linspace(0.003, 0.1, kv_heads)}
    assert relative(run(x, **options)[0], reference_of(x, **options)) <= 1e-5


def test_wide_log_scales(small_chunks: None) -> None:
    """Their exponentials alone would overflow and vanish."""
    x = inputs(70, heads=2, kv_heads=1, spread=80.0)
    x["gk"][0], x["gk"][1] = torch.linspace(-80, 80, 70), torch.linspace(80, -80, 70)
    assert relative(run(x, window=4)[0], reference_of(x, window=4)) <= 1e-5


def test_soft_capped_logits_and_sinks() -> None:
    x = inputs(40, batch=1, heads=2, kv_heads=1)
    options = {"window": 16, "softcap": 1.5, "sink": torch.tensor([-1.0, 4.0])}
    out, _ = run(x, **options)
    assert relative(out, reference_of(x, **options)) <= 1e-5
    for name in ("softcap", "sink"):
        assert relative(run(x, **{**options, name: None})[0], out.double()) > 1e-2


@pytest.mark.parametrize("past", [5, 60])
def test_going_on_from_a_state(past: int, small_chunks: None) -> None:
    """With fewer keys before the queries than the window, and more."""
    earlier, window = 60, 16
    x = inputs(40, earlier + past, heads=2, kv_heads=1)
    given = decays(x)
    state = absorb(FarState.empty(2, 1, 24, 10, x["v"]), **keys_of(x, slice(earlier)), **part_of(given, slice(earlier)))
    rest = {name: t if name in ("q", "fq", "gq") else t[:, :, earlier:] for name, t in x.items()}
    given = part_of(given, slice(earlier, None))
    reference = reference_of(rest, window=window, state=FarState(*map(double, state)), **given)
    out, _ = run(rest, window=window, state=state, **given)
    assert relative(out, reference) <= 1e-5
    forgotten, _ = run(rest, window=window, **given)
    assert relative(forgotten[:, :, :1], reference[:, :, :1]) > 1e-4


def test_padding() -> None:
    """Before, after and among the keys; what stands there must not matter."""
    x = inputs(70, heads=1, kv_heads=1, batch=3)
    given = decays(x)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[0, :30] = mask[1, 50:] = mask[2, :64] = False
    for name in ("k", "v", "fk", "gk"):
        x[name][~mask[:, None].expand(x[name].shape[:3])] = 77.0
    out, _ = run(x, window=16, mask=mask, **given)
    assert out.isfinite().all()
    for row, (left, right) in enumerate([(30, 0), (0, 20), (64, 0)]):
        real = slice(left, 70 - right)
        own = {name: t[row : row + 1, :, real] for name, t in given.items()}
        reference = reference_of(unpadded(x, row, left, right), window=16, **own)
        assert relative(out[row : row + 1, :, real], reference) <= 1e-5

    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[:, 20:45] = False
    out, _ = run(x, window=0, mask=mask, **given)
    alone, own = ({name: t[:, :, mask[0]] for name, t in y.items()} for y in (x, given))
    assert relative(out[:, :, mask[0]], reference_of(alone, window=0, **own)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    """Values of a model's layout, [B, N, H, D] underneath."""
    x = inputs(70, heads=2, kv_heads=1)
    for name in ("q", "k", "v"):
        x[name] = x[name].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    out, state = run(x, window=16)
    assert state.s.dtype == state.m.dtype == torch.float32
    assert relative(out, reference_of(x, window=16)) <= 1e-2


def test_what_the_kernels_leave_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(20)
    q, v = x["q"], x["v"]
    assert accelerated.chunked_form(q.double(), v) is None
    assert accelerated.chunked_form(q, v.new_empty(2, 2, 20, 300)) is None
    for option in ({"causal": False}, {"normalize": False}, {"segments": torch.zeros(2, 20, dtype=torch.long)}):
        with torch.no_grad():
            out, _ = chunked(**x, scaling=SCALING, window=0, **option)
            monkeypatch.setattr(accelerated, "MODE", "torch")
            assert accelerated.chunked_form(q, v) is None
            assert torch.equal(out, chunked(**x, scaling=SCALING, window=0, **option)[0])
            monkeypatch.setattr(accelerated, "MODE", "interpret")
    monkeypatch.setattr(accelerated, "TRITON", False)
    notices: list[str] = []
    monkeypatch.setattr(accelerated.logger, "warning_once", notices.append)
    assert accelerated.chunked_form(q, v) is None
    assert len(notices) == 1 and "pip install 'dijiang-convert[cuda]'" in notices[0]


@pytest.mark.parametrize(("dim", "signed", "window"), [(12, True, 16), (40, False, 0), (5, True, 0), (16, False, 16)])
def test_features(dim: int, signed: bool, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries, which have a log-scale only with a window."""
    kernel = Kernel(window=window, signed=signed, frequency=1.5)
    features = FeatureMap(3, dim, kernel, scaled=window > 0)
    torch.manual_seed(0)
    for parameter in features.parameters():
        parameter.data = torch.randn_like(parameter)
    features.dct.copy_(dct_matrix(dim))
    x = 3 * torch.randn(2, 70, 3, dim).transpose(1, 2)
    with torch.no_grad():
        expected = features.double()(x.double(), 0.3)
        mine = features.float().to(DEVICE)
        assert accelerated.feature_form(x.to(DEVICE)) is not None
        found = mine(x.to(DEVICE), 0.3)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a.cpu() - b).abs().max() <= 1e-5 * b.abs().max()
    assert accelerated.feature_form(x.to(DEVICE), *mine.parameters()) is None  # which have gradients


def test_a_model_prefills_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded batch and a second turn, on to tokens by the state that kernels left."""
    model: Any = load("llama", "partial").to(DEVICE)
    ids = tokens(2, 56).to(DEVICE)
    mask = torch.ones(2, 56, dtype=torch.long, device=DEVICE)
    mask[0, :15] = 0
    calls: list[int] = []
    prefill = chunk_kernels.prefill

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return prefill(*args, **options)

    monkeypatch.setattr(chunk_kernels, "prefill", counted)
    found = []
    for mode in ("torch", "interpret"):
        monkeypatch.setattr(accelerated, "MODE", mode)
        with torch.no_grad():
            first = model(ids[:, :30], attention_mask=mask[:, :30])
            cache, parts = first.past_key_values, [first.logits]
            for piece in (slice(30, 55), slice(55, 56)):
                seen = mask[:, : piece.stop]
                parts.append(model(ids[:, piece], attention_mask=seen, past_key_values=cache).logits)
        found.append(torch.cat(parts, 1) * mask[..., None])
        assert len(calls) == (0 if mode == "torch" else 2)  # turns; a single token is decoded
    assert relative(found[1], found[0].double()) <= 1e-4


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from dijiang_convert.modeling import chunk_kernels, feature_kernels, near_kernels

class Driver:  # of no device: kernels are compiled as for one, and not run
    get_current_target = lambda self: GPUTarget("cuda", 80, 32)
    get_current_device = get_current_stream = lambda self, device=0: 0

class Lowered(Exception):
    pass

def stop(*args):
    raise Lowered

def compile_only(self, *args, grid, warmup, **options):
    try:
        run(self, *args, grid=grid, warmup=True, **options)
    except Lowered:
        print(self.fn.__name__)

CUDABackend.make_llir = stop
chunk_kernels.chunk_size = near_kernels.chunk_size = lambda dtype: 16  # sooner done
triton.runtime.driver.set_active(Driver())
run, JITFunction.run = JITFunction.run, compile_only
q, k, v = (torch.ones(1, heads, 40, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (2, 1, 1))
fq, fk = torch.ones(1, 2, 40, 32), torch.ones(1, 1, 40, 32)
options = {"scaling": 0.1, "window": 16, "softcap": 2.0, "mask": torch.ones(1, 40, dtype=torch.bool)}
with torch.no_grad():
    decays = {"log_decay": -fk[..., 0], "feature_decay": -fk}
    feature_kernels.feature_map(q, fq[0, :, :32, :16], fq[0, :, 0], fq[0, :, 0, 0], signed=True)
    chunk_kernels.prefill(q, k, v, fq, fq[..., 0], fk, fk[..., 0], sink=torch.ones(2), **decays, **options)
out, lse = near_kernels.near_attention(q, k, v, **options)
(out.sum() + lse.sum()).backward()
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """All of them for compute capability 8.0, as far as Triton's own part goes; what is after it takes long."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(accelerated.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"along_chunks", "attend_chunk", "near_forward", "near_backward_q", "near_backward_kv", "map_features"}
    assert set(done.stdout.split()) == names
