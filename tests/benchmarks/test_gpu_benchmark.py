"""The benchmark for GPUs, whose one run is precious, goes through to its end on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import gpu, readme


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    results = gpu.measure(["410m"], gpu.TINY_RECIPES, 300, out, dry=True)
    assert json.loads(out.read_text()) == results
    return results


def test_dry_run(dry_run: dict[str, Any]) -> None:
    assert dry_run["errors"] == {} and dry_run["dry_run"]
    found = {(row["row"], row["model"]) for row in dry_run["rows"]}
    kinds = ("prefill", "decoding", "training step", "decoding, compiled")
    assert found == {(kind, model) for kind in kinds for model in ("softmax", *gpu.TINY_RECIPES)}
    paths = {name.split()[0] for name in dry_run["correct"]}
    assert paths == {"prefill", "pieces", "train", "decode", "compiled"}
    assert all(entry["ok"] for entry in dry_run["correct"].values()), dry_run["correct"]
    assert all(entry["error"] < 1e-5 for name, entry in dry_run["correct"].items() if "float32" in name)
    assert all(row["tokens_per_second"] > 0 and row["right"] for row in dry_run["rows"])
    assert dry_run["compiled"] and all(use["calls"] and use["graphs"] for use in dry_run["compiled"].values())


def test_the_table_has_every_row(dry_run: dict[str, Any]) -> None:
    _, _, header, _, *lines = readme.gpu_table(dry_run).splitlines()
    assert header.count("|") == 8 and "`frequency`, window 8, block 8, sinks 2, memory 8" in header
    assert len(lines) == 2 + 4 + 1 + 2 and all("  |" not in line for line in lines)
    dry_run["rows"][1]["right"] = False
    assert readme.gpu_table(dry_run).splitlines()[4].endswith(" |  |  |")


def test_decoding_that_was_not_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = gpu.Run(torch.device("cpu"), gpu.Sizes.tiny(), None, 1e18)
    models = gpu.make_models(run, gpu.TINY, gpu.TINY_RECIPES, tmp_path / "models", torch.float32)
    monkeypatch.setattr(gpu, "compiled_options", lambda run: {"cache_implementation": "static"})
    with pytest.raises(RuntimeError, match="did not compile"):
        gpu.measure_compiled(run, "tiny", "softmax", models["softmax"])
    assert run.results["rows"] == [] and counters["stats"]["unique_graphs"] == 0


def test_an_error_ends_a_section_alone(tmp_path: Path) -> None:
    """And too little time, and a figure does not count whose path is wrong, or was not looked at."""
    run = gpu.Run(torch.device("cpu"), gpu.Sizes.tiny(), tmp_path / "gpu.json", 1e18)

    def broken(run: gpu.Run) -> None:
        raise torch.OutOfMemoryError("too large")

    def slow(run: gpu.Run) -> None:
        while True:
            pass

    def right(run: gpu.Run) -> str:
        run.correct("decode in float32", 1e-5, 1e-3)
        run.correct("prefill in float32", 1e-5, 1e-3)
        run.correct("prefill in bfloat16", float("nan"), 1e-3)
        for path in ("decode", "prefill", "train"):
            run.row("one", path, 3.0)
        return "done"

    assert run.section("broken", 60, broken) is None and run.section("slow", 1.1, slow) is None
    assert run.section("late", 0, right) is None and run.section("right", 60, right) == "done"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [written["errors"][name]["error"].split(":")[0] for name in ("broken", "slow", "late")] == [
        "OutOfMemoryError", "TimeoutError", "TimeoutError",
    ]  # fmt: skip
    assert [row["right"] for row in written["rows"]] == [True, False, False]
