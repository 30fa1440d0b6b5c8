"""The benchmark for GPUs, whose one run is precious, goes through to its end on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_dry_run(tmp_path: Path) -> None:
    results = gpu.measure(["410m", "2.8b"], 300, tmp_path / "gpu.json", dry=True)
    assert results["errors"] == {} and results["dry_run"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == results
    kinds = {row["row"].split(" against")[0] for row in results["rows"]}
    assert kinds == {
        "generate()", "recorded decode", "compiled decode", "prefill", "attention alone",
        "a training step with kernels",
    }  # fmt: skip
    assert all(entry["ok"] for entry in results["correct"].values()), results["correct"]
    assert all(row["value"] > 0 for row in results["rows"])


def test_an_error_ends_a_section_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And too little time, and a wrong path takes the target away from what it was part of."""
    run = gpu.Run(torch.device("cpu"), gpu.Sizes.tiny(), tmp_path / "gpu.json", True, 1e18)
    run.results = {"correct": {}, "rows": [], "errors": {}, "seconds": {}}

    def broken(run: gpu.Run) -> None:
        raise torch.OutOfMemoryError("too large")

    def slow(run: gpu.Run) -> None:
        while True:
            pass

    def right(run: gpu.Run) -> str:
        run.correct("decode", 1e-5, 1e-3)
        run.correct("prefill", float("nan"), 1e-3)
        run.row("one", 3.0, 2.0, ("decode",))
        run.row("two", 3.0, 2.0, ("decode", "prefill"))
        return "done"

    assert run.section("broken", 60, broken) is None and run.section("slow", 1.1, slow) is None
    assert run.section("late", 0, right) is None and run.section("right", 60, right) == "done"
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [written["errors"][name]["error"].split(":")[0] for name in ("broken", "slow", "late")] == [
        "OutOfMemoryError", "TimeoutError", "TimeoutError",
    ]  # fmt: skip
    assert [row["met"] for row in written["rows"]] == [True, False]
