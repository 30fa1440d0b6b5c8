"""What `dijiang bench` measures with, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dijiang_convert import DijiangError, benchmark, convert
from dijiang_convert.benchmark import WAYS, BenchRow, ratios
from dijiang_convert.checkpoint.loading import load_any
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.timing import peak_memory, random_ids, time_forward, time_generate, weight_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("bench") / "demo"
    convert(str(MODEL), out, recipe="frequency", settings=["window=16", "block=16"])
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


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lengths": ()}, "must be at least 1"),
        ({"batch_sizes": (0,)}, "must be at least 1"),
        ({"via": "magic"}, "--via magic: give generate or forward"),
        ({"device": "nowhere"}, "no device 'nowhere' here"),
        ({"device": "cuda:77"}, "no device 'cuda:77' here"),
        ({"device": "meta"}, "no device 'meta' here"),
        ({"dtype": "float8"}, "no dtype 'float8': give one of float32, float16, bfloat16"),
    ],
)
def test_what_is_refused(converted: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(DijiangError, match=said):
        benchmark(converted, **options)


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


def test_a_softmax_model_is_called_one(converted: str) -> None:
    (row,) = benchmark(str(MODEL), lengths=(64,), decode_tokens=2, repeats=1).rows
    assert row.model == "softmax"
    with pytest.raises(DijiangError, match="is not converted: give the converted checkpoint first"):
        benchmark(str(MODEL), baseline=converted, lengths=(64,))
