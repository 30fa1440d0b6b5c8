"""What `dijiang bench` measures with, and what it refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dijiang_convert import DijiangError, benchmark, convert
from dijiang_convert.attention_speed import fla_kernel, forms, layer_call, time_attention
from dijiang_convert.benchmark import WAYS, BenchRow, ratios
from dijiang_convert.demo import MODEL
from dijiang_convert.models import load_any
from dijiang_convert.timing import peak_memory, random_ids, time_forward, time_generate, weight_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("bench") / "demo"
    convert(str(MODEL), out, settings=["window=16"])
    return str(out)


def test_peak_memory_is_what_lives_at_a_time() -> None:
    there_before = torch.ones(1000)

    def call() -> str:
        for _ in range(3):
            torch.ones(500)  # gone before the next
        both = torch.ones(1000), torch.ones(2000)
        return f"{len(both)}"

    assert peak_memory(CPU, call) == ("2", 3000 * 4)
    assert peak_memory(CPU, lambda: there_before.sum().item()) == (1000, 4)


def test_memory_of_a_pass_grows_with_softmax_s_cache(converted: str) -> None:
    grown = {}
    for name in (converted, str(MODEL)):
        model = load_any(name, CPU).eval()
        grown[name] = [
            peak_memory(CPU, lambda n=n, model=model: time_forward(model, random_ids(model, 1, n), 4))[1]  # type: ignore[misc]
            for n in (512, 2048)
        ]
    per_token = 4 * 2 * 64 * 2 * 4  # of the cache
    assert grown[str(MODEL)][1] - grown[str(MODEL)][0] > 1536 * per_token


@pytest.mark.parametrize("way", [time_forward, time_generate])
@pytest.mark.parametrize("source", ["converted", "original"])
def test_a_pass_decodes_as_many_tokens_as_asked(converted: str, way: Any, source: str) -> None:
    model = load_any(converted if source == "converted" else str(MODEL), CPU).eval()
    calls: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = way(model, random_ids(model, 2, 40), 5)
    assert calls == [(2, 40)] + [(2, 1)] * 5
    assert found.decode is not None and found.decode > 0
    assert found.first_token is not None and 0 < found.prefill <= found.first_token
    assert found.cache_bytes > 0


def test_both_ways_find_the_same_cache(converted: str) -> None:
    for name in (converted, str(MODEL)):
        model = load_any(name, CPU).eval()
        ids = random_ids(model, 1, 40)
        assert time_forward(model, ids, 5).cache_bytes == time_generate(model, ids, 5).cache_bytes


def test_dtype_leaves_the_kernel_as_it_is(converted: str) -> None:
    options: dict[str, Any] = {"lengths": (16,), "decode_tokens": 1, "repeats": 1, "device": "cpu"}
    model = load_any(converted, CPU, dtype="bfloat16")
    kinds = {(".dijiang." in name, p.dtype) for name, p in model.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    result = benchmark(converted, baseline=str(MODEL), dtype="bfloat16", **options)
    assert (result.dtype, result.via) == ("bfloat16", "generate")
    softmax = {row.model: row for row in result.rows}["softmax"]
    assert softmax.cache_bytes == (16 + 1) * 4 * 2 * 64 * 2 * 2
    assert softmax.peak_memory_bytes > weight_bytes(load_any(str(MODEL), CPU)) / 2


def test_ratios_are_of_the_same_length_and_batch_size() -> None:
    def row(model: str, batch_size: int, length: int, prefill: float, decode: float | None) -> BenchRow:
        return BenchRow(model, batch_size, length, prefill, decode, None, 0, 0)

    rows = [
        row("dijiang", 1, 8, 6, 9),
        row("dijiang", 2, 8, 1, 1),
        row("softmax", 1, 8, 3, 2),
        row("dijiang", 1, 9, 1, 1),
    ]
    assert ratios(rows) == {(1, 8): (2, 4.5)}
    assert ratios([row("dijiang", 1, 8, 6, None), row("softmax", 1, 8, 3, None)]) == {(1, 8): (2, None)}


# --------------------------------------------------------------------------------------------------- attention alone


def chunk(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, scale: float) -> tuple[Tensor, None]:
    """What a kernel of fla's computes, N × N: [B, N, H, K] each, decays g [B, N, H]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    lost = g.transpose(1, 2).cumsum(-1)
    weights = (q @ k.mT) * scale * (lost[..., :, None] - lost[..., None, :]).exp()
    return (weights.tril() @ v).transpose(1, 2), None


