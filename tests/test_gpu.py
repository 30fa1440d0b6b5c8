"""The same numbers on a GPU as on the CPU. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from dijiang_convert import benchmark, convert, finetune
from dijiang_convert.demo import MODEL
from dijiang_convert.demo_text import documents
from dijiang_convert.modeling import accelerated, cuda_graph
from dijiang_convert.modeling.cache import DecodingCache
from dijiang_convert.modeling.linear_attention import FASTEST, chunked
from dijiang_convert.models import load_converted
from tests.modeling.test_linear_attention import inputs, relative
from tests.models import randomise
from tests.test_losses import memory_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("recipe", ["default", "pure", "paper", "window-only"])
def test_logits_and_tokens(tmp_path: Path, recipe: str) -> None:
    convert(str(MODEL), tmp_path / "out", recipe=recipe)
    ids = torch.randint(1, 1000, (2, 300))
    logits, texts = [], []
    for device in ("cpu", "cuda"):
        model = load_converted(tmp_path / "out", device=torch.device(device)).eval()
        with torch.no_grad():
            logits.append(model(ids.to(device)).logits.cpu())
        texts.append(model.generate(ids.to(device), max_new_tokens=40, do_sample=False).cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)
    assert (texts[0] == texts[1]).float().mean() > 0.98


@pytest.mark.parametrize("via", ["forward", "generate"])
def test_bench_against_fla(tmp_path: Path, via: str) -> None:
    pytest.importorskip("fla")
    convert(str(MODEL), tmp_path / "out")
    result = benchmark(
        tmp_path / "out", baseline=str(MODEL), lengths=(256, 4096), batch_sizes=(1, 4), via=via, against="fla",
        dtype="bfloat16",
    )  # fmt: skip
    assert result.device == torch.cuda.get_device_name()
    peaks = {(row.model, row.batch_size, row.length): row.peak_memory_bytes for row in result.rows}
    assert peaks["softmax", 4, 4096] - peaks["softmax", 4, 256] > 4 * 3840 * 4 * 2 * 64 * 2 * 2
    assert len(result.attention) == 4 * 4 and all(row.seconds > 0 for row in result.attention)


def test_finetune(tmp_path: Path) -> None:
    convert(str(MODEL), tmp_path / "out", dtype="bfloat16")
    result = finetune(tmp_path / "out", data=documents("train")[:20], seq_len=256, tokens=40_000)
    assert result.stages[0].last_loss < result.stages[0].first_loss


def test_distillation_takes_the_memory_of_plain_lora() -> None:
    """By the allocator, each in a process of its own."""
    ratios = memory_of("plain", "distill", vocabularies=50_304, hidden=1024, layers=8, length=2048, batch=4)
    assert ratios["distill_over_plain_peak"] < 1.25


SIZES = [(16, 16, 64), (32, 32, 80), (32, 8, 128)]  # of Pythia-410M and 2.8B, and of a Llama with grouped heads


def large_inputs(sizes: tuple[int, int, int], length: int, dtype: torch.dtype) -> dict[str, Any]:
    heads, kv_heads, dim = sizes
    x = inputs(length, batch=2, heads=heads, kv_heads=kv_heads, dim=dim, value_dim=dim)
    x["log_decay"], x["feature_decay"] = -0.02 * torch.rand_like(x["gk"]), -FASTEST * torch.rand_like(x["fk"]) ** 4
    x = {name: t.cuda() for name, t in x.items()}
    return {name: t.to(dtype) if name in ("q", "k", "v") else t for name, t in x.items()}


# Half precision: the torch form rounds its near part to it, and the kernels multiply features in TF32.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("window", [0, 64])
@torch.no_grad()
def test_prefill(
    sizes: tuple[int, int, int], window: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    x = large_inputs(sizes, 1000, dtype)
    mask = torch.ones(2, 1000, dtype=torch.bool, device="cuda")
    mask[0, :300] = False
    form = accelerated.chunked_form(x["q"], x["v"])
    assert form is not None and form.__name__ == "prefill"
    found, state = chunked(**x, scaling=sizes[2] ** -0.5, window=window, mask=mask)
    monkeypatch.setattr(accelerated, "MODE", "torch")
    expected, last = chunked(**x, scaling=sizes[2] ** -0.5, window=window, mask=mask)
    assert relative(found[0, :, 300:], expected[0, :, 300:].double()) <= tolerance
    assert relative(found[1], expected[1].double()) <= tolerance
    assert state is not None and last is not None
    sums, wanted = (t.s.double() * t.m.double().exp()[..., None, None] for t in (state, last))
    assert relative(sums, wanted) <= (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("of_features", [False, True])
def test_training_kernels(
    sizes: tuple[int, int, int],
    of_features: bool,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients against those of plain torch in float32, relative to the largest of each tensor."""
    pytest.importorskip("fla")
    x = large_inputs(sizes, 500, dtype)
    if not of_features:
        del x["feature_decay"]
    weight = torch.randn(2, sizes[0], 500, sizes[2], device="cuda")

    def gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
        out, _ = chunked(**leaves, scaling=sizes[2] ** -0.5, window=64)  # type: ignore[arg-type]
        (out.float() * weight).sum().backward()
        return {"out": out.detach(), **{name: t.grad for name, t in leaves.items() if t.grad is not None}}

    form = accelerated.chunked_form(x["q"].clone().requires_grad_(), x["v"])
    assert form is not None and form.__name__ == "train"
    found = gradients(x)
    monkeypatch.setattr(accelerated, "MODE", "torch")
    for name, expected in gradients({name: t.float() for name, t in x.items()}).items():
        assert relative(found[name], expected.double()) <= tolerance, name


