"""Where weights lie and how precise they are: `device_map`, half precision, 8 and 4 bits.

Sequences reach far beyond the window of 16 and what the memory holds.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, StaticCache, TorchAoConfig

from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from tests.models import (
    KINDS,
    assert_state_is_float32,
    checkpoint,
    difference,
    feed,
    kernels,
    load,
    logits_of,
    moved_checkpoint,
    randomise,
    root_mean_square,
    tokens,
    typical,
)
from tests.sources_on_disk import llama_config, write_source

TOLERANCE = 1e-4
LENGTH, NEW = 310, 20
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose far part shows in logits."""
    out = tmp_path_factory.mktemp("moved")
    return {kind: moved_checkpoint(kind, out / kind) for kind in KINDS}


# --------------------------------------------------------------------------------------------------------- device_map


def on_disk(model: Any) -> dict[str, str]:
    """A device_map that leaves the last layer, and what comes after it, on disk."""
    body, head = model.base_model_prefix, model.get_output_embeddings()
    places = {name: "cpu" for name, module in model.named_children() if module is head}
    for name, _ in getattr(model, body).named_children():
        places[f"{body}.{name}"] = "disk" if "norm" in name else "cpu"
    del places[f"{body}.layers"]
    return places | {f"{body}.layers.0": "cpu", f"{body}.layers.1": "disk"}


@pytest.mark.parametrize(
    "kind, places",
    [("llama", "auto"), ("llama", "auto with little memory"), ("llama", "explicit"), ("neox", "explicit")],
)
def test_device_map(kind: str, places: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same model where layers are read from disk as they are needed."""
    whole, ids = load(kind), tokens(2, LENGTH)
    options: dict[str, Any] = {"device_map": on_disk(whole) if places == "explicit" else "auto"}
    if places == "auto with little memory":
        options["max_memory"] = {"cpu": sum(p.nbytes for p in whole.parameters()) * 2 // 3}
    model: Any = type(whole).from_pretrained(folders[kind], offload_folder=tmp_path / "offload", **options).eval()
    away = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert any(".dijiang." in name for name in away) == (places != "auto")
    assert len(away) < len(list(model.parameters()))
    expected = logits_of(whole, ids)
    assert difference(logits_of(model, ids), expected) <= TOLERANCE
    assert difference(feed(model, ids, [200, 1])[0], expected) <= TOLERANCE
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, use_cache=False, **GREEDY))


# ---------------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize(
    "kind, variant",
    [
        *(("llama", variant) for variant in ("frequency", "no-memory", "pure", "paper", "partial")),
        ("neox", "frequency"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(kind: str, variant: str, dtype: torch.dtype) -> None:
    """Logits are those of float32 but for what the model's other parts round, and the cache's are those without one."""
    exact = load(kind, variant)
    model: Any = randomise(type(exact).from_pretrained(checkpoint(kind, variant), dtype=dtype)).eval()
    for key, tensor in [*model.state_dict().items(), *model.named_buffers()]:
        in_float32 = ".dijiang." in key or "rotary_emb" in key
        assert tensor.dtype == (torch.float32 if in_float32 else dtype), key
    ids, rounding = tokens(2, LENGTH), torch.finfo(dtype).eps
    full, expected = logits_of(model, ids), logits_of(exact, ids)
    assert full.dtype == dtype
    error = typical if kernels(exact)[0].kernel.memory else root_mean_square
    assert error(full - expected) <= 8 * rounding * expected.std()  # 255 steps a row add to it
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH)):
        found, _ = feed(model, ids, [250, 1], cache)
        assert error(found.float() - full.float()) <= rounding * expected.std()
        assert_state_is_float32(cache)
    made = model.generate(ids, **GREEDY)
    assert made.shape == (2, LENGTH + NEW) and len(made[0, LENGTH:].unique()) >= 3


# ------------------------------------------------------------------------------------------------------ 8 and 4 bits


@pytest.fixture(scope="module", params=[0, 8], ids=["no memory", "memory"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted Llama whose matrices have the sizes that 4 bits come in: blocks of 64 numbers."""
    out = tmp_path_factory.mktemp("wide")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    write_source(out / "source", llama_config(**sizes, initializer_range=0.25))
    settings = ["window=16", "block=16", f"memory={request.param}"]
    convert(str(out / "source"), out / "converted", settings=settings)
    return out / "converted"


def quantised(how: str) -> Any:
    if how == "torchao 8":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=how.endswith("8"), load_in_4bit=how.endswith("4"))


@pytest.mark.parametrize("how", ["bitsandbytes 8", "bitsandbytes 4", "torchao 8"])
def test_quantised_base(how: str, wide: Path, tmp_path: Path) -> None:
    """The base's matrices lose what the source's do; the kernel stays as it was."""
    exact = randomise(load_converted(wide)).eval()
    model: Any = type(exact).from_pretrained(wide, quantization_config=quantised(how)).eval()
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    before, after = exact.state_dict(), {n: p for n, p in model.named_parameters() if ".dijiang." in n}
    assert after.keys() == {n for n, _ in exact.named_parameters() if ".dijiang." in n}
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in after.values())
    randomise(model)
    assert all(torch.equal(p, before[n]) for n, p in after.items())
    ids = tokens(2, LENGTH)
    full, expected = logits_of(model, ids), logits_of(exact, ids)
    soft, soft_exact = (
        logits_of(AutoModelForCausalLM.from_pretrained(wide.parent / "source", **options), ids)
        for options in ({"quantization_config": quantised(how)}, {})
    )
    error = typical if kernels(exact)[0].kernel.memory else root_mean_square
    most = 1.5 * error(soft - soft_exact) / soft_exact.std() * expected.std()
    assert 0 < error(full - expected) <= most
    assert error(feed(model, ids, [200, 1])[0] - full) <= most
    model.save_pretrained(tmp_path)
    after_saving = logits_of(model, ids)  # bitsandbytes may take another way through its 4 bits then, on a CPU
    assert torch.equal(logits_of(type(exact).from_pretrained(tmp_path).eval(), ids), after_saving)
