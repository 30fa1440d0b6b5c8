"""The same numbers on a GPU as on the CPU. Skipped without one."""

from pathlib import Path

import pytest
import torch

from dijiang_convert import benchmark, convert, finetune
from dijiang_convert.demo import MODEL
from dijiang_convert.demo_text import documents
from dijiang_convert.models import load_converted
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
