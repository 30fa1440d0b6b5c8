"""What benchmarks/faults.py does, at a handful of moments; and that it sees what it looks for."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults
from benchmarks.fault_cases import Case, Runner, make_cases
from tests.hub import Hub

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


class Trials:
    """Cases that know how long they take, and what they run in."""

    def __init__(self, work: Path, hub: Hub) -> None:
        self.cases, self.run, self.place = make_cases(work, hub), Runner(work), work / "place"

    def __getitem__(self, name: str) -> Case:
        case = self.cases[name]
        if not case.versions:
            faults.undisturbed(case, self.run, self.place)
        return case


@pytest.fixture(scope="module")
def trials(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), hub)


@pytest.mark.parametrize(
    "name, by", [("convert", "time"), ("finetune", "operation"), ("push over an older version", "operation")]
)
def test_a_killed_run_harms_nothing(name: str, by: str, trials: Trials) -> None:
    case, draw = trials[name], random.Random(f"{name} {by}")
    moments = [0.6 * case.seconds] if by == "time" else [draw.randrange(case.operations) for _ in range(2)]
    row = faults.kill_and_run_again(case, trials.run, trials.place, moments, by)
    assert row["faults"] == [], row
    assert faults.summary([row])["kills"] == len(row["phases"]) > 0


@pytest.mark.parametrize("step", ["old moved away", "new in its place", "old half removed"])
def test_a_killed_replacement_harms_nothing(step: str, trials: Trials) -> None:
    """Two renames, then the old folder's files are removed one by one, and the folder itself last."""
    case = trials["convert --force"]
    removed = len(case.old) + 1
    at = case.operations - {"old moved away": removed + 1, "new in its place": removed, "old half removed": 3}[step]
    row = faults.kill_and_run_again(case, trials.run, trials.place, [at], "operation")
    assert row["faults"] == [] and len(row["phases"]) == 1, row


def test_a_full_disk_harms_nothing(trials: Trials, tmp_path: Path) -> None:
    with faults.small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("this user may not mount a disk")
        run = Runner(tmp_path)
        run.temporary = disk / "temporary"
        run.temporary.mkdir()
        for name, level in (("convert", 0.9), ("push", 0.0)):
            case = trials[name]
            row = faults.fill_and_run_again(case, run, disk, round(level * faults.most_taken(case, run, disk)))
            assert row["code"] == 1 and row["faults"] == [], row
            assert "no space left" in row["error"]


def test_it_sees_what_it_looks_for(trials: Trials) -> None:
    case, run = trials["convert"], trials.run
    case.prepare(trials.place)
    out = trials.place / "out"
    assert run(case.arguments(), trials.place) == 0
    assert case.standing() == "new" and faults.verdict(case, run) == []
    weights = next(out.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert case.standing() == "half" and case.corrupt()
    assert faults.verdict(case, run) == ["lost", "different", "corrupt"]  # it is refused, since something stands there
    weights.write_bytes(whole)
    (out / "config.json").unlink()
    (trials.place / ".out.abc.partial").mkdir()
    assert case.standing() == "half" and not case.corrupt()
    assert faults.verdict(case, run) == ["lost", "different", "left"]


def test_results_are_kept_and_not_repeated(trials: Trials, tmp_path: Path) -> None:
    out, place, wanted = tmp_path / "faults.json", trials.place, {"operation": 1}
    content: dict[str, Any] = {"seed": 0, "summary": {}, "runs": [], "disk": []}
    cases = {"convert": trials["convert"]}
    faults.measure_kills(cases, trials.run, place, content, wanted, out)
    kept = json.loads(out.read_text())
    assert kept == content and kept["summary"]["kills"] == len(kept["runs"][0]["phases"]) > 0
    faults.measure_kills({}, trials.run, place, kept, wanted, out)
    assert kept == content
