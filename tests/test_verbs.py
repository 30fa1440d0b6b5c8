"""finetune, eval, generate, bench and demo from the command line: one JSON object each, with the promised fields."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from dijiang_convert import benchmark, convert, demo, generate
from dijiang_convert.checkpoint.loading import load_any
from dijiang_convert.cli import app
from dijiang_convert.data.demo_text import documents
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.timing import cache_bytes
from dijiang_convert.training import schedule


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("verbs") / "demo"
    convert(str(MODEL), out, settings=["window=16", "block=16", "memory=8"])
    return str(out)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": document}) for document in documents("validation")[:4]))
    return str(file)


def run(*arguments: str) -> dict[str, Any]:
    """The one JSON object on stdout."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_finetune(converted: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LEAST_STEPS", 4)
    result = run(
        "finetune", converted, "--data", text, "--tokens", "3000", "--seq-len", "128", "--out", str(tmp_path / "out")
    )
    assert result["out"] == str(tmp_path / "out")
    assert result["seconds"] > 0
    for stage in result["stages"]:
        assert {"name", "tokens", "first_loss", "last_loss", "seconds"} <= stage.keys()
        assert {"tokens_per_second", "peak_memory_bytes"} <= stage.keys()


def test_eval_saves_its_figures_in_the_card(converted: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    before = (folder / "README.md").read_text()
    options = ["--baseline", str(MODEL), "--data", text, "--seq-len", "256", "--max-tokens", "1000"]
    result = run("eval", str(folder), *options)
    assert (folder / "README.md").read_text() == before
    assert run("eval", str(folder), *options, "--save") == result
    readme = (folder / "README.md").read_text()
    for name, title in (("perplexity", "perplexity"), ("top1_agreement", "same choice as the original")):
        assert f"| {title} | {result[name]:.4g} |" in readme
    assert text not in readme and str(tmp_path) not in readme
    done = CliRunner().invoke(app, ["eval", str(MODEL), *options, "--save"])
    assert done.exit_code == 1 and "is not converted yet" in done.stderr


def test_eval_alone_and_against_the_original(converted: str, text: str) -> None:
    options = ["--data", text, "--seq-len", "256", "--max-tokens", "2000"]
    alone = run("eval", converted, *options)
    assert alone["perplexity"] > 1
    assert alone["baseline_perplexity"] is None
    both = run("eval", converted, *options, "--baseline", str(MODEL))
    assert both["perplexity"] == pytest.approx(alone["perplexity"])
    assert both["perplexity_ratio"] == pytest.approx(both["perplexity"] / both["baseline_perplexity"])
    assert both["kl_divergence"] > 0
    assert 0 < both["top1_agreement"] < 1


def test_eval_refuses_another_vocabulary(converted: str, text: str, tmp_path: Path) -> None:
    config = load_any(str(MODEL)).config
    config.vocab_size = 500
    from transformers import GPTNeoXForCausalLM

    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["eval", converted, "--data", text, "--seq-len", "64", "--baseline", str(tmp_path)])
    assert done.exit_code == 1
    assert "vocabulary" in done.stderr


def test_generate_streams_what_it_returns(converted: str) -> None:
    prompt = "def add(a, b):\n    " * 20  # far beyond the window
    result = run("generate", converted, prompt, "--max-new-tokens", "30")
    assert result["prompt"] == prompt
    assert result["tokens"] == 30
    assert result["tokens_per_second"] > 0
    pieces: list[str] = []
    assert generate(converted, prompt, max_new_tokens=30, write=pieces.append).text == result["text"]
    assert "".join(pieces) == prompt + result["text"]
    shown = CliRunner().invoke(app, ["generate", converted, prompt, "--max-new-tokens", "30"])
    assert shown.stdout == prompt + result["text"] + "\n"


def test_generate_sampling_is_repeatable(converted: str) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0}
    one, two, other = (generate(converted, "import ", seed=seed, **options).text for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_generate_refuses_an_empty_prompt(converted: str) -> None:
    done = CliRunner().invoke(app, ["generate", converted, ""])
    assert done.exit_code == 1
    assert "no token" in done.stderr


def test_bench(converted: str, tmp_path: Path) -> None:
    plot = tmp_path / "speed.png"
    options = ["--lengths", "100,300", "--batch-size", "1,2", "--decode-tokens", "8", "--repeats", "2"]
    result = run("bench", converted, "--baseline", str(MODEL), *options, "--plot", str(plot))
    rows = {(row["model"], row["batch_size"], row["length"]): row for row in result["rows"]}
    assert set(rows) == {(model, b, n) for model in ("dijiang", "softmax") for b in (1, 2) for n in (100, 300)}
    for row in rows.values():
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        prefill = row["batch_size"] * row["length"] / row["prefill_tokens_per_second"]
        assert row["time_to_first_token_seconds"] == pytest.approx(prefill)  # generate() tells no more
        assert row["peak_memory_bytes"] > row["cache_bytes"]
    assert rows["dijiang", 1, 100]["cache_bytes"] == rows["dijiang", 1, 300]["cache_bytes"]
    decoded = 8  # tokens after the prompt; 4 layers of 2 heads of 64, keys and values in float32
    assert rows["softmax", 2, 300]["cache_bytes"] == 2 * (300 + decoded) * 4 * 2 * 64 * 2 * 4
    assert "CPU" in result["device"] and result["dtype"] == "float32"
    assert plot.stat().st_size > 5000


def test_bench_shows_times_softmaxs_speed(converted: str) -> None:
    options = ["--lengths", "64", "--decode-tokens", "2", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", converted, "--baseline", str(MODEL), *options])
    ours, theirs = (line for line in done.stdout.splitlines() if " 64 " in line)
    assert "dijiang" in ours and ours.count("×") == 2
    assert "softmax" in theirs and "×" not in theirs


def test_decode_costs_and_keeps_the_same_at_any_length(converted: str) -> None:
    """The shape of every tensor that a step touches is the same at 100 and at 3,000 tokens."""
    model = load_any(converted).eval()
    sizes = []
    for length in (100, 3000):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, length, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
            model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        assert cache.get_seq_length() == length + 1
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1]


def test_bench_refuses_nonsense(converted: str) -> None:
    assert CliRunner().invoke(app, ["bench", converted, "--lengths", "0"]).exit_code == 1


def test_demo_is_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LEAST_STEPS", 2)
    monkeypatch.setitem(demo.__globals__, "LENGTHS", (64, 256))
    monkeypatch.setitem(demo.__globals__, "EVAL_TOKENS", 2000)
    monkeypatch.setitem(benchmark.__globals__, "WARMUP_LENGTH", 16)
    result = run("demo", "--out", str(tmp_path / "demo"), "--tokens", "4096")
    assert {"convert", "untrained", "finetune", "eval", "generate", "bench", "plot"} <= result.keys()
    assert result["eval"]["kl_divergence"] > 0
    assert result["generate"].keys() == {"original", "dijiang"}
    assert Path(result["plot"]).stat().st_size > 10_000
    again = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert again.exit_code == 1
    assert "--force" in again.stderr


def test_eval_tasks_need_lm_eval(converted: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    options = ["--data", text, "--seq-len", "64", "--max-tokens", "200", "--tasks", "arc_easy"]
    done = CliRunner().invoke(app, ["eval", converted, *options])
    assert done.exit_code == 1
    assert done.stderr == "error: --tasks needs lm-eval: pip install 'dijiang-convert[eval]'\n"
