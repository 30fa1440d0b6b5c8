"""Kills convert, finetune and push at random moments and runs the same command again; then fills the disk under them.

    python benchmarks/faults.py --kills 200 --operations 100 --seed 0 --out benchmarks/results/faults.json

A kill is SIGKILL, at a time drawn uniformly over the duration of an undisturbed run, or, for the windows that are too
short to be hit so, at a drawn file operation (of a push: at a drawn request). A third of the runs are killed again when
they are run again. Then, or if the disk was full, the command must end with the bytes of an undisturbed run. This says
nothing of power cuts: what the system was told to write, it keeps here. Runs that are in OUT are not repeated.

half-written: what stands under the final name is neither nothing, nor the whole old result, nor the whole new one.
corrupt: weights that can't be read, or a source that has changed. lost: the command does not get to its end any more.
different: it ends with other bytes. left: something else lies beside the result. untold: no error of one line.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.fault_cases import Case, Runner, make_cases
from tests.hub import Hub

FAULTS = ("half-written", "corrupt", "lost", "different", "left")
LEVELS = (0.0, 0.02, 0.1, 0.3, 0.6, 0.8, 0.95)  # free space, as a share of what the command takes at most
DISK = 64 << 20  # bytes of the small disk


# ------------------------------------------------------------------------------------------------------------- kills


def undisturbed(case: Case, run: Runner, place: Path) -> None:
    """Runs a case to its end: what it leaves, and how long it takes."""
    case.operations = 0
    if case.verb == "finetune":  # the result as it is before the report
        case.prepare(place)
        assert run([*case.arguments(), "--no-report"], place) == 0, run.log
        case.remember()
    case.prepare(place)
    start = time.perf_counter()
    with case.watch(lambda: None, -1):
        assert run(case.arguments(), place) == 0, run.log
    case.seconds = time.perf_counter() - start
    case.remember()
    if case.verb != "push":
        case.operations = int(Path(f"{run.log_file}.count").read_text())
    assert not case.left() and not case.corrupt(), case.left()


def kill_after(case: Case, run: Runner, seconds: float) -> bool:
    """Whether a run of the case was killed before its end, so many seconds after its start."""
    process = run.start(case.arguments(), case.place)
    process.join(seconds)
    process.kill()
    process.join()
    return bool(process.exitcode == -signal.SIGKILL)


def kill_at(case: Case, run: Runner, operation: int) -> bool:
    """Whether a run of the case was killed before its end, at a file operation or request."""
    process = run.start(case.arguments(), case.place, operation if case.verb != "push" else None)
    with case.watch(process.kill, operation):
        process.join()
    return bool(process.exitcode == -signal.SIGKILL)


def finish(case: Case, run: Runner) -> bool:
    """Whether the command, run again as it or its error says, gets to its end."""
    for _ in range(3):
        if run(case.arguments(), case.place) == 0:
            return True
        if "exists and is not empty" in run.error or "is finished" in run.error:
            return case.standing() == "new"  # the kill came after the result was in its place
        if "--resume" not in run.error:
            return False
        case.resume = "run without --resume" not in run.error
    return False


def verdict(case: Case, run: Runner) -> list[str]:
    """The faults of a case that was disturbed, once it is run again."""
    found = [] if finish(case, run) else ["lost"]
    checks = {
        "different": case.result() != case.versions[-1],
        "corrupt": case.corrupt(),
        "left": bool(case.left()),
    }
    return [*found, *(name for name, wrong in checks.items() if wrong)]


def kill_and_run_again(case: Case, run: Runner, place: Path, moments: Sequence[float | int], by: str) -> dict[str, Any]:
    """The phases in which a case was killed, and the faults that were found.

    moments: seconds by "time", or numbers of operations by "operation"; one for the first run, the next for the second.
    """
    case.prepare(place)
    phases, faults = [], set[str]()
    for moment in moments:
        if not (kill_after(case, run, moment) if by == "time" else kill_at(case, run, int(moment))):
            break
        phases.append(case.phase())
        if case.standing() == "half":
            faults.add("half-written")
        if case.corrupt():
            faults.add("corrupt")
        case.resume = case.verb == "finetune" and (place / "out.run").exists() and case.standing() != "new"
    faults.update(verdict(case, run))
    told = {"error": run.error or run.log[-300:], "left": case.left()} if faults else {}
    return {"case": case.name, "by": by, "phases": phases, "faults": sorted(faults), **told}


# --------------------------------------------------------------------------------------------------------- full disk


@contextmanager
def small_disk(folder: Path, size: int = DISK) -> Iterator[Path | None]:
    """A disk of its own in the memory, mounted at a folder; None where this user may mount nothing."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def most_taken(case: Case, run: Runner, disk: Path) -> int:
    """The bytes that an undisturbed run takes at most."""
    case.prepare(disk / "place")
    before = least = shutil.disk_usage(disk).free
    process = run.start(case.arguments(), disk)
    while process.is_alive():
        least = min(least, shutil.disk_usage(disk).free)
        time.sleep(0.002)
    assert process.exitcode == 0, run.log
    return before - least