def test_attention_alone_is_that_of_the_layer(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_any(converted, CPU).eval()
    ids = random_ids(model, 2, 80)
    layer, arguments = layer_call(model, ids)
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
        handle.remove()
        found = {name: form() for name, form in forms(model, ids, chunk).items()}
    q, k, v = arguments[:3]
    monkeypatch.setattr("dijiang_convert.modeling.modeling_dijiang.SEGMENT", 32)  # a long prompt goes to it as a whole
    assert layer_call(model, ids)[1][0].shape == q.shape == (2, 2, 80, 64)
    torch.testing.assert_close(found["dijiang"], outputs[0])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~torch.ones(80, 80, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(found["softmax"], scores.softmax(-1) @ v)
    far = (q @ k.mT / q.shape[-1] ** 0.5) * (-(torch.arange(80)[:, None] - torch.arange(80)) / 256).exp()
    torch.testing.assert_close(found["fla"][0].transpose(1, 2), far.tril() @ v)
    assert found["fla, features"][0].shape == (2, 80, 2, 64)


def test_attention_alone_is_timed_for_every_form(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.__globals__, "fla_kernel", lambda device: chunk)
    options: dict[str, Any] = {"lengths": (20, 40), "batch_sizes": (1, 2), "decode_tokens": 1, "repeats": 2}
    rows = benchmark(converted, against="fla", device="cpu", **options).attention
    models = ("dijiang", "softmax", "fla", "fla, features")
    assert {(r.model, r.batch_size, r.length) for r in rows} == {
        (m, b, n) for m in models for b in (1, 2) for n in (20, 40)
    }
    assert all(r.tokens_per_second == pytest.approx(r.batch_size * r.length / r.seconds) for r in rows)


def test_fla_gets_keys_of_every_query_head(tmp_path: Path) -> None:
    """Its kernels know no groups."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    convert(str(tmp_path / "llama"), tmp_path / "converted", settings=["window=4"])
    shapes: list[tuple[int, ...]] = []

    def kernel(*tensors: Tensor, g: Tensor, scale: float) -> None:
        shapes.extend(tuple(x.shape) for x in (*tensors, g))

    time_attention(load_any(str(tmp_path / "converted"), CPU).eval(), [(1, 12)], 1, kernel)
    own, features = [(1, 12, 4, 16)] * 3 + [(1, 12, 4)], [(1, 12, 4, 32)] * 2 + [(1, 12, 4, 16), (1, 12, 4)]
    assert shapes == 2 * (own + features)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lengths": ()}, "must be at least 1"),
        ({"batch_sizes": (0,)}, "must be at least 1"),
        ({"via": "magic"}, "--via magic: give generate or forward"),
        ({"against": "flash"}, "--against flash: only fla is known"),
        ({"against": "fla", "device": "cpu"}, "--against fla needs a CUDA device, and this is cpu"),
        ({"device": "nowhere"}, "no device 'nowhere' here"),
        ({"device": "cuda:77"}, "no device 'cuda:77' here"),
        ({"device": "meta"}, "no device 'meta' here"),
        ({"dtype": "float8"}, "no dtype 'float8': give one of float32, float16, bfloat16"),
    ],
)
def test_what_is_refused(converted: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DijiangError, match=said):
        benchmark(converted, **options)


def test_fla_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(DijiangError, match="pip install flash-linear-attention"):
        fla_kernel(torch.device("cuda"))


def test_attention_alone_needs_a_converted_layer() -> None:
    model = load_any(str(MODEL), CPU).eval()
    with pytest.raises(DijiangError, match="no converted layer"):
        time_attention(model, [(1, 8)], 1, chunk)


def test_too_little_memory_is_one_line(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any, ids: Tensor, tokens: int) -> Any:
        if ids.shape[1] == 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return time_forward(model, ids, tokens)

    monkeypatch.setitem(WAYS, "generate", full)
    with pytest.raises(DijiangError, match="dijiang at 300 tokens and batch size 2: the GPU has too little memory"):
        benchmark(converted, lengths=(300,), batch_sizes=(2,))


def test_softmax_is_timed_with_sdpa(converted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    sdpa = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape[2])
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    model = load_any(str(MODEL), CPU).eval()
    time_forward(model, random_ids(model, 1, 30), 2)
    assert calls == [30] * 4 + [1] * 8
