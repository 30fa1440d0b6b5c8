"""Writes what README.md and docs/ show of benchmarks/results: the parts between marks, and docs/speed.png.

python benchmarks/readme.py
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from dijiang_convert.benchmark import draw_panels
from dijiang_convert.show import A100_SPEED
from dijiang_convert.training.estimate import duration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import encoders
from benchmarks.fidelity import beyond, positions, report
from benchmarks.tasks import LENGTHS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What `dijiang convert` is given for each way of benchmarks/real.py.
GIVEN = {
    "calibrated": "`--calibrate`",
    "equal": "no option",
    "auto:3": "`--layers auto:3`",
    "auto:5": "`--layers auto:5`",
    "small": "`--set window=64 --set memory=64`",
    "frequency": "`--recipe frequency --calibrate`",
    "pure": "`--recipe pure`",
}
# What the rows of fidelity-smollm2.jsonl are, and their cache as a share of the original's at 8,192 tokens: of ours as
# `dijiang inspect` has it; of others a row of 16 bits is 1 of 8192, and Hedgehog's state takes the bytes of 130 rows.
PEERS = {
    "default": ("`default`, equal shares", 0.081),
    "lolcats:window=512,memory=0": ("LoLCATs, window 512", 642 / 8192),
    "lola:window=256,memory=256": ("LoLCATs with LoLA's memory: window 256 to 319, memory 256", 706 / 8192),
    "sinks:window=640,memory=0": ("StreamingLLM: the last 640 tokens and 4 sinks", 644 / 8192),
    "gsa": ("gated slot attention, 64 slots", 128 / 8192),
    "pure": ("`pure`, the state alone", 0.016),
    "paper": ("`paper`", 0.024),
}
# What the folders that tasks.py was given are.
TASKED = {"smollm2": "softmax", "calibrated": "`--calibrate`", "auto-5": "`--layers auto:5`"}
Rows = list[dict[str, Any]]
Speeds = dict[str, dict[int, float]]  # tokens a second, by model and length


def main() -> None:
    for (file, mark), text in parts().items():
        report.write_between(ROOT / file, mark, text)
    content = read("speed-cpu.json")
    panels = {title: speeds(content[part]) for title, part in (("decoding", "decode"), ("prefill", "prefill"))}
    lines = {title: {in_plot(name): each for name, each in found.items()} for title, found in panels.items()}
    draw_panels(lines, ROOT / "docs" / "speed.png")


def parts() -> dict[tuple[str, str], str]:
    """What belongs between the marks, by file and mark."""
    speed = read("speed-cpu.json")
    found = {
        ("README.md", "first"): first_table(read("smollm2.json")["rows"]),
        ("README.md", "sizes"): sizes_table(read("sizes.json")),
        **{("README.md", f"real-{length}"): real_table(length) for length in (2048, 8192)},
        ("README.md", "tasks"): tasks_table(read("smollm2-tasks.json")),
        ("README.md", "peers"): peers_table(report.load([RESULTS / "fidelity-smollm2.jsonl"])),
        ("README.md", "speed"): f"{setting(speed)}\n\n{speed_table(speed)}",
        ("docs/speed.md", "cpu"): f"{setting(speed)}\n\n{speed_table(speed)}\n{growth_table(speed)}",
        ("docs/speed.md", "conversion"): conversion_table(read("conversion.json")),
        ("docs/speed.md", "startup"): startup_table(read("conversion.json")["startup"]),
        ("docs/encoders.md", "encoders"): encoders.table(read("encoders.json")["rows"]),
    }
    if (RESULTS / "gpu.json").exists():
        found["docs/speed.md", "gpu"] = gpu_table(read("gpu.json"))
    for name in ("stories", "books"):
        runs = report.load([RESULTS / f"fidelity-{name}.jsonl"])
        found |= {
            ("benchmarks/notebook.md", name): fidelity(runs, report.COLUMNS),
            ("benchmarks/notebook.md", f"positions-{name}"): positions.table(read(f"positions-{name}.json")),
            ("docs/long-context.md", f"beyond-{name}"): beyond.table(read(f"beyond-{name}.json")),
        }
    return found


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def fidelity(runs: Rows, columns: tuple[str, ...]) -> str:
    return f"The original's perplexity is {runs[0]['original']:.2f}.\n\n{report.table(runs, columns)}\n"


def first_table(rows: Rows) -> str:
    """What a user wants to know first: models converted in two ways, not trained, beside the original."""
    found = {(row["way"], row["length"]): row for row in rows if not row["tokens"]}
    lengths = sorted({length for way, length in found if way == "auto:5"})
    whole, part = ([found[way, length] for length in lengths] for way in ("calibrated", "auto:5"))
    held = f"{part[0]['cache_share']:.0%}, and that of {len(part[0]['softmax'])} layers grows"
    lines = [
        [
            "bytes of the cache of 8,192 tokens",
            "100%, and it grows",
            f"{whole[0]['cache_share']:.0%}, and it doesn't grow",
            held,
        ]
    ]
    for length, *both in zip(lengths, whole, part, strict=True):
        ratios = (f"{row['perplexity_ratio']:.1%}" for row in both)
        lines.append([f"perplexity on texts of {length:,} tokens", "100%", *ratios])
    for length, *both in zip(lengths, whole, part, strict=True):
        for distance in ("256", "1024", "1900", "4000"):
            if distance in both[0]["recall"]:
                accuracies = [both[0]["baseline_recall"][distance], *(row["recall"][distance] for row in both)]
                told = f"repeats random tokens read {int(distance):,} before, in a text of {length:,}"
                lines.append([told, *(f"{each['accuracy']:.0%}" for each in accuracies)])
    return markdown(["", "softmax", "`--calibrate`", "`--layers auto:5`"], lines)


def sizes_table(found: dict[str, Any]) -> str:
    """What models of usual sizes take to convert and to finetune, and what their cache becomes."""
    lines = []
    for name, size in found.items():
        seconds = size["finetune_operations"] / A100_SPEED
        lines.append([
            f"`{name}`", gigabytes(size["weights_bytes"]), gigabytes(size["finetune_bytes"]), duration(seconds),
            f"{gigabytes(size['kv_cache_bytes_at']['8192'])}, now {gigabytes(size['state_bytes'])}",
        ])  # fmt: skip
    header = [
        "model",
        "to download, and on disk once more",
        "memory to finetune",
        "time of that",
        "cache at 8,192 tokens",
    ]
    return markdown(header, lines)


def real_table(length: int) -> str:
    """What a real model loses and repeats in texts of so many tokens, by how it was converted and on how many it was
    trained."""
    rows = [row for row in read("smollm2.json")["rows"] if row["length"] == length]
    distances = list(rows[0]["recall"])
    header = ["`dijiang convert`", "cache at 8,192", "trained on", "perplexity", "in the last eighth", "KL a token"]
    header += [f"repeats, {int(distance):,} ago" for distance in distances]
    lines = [["softmax", "1", "", "1", "1", "0", *(told(rows[0]["baseline_recall"][d]) for d in distances)]]
    for row in sorted(rows, key=lambda row: row["tokens"]):
        lines.append([
            GIVEN[row["way"]], f"{row['cache_share']:.3f}", f"{row['tokens'] // 1000}K" if row["tokens"] else "nothing",
            f"{row['perplexity_ratio']:.3f}", f"{row['ratio_by_position'][-1]:.3f}", f"{row['kl_divergence']:.4f}",
            *(told(row["recall"][d]) for d in distances),
        ])  # fmt: skip
    return markdown(header, lines)


def peers_table(runs: Rows) -> str:
    """Ours and what others have published, on a real model, trained on the same text. The nearest comes first."""
    distances = list(runs[0]["recall"])
    header = ["layer", "cache at 8,192", "untrained", "trained", "in the last eighth", "KL a token"]
    header += [f"repeats, {int(distance):,} ago" for distance in distances]
    lines = []
    for run in sorted(runs, key=lambda run: run["kl"]):
        name, share = PEERS[run["row"]]
        figures = [run["untrained"]["ratio"], run["ratio"], run["ratio_by_position"][-1]]
        lines.append([
            name, f"{share:.3f}", *(f"{x:,.0f}" if x >= 100 else f"{x:.3f}" for x in figures), f"{run['kl']:.4f}",
            *(told(run["recall"][d]) for d in distances),
        ])  # fmt: skip
    return markdown(header, lines)


def tasks_table(found: dict[str, Any]) -> str:
    """What tasks.py has measured, of the original first."""
    lines = []
    for task, words in (("pass_key", "finds a pass key"), ("pairs", "finds the number of a name")):
        for length in LENGTHS:
            right = [f"{each[f'{task} {length}']:.0%}" for each in found.values()]
            lines.append([f"{words} in {length:,} tokens", *right])
    return markdown(["", *(TASKED[name] for name in found)], lines)


def told(recall: dict[str, float]) -> str:
    return f"{round(recall['gain'], 1) + 0:.1f} nats, {recall['accuracy']:.0%}"  # + 0: there is no −0


def setting(content: dict[str, Any]) -> str:
    """What was measured, and on what."""
    model, machine = content["model"], content["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    quick = "This is from a quick run, at a sixteenth of the lengths and few turns. " if content["quick"] else ""
    return (
        f"{quick}{model['parameters'] / 1e6:.1f}M parameters ({model['type']}, {model['layers']} layers of "
        f"{model['hidden']} numbers, {model['heads']} heads), random weights, float32, batch size 1, on "
        f"{threads} of {machine['cpu']} with torch {machine['torch']}:"
    )


def speeds(rows: Rows) -> Speeds:
    found: Speeds = {}
    for row in rows:
        found.setdefault(row["model"], {})[row["length"]] = row["tokens_per_second"]
    return found


def speed_table(content: dict[str, Any]) -> str:
    """Tokens a second of every model and what its cache takes, and how many times softmax's they are."""
    recipes = [name for name in speeds(content["prefill"]) if name != "softmax"]
    lines = []
    for what, part in (("prefill, tokens a second", "prefill"), ("decoding, tokens a second", "decode")):
        found = speeds(content[part])
        for n in found["softmax"]:
            cells = [what, f"{n:,}", number(found["softmax"][n])]
            for name in recipes:
                cells += [number(found[name][n]), times(found[name][n] / found["softmax"][n])]
            lines.append(cells)
    sizes = {(row["model"], row["length"]): row["cache_bytes"] for row in content["decode"]}
    for n in sorted({n for _, n in sizes}):
        of_softmax = sizes["softmax", n]
        cells = ["cache", f"{n:,}", megabytes(of_softmax)]
        for name in recipes:
            cells += [megabytes(sizes[name, n]), times(sizes[name, n] / of_softmax)]
        lines.append(cells)
    header = ["", "tokens", "softmax"] + [cell for name in recipes for cell in (label(name), "to softmax")]
    return markdown(header, lines)