def fill_and_run_again(case: Case, run: Runner, disk: Path, free: int) -> dict[str, Any]:
    """How a case ends with so many bytes left on its disk, and the faults that were found."""
    case.prepare(disk / "place")
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - free, 1))
    code = run(case.arguments(), case.place)
    error, log = run.error.replace(f"{disk}{os.sep}", ""), run.log
    standing, faults = case.standing(), set[str]()
    if code not in (0, 1) or (code == 1 and (not error or "unexpected" in error)):
        faults.add("untold")
    if standing == "half" or (standing == "new") != (code == 0):
        faults.add("half-written")
    case.resume = (case.place / "out.run").exists()
    if case.left() not in ([], ["out.run"] if case.verb == "finetune" else []):
        faults.add("left")
    filler.unlink()
    faults.update(verdict(case, run))
    told = {"log": log[-500:], "again": run.log[-300:], "beside": case.left()} if faults else {}
    return {"case": case.name, "free": free, "code": code, "error": error, "faults": sorted(faults), **told}


# -------------------------------------------------------------------------------------------------------- the script


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Kills by what was killed, how and when, and the number of runs with each fault."""
    killed = [(row, phase) for row in rows for phase in row.get("phases", [])]
    counts = {
        "case": Counter(row["case"] for row, _ in killed),
        "by": Counter(row["by"] for row, _ in killed),
        "phase": Counter(f"{row['case'].split()[0]}: {phase}" for row, phase in killed),
    }
    faults = {fault: sum(fault in row["faults"] for row in rows) for fault in FAULTS}
    return {"kills": len(killed), **{name: dict(sorted(count.items())) for name, count in counts.items()}, **faults}


def save(out: Path | None, content: dict[str, Any]) -> None:
    """Writes the results so far, one line a run."""
    if out is None:
        return
    parts = [f"{json.dumps(k)}: {json.dumps(v, indent=1)}" for k, v in content.items() if not isinstance(v, list)]
    for name, rows in content.items():
        if isinstance(rows, list):
            parts.append(f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
    out.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def measure_kills(
    cases: dict[str, Case], run: Runner, place: Path, content: dict[str, Any], wanted: dict[str, int], out: Path | None
) -> None:
    """Goes through the cases in turn until there are as many kills of each sort as ``wanted``."""
    ready = set[str]()
    for by, count in wanted.items():
        names = [*cases]
        mine = [row for row in content["runs"] if row["by"] == by]
        while sum(len(row["phases"]) for row in mine) < count:
            case = cases[names[len(mine) % len(names)]]
            if case.name not in ready:
                undisturbed(case, run, place)
                ready.add(case.name)
            draw = random.Random(f"{content['seed']} {by} {len(mine)}")
            times = range(draw.choice((1, 1, 2)))
            moments = [
                draw.uniform(0, case.seconds) if by == "time" else draw.randrange(case.operations) for _ in times
            ]
            row = kill_and_run_again(case, run, place, moments, by)
            mine.append(row)
            content["runs"].append(row)
            content["summary"] = summary(content["runs"])
            save(out, content)
            print(row, flush=True)


def measure_disk(cases: dict[str, Case], run: Runner, work: Path, content: dict[str, Any], out: Path | None) -> None:
    """Fills the disk to every level under some of the cases."""
    with small_disk(work / "disk") as disk:
        content["disk_summary"] = "skipped: this user may not mount a disk" if disk is None else {}
        if disk is None:
            return
        run.temporary = disk / "temporary"
        for case in (each for name, each in cases.items() if "--link" not in name and "auto" not in name):
            done = [row for row in content["disk"] if row["case"] == case.name]
            if len(done) == len(LEVELS):
                continue
            run.temporary.mkdir(exist_ok=True)
            if not case.versions:
                undisturbed(case, run, disk / "place")
            most = most_taken(case, run, disk)
            for level in LEVELS[len(done) :]:
                row = {"level": level, **fill_and_run_again(case, run, disk, round(level * most))}
                content["disk"].append(row)
                save(out, content)
                print(row, flush=True)
    names = (*FAULTS, "untold")
    counts = {fault: sum(fault in row["faults"] for row in content["disk"]) for fault in names}
    refused = sum(row["code"] == 1 for row in content["disk"])
    content["disk_summary"] = {"runs": len(content["disk"]), "refused": refused, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="at drawn times")
    parser.add_argument("--operations", type=int, default=100, help="kills at drawn file operations and requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", help="names of cases, all by default")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    content: dict[str, Any] = {"seed": args.seed, "summary": {}, "disk_summary": {}, "runs": [], "disk": []}
    if args.out and args.out.is_file():
        content |= json.loads(args.out.read_text())
    with Hub() as hub, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1",
            "HF_HOME": str(work / "disk" / "home"), "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip
        cases = make_cases(work, hub)
        cases = {name: case for name, case in cases.items() if name in (args.cases or cases)}
        run = Runner(work)
        wanted = {"time": args.kills, "operation": args.operations}
        measure_kills(cases, run, work / "place", content, wanted, args.out)
        measure_disk(cases, run, work, content, args.out)
    save(args.out, content)
    print(json.dumps({"summary": content["summary"], "disk": content["disk_summary"]}, indent=1))


if __name__ == "__main__":
    main()