@torch.no_grad()
def test_prefill_keeps_little_beside_its_output() -> None:
    """Chunks' states alone: no scores, no delayed copies of keys."""
    pytest.importorskip("triton")
    x = large_inputs((16, 16, 64), 4096, torch.bfloat16)
    chunked(**x, scaling=0.125, window=64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = chunked(**x, scaling=0.125, window=64)
    states = 2 * 16 * (4096 // 64) * 128 * 65 * 4
    assert torch.cuda.max_memory_allocated() - before < 1.5 * (states + out.numel() * out.element_size())


DECODES = ["default", "pure", "paper"]


@pytest.mark.parametrize("recipe", DECODES)
@torch.no_grad()
def test_decode_kernels(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far beyond the window, with a padded row: logits and all that the cache keeps, against plain torch."""
    pytest.importorskip("triton")
    convert(str(MODEL), tmp_path / "out", recipe=recipe)
    model = randomise(load_converted(tmp_path / "out", device=torch.device("cuda"))).eval()
    ids, mask = torch.randint(1, 1000, (2, 400), device="cuda"), torch.ones(2, 300, dtype=torch.long, device="cuda")
    mask[0, :100] = 0
    results = []
    for mode in ("torch", ""):
        monkeypatch.setattr(accelerated, "MODE", "torch")
        cache = StaticCache(config=model.config, max_cache_len=400)
        model(ids[:, :300], attention_mask=mask, past_key_values=cache)
        monkeypatch.setattr(accelerated, "MODE", mode)
        logits = [model(ids[:, n, None], past_key_values=cache).logits for n in range(300, 400)]
        results.append([torch.cat(logits, 1), *(x for layer in cache.layers for x in layer._tensors())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [*DECODES, "window-only"])
def test_generate_records_its_step(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and gives the tokens of the cache that grows; in a second turn, too."""
    recorded = []
    record = cuda_graph.record
    monkeypatch.setattr(cuda_graph, "record", lambda step: recorded.append(1) or record(step))
    convert(str(MODEL), tmp_path / "out", recipe=recipe)
    model = load_converted(tmp_path / "out", device=torch.device("cuda")).eval()
    ids, cache = torch.randint(1, 1000, (2, 200), device="cuda"), None
    for _ in range(2):
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 50, "do_sample": False}
        out = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)
        expected = model.generate(ids, cache_implementation="dynamic", **options)
        assert (out.sequences == expected).float().mean() > 0.98
        cache = out.past_key_values
        assert isinstance(cache, DecodingCache)
        ids = torch.cat([expected, torch.randint(1, 1000, (2, 30), device="cuda")], 1)
    assert len(recorded) == 2


def test_generate_compiles_where_asked(tmp_path: Path) -> None:
    """transformers' own compilation, with the kernels in its graph."""
    convert(str(MODEL), tmp_path / "out")
    model = load_converted(tmp_path / "out", device=torch.device("cuda")).eval()
    options = {"max_new_tokens": 50, "do_sample": False}
    ids = torch.randint(1, 1000, (2, 200), device="cuda")
    found, expected = (model.generate(ids, cache_implementation=each, **options) for each in ("static", "dynamic"))
    assert (found == expected).float().mean() > 0.98