def growth_table(content: dict[str, Any]) -> str:
    """Prefill's time and decoding's speed at the longest length over those at the shortest."""
    prefill, decode = speeds(content["prefill"]), speeds(content["decode"])
    short, *_, long = sorted(prefill["softmax"])
    first, *_, last = sorted(decode["softmax"])
    header = [
        "",
        f"prefill's time, {long:,} over {short:,} tokens",
        f"decoding's speed, {last:,} over {first:,} tokens",
    ]
    lines = [
        [label(name), f"{long / prefill[name][long] / (short / prefill[name][short]):.1f}",
         f"{decode[name][last] / decode[name][first]:.2f}"]
        for name in prefill
    ]  # fmt: skip
    return markdown(header, [["linear prefill, constant decoding", f"{long / short:.0f}", "1"], *lines])


def gpu_table(content: dict[str, Any]) -> str:
    """Tokens a second of every model, of paths that were found to be right, and how many times softmax's they are."""
    found: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in content["rows"]:
        speeds = found.setdefault((row["row"], row["shape"], row["batch"], row["length"]), {})
        if row["right"]:
            speeds[row["model"]] = row["tokens_per_second"]
    recipes = list(dict.fromkeys(row["model"] for row in content["rows"] if row["model"] != "softmax"))
    lines = []
    for (what, shape, batch, length), speeds in found.items():
        cells = [what, shape, str(batch), f"{length:,}", number(speeds["softmax"]) if "softmax" in speeds else ""]
        for name in recipes:
            cells += [number(speeds[name]) if name in speeds else ""]
            cells += [times(speeds[name] / speeds["softmax"]) if {name, "softmax"} <= speeds.keys() else ""]
        lines.append(cells)
    header = ["tokens a second", "model", "batch", "tokens", "softmax"]
    header += [cell for name in recipes for cell in (label(name), "to softmax")]
    versions = content["versions"]
    setting = f"On one {content['gpu']}, bfloat16, torch {versions['torch']}, CUDA {versions['cuda']}:"
    return f"{setting}\n\n{markdown(header, lines)}"


