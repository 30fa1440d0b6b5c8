"""The same numbers on a GPU as on the CPU. Skipped without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from dijiang_convert import convert, finetune
from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from tests.modeling import naive
from tests.modeling.forms import LOGITS, SMALL, both_sides, by_blocks, by_token, inputs, relative
from tests.models import randomise
from tests.training.test_losses import memory_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RECIPES = ["default", "frequency", "pure", "paper", "window-only"]


def loaded(tmp_path: Path, recipe: str, device: str = "cuda") -> Any:
    if not (tmp_path / "out").exists():
        convert(str(MODEL), tmp_path / "out", recipe=recipe)
    return randomise(load_converted(tmp_path / "out")).to(device).eval()


@pytest.mark.parametrize("form", [by_blocks, by_token, both_sides])
@torch.no_grad()
def test_kernel(form: Any) -> None:
    """The forms of the table against the definition: in float32, products may be in TF32."""
    x = inputs(391)
    found = form(x.map(lambda t: t.float().cuda()), SMALL)
    found = found if isinstance(found, torch.Tensor) else found[0]
    assert relative(found.cpu(), naive.table(x, SMALL, LOGITS, causal=form is not both_sides)) <= 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_and_tokens(tmp_path: Path, recipe: str) -> None:
    ids = torch.randint(1, 1000, (2, 300))
    logits, texts = [], []
    for device in ("cpu", "cuda"):
        model = loaded(tmp_path, recipe, device)
        with torch.no_grad():
            logits.append(model(ids.to(device)).logits.cpu())
        texts.append(model.generate(ids.to(device), max_new_tokens=40, do_sample=False).cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)
    assert (texts[0] == texts[1]).float().mean() > 0.98


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_decoding_with_a_static_cache(tmp_path: Path, recipe: str) -> None:
    """Far beyond the window, with a padded row: logits and all that the cache keeps, against the CPU."""
    ids, mask = torch.randint(1, 1000, (2, 400)), torch.ones(2, 300, dtype=torch.long)
    mask[0, :100] = 0
    results = []
    for device in ("cpu", "cuda"):
        model = loaded(tmp_path, recipe, device)
        cache = StaticCache(config=model.config, max_cache_len=400)
        model(ids[:, :300].to(device), attention_mask=mask.to(device), past_key_values=cache)
        logits = [model(ids[:, n, None].to(device), past_key_values=cache).logits for n in range(300, 400)]
        results.append(
            [x.cpu() for x in (torch.cat(logits, 1), *(t for layer in cache.layers for t in layer._tensors()))]
        )
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_generate_compiles_where_asked(tmp_path: Path, recipe: str) -> None:
    """transformers' own compilation of the step, which records it."""
    model = loaded(tmp_path, recipe)
    options = {"max_new_tokens": 100, "do_sample": False}
    ids = torch.randint(1, 1000, (2, 200), device="cuda")
    found, expected = (model.generate(ids, cache_implementation=each, **options) for each in ("static", "dynamic"))
    assert (found == expected).float().mean() > 0.98


def test_finetune(tmp_path: Path) -> None:
    convert(str(MODEL), tmp_path / "out", dtype="bfloat16")
    result = finetune(tmp_path / "out", data=documents("train")[:20], seq_len=256, tokens=40_000)
    assert result.stages[0].last_loss < result.stages[0].first_loss


def test_distillation_takes_the_memory_of_plain_lora() -> None:
    """By the allocator, each in a process of its own."""
    ratios = memory_of("plain", "distill", vocabularies=50_304, hidden=1024, layers=8, length=2048, batch=4)
    assert ratios["distill_over_plain_peak"] < 1.25