def conversion_table(content: dict[str, Any]) -> str:
    header = ["weights", "`cp -r`", "`dijiang convert`", "to `cp -r`", "start-up of that", "`--link`", "peak memory"]
    lines = []
    for found in content.values():
        if isinstance(found, dict) and "bytes" in found:  # a size, and not what it was measured with
            cp, convert, startup = (found[f"{what}_seconds"] for what in ("cp", "convert", "startup"))
            link = f"{found['link_seconds']:.1f} s" if "link_seconds" in found else ""
            took = [f"{cp:.1f} s", f"{convert:.1f} s", times(convert / cp), f"{startup:.1f} s", link]
            lines.append([f"{found['bytes'] / 1e9:.1f} GB", *took, megabytes(found["peak_memory_bytes"])])
    return markdown(header, lines)


def startup_table(found: dict[str, float]) -> str:
    names = {"help": "`dijiang --help`", "inspect": "`dijiang inspect`", "imports": "Python alone, importing the class"}
    return markdown(["", "seconds"], [[names[name], f"{seconds:.2f}"] for name, seconds in found.items()])


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def label(name: str) -> str:
    """A recipe, and its settings: frequency:window=64,memory=64 is `frequency`, window 64, memory 64."""
    recipe, *settings = re.split("[:,]", name)
    return recipe if recipe == "softmax" else ", ".join([f"`{recipe}`", *(s.replace("=", " ") for s in settings)])


def in_plot(name: str) -> str:
    """The same for `draw_panels`, where a comma begins the batch size."""
    return label(name).replace("`", "").replace(",", "")


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def times(x: float) -> str:
    return f"{x:.1f} ×" if x >= 10 else f"{x:.2f} ×"


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    main()
