"""Every model type that transformers registers for causal language modelling: which convert, and why others don't.

Writes benchmarks/results/architectures.json and docs/architectures.md. Ends with 1, and the list on stderr, where a
type neither works nor is refused with a reason. `make sweep`, or some types: python -m scripts.sweep llama mixtral
(which writes nothing).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here: threads only wait for each other
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from tests.sweep.feed import LENGTH, SOURCE_DIFFERS, TOLERANCE
from tests.sweep.run import ROOT, Outcome, sweep
from tests.sweep.tiny import KINDS, UNBUILT

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
INTRO = """# Architectures

Written by `make sweep` (`scripts/sweep.py`) with transformers {transformers}: of the {total} model types that it
registers for causal language modelling {works} convert and {refused} are refused.

Each type is tried as a tiny random model, in the layouts that transformers writes: the Hub's (one tensor an expert, old
names) and its own. It is converted with the recipe `default` and a window of 8, its kernels are moved away from their
start, and a process without this package loads it with `AutoModelForCausalLM` and `trust_remote_code=True`. There, on
sequences of {length} tokens:

- base weights are the source's bytes on disk, and equal to the source model's after loading, from either layout;
- with a window as long as the text, logits are the source's: all that it does to attention is kept;
- logits through the cache, in pieces and token by token, equal those of the whole sequence, to {tolerance:g} of their
  standard deviation;
- left padding changes nothing (where positions are learned and count padding, in the source too: what is in the padding
  changes nothing);
- greedy generation agrees with and without a cache, and in a padded batch and alone;
- deleting the far part changes all that lies beyond the window, and nothing inside it;
- every kernel parameter gets a gradient that is not zero in a training step;
- saved and loaded again, the model is the same to the bit.

Models whose text part sits inside a larger one (images, sound) are tried whole; their text part's self-attention
converts.
"""
WORKS = """
## Works

"Layers": how many have the kernel, of how many. Others are recurrent, or have a sliding window, which is linear already
(`--layers all,sliding-only` converts it too).

| type | attention | layers | notes |
| --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| type | reason |
| --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; all by default")
    kinds = parser.parse_args().kinds or list(KINDS)
    start = time.perf_counter()
    outcomes = sweep(kinds, UNBUILT, report=tell)
    seconds = time.perf_counter() - start
    failed = [outcome for outcome in outcomes if outcome.failures]
    works = sum(outcome.works for outcome in outcomes)
    print(f"{works} work, {len(outcomes) - works - len(failed)} are refused, {len(failed)} fail: {seconds:.0f} s")
    if kinds == list(KINDS):
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        rows = [row(outcome) for outcome in outcomes]
        content = {**versions, "seconds": round(seconds), "types": rows}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(outcomes), encoding="utf-8")
    for outcome in failed:
        print(f"{outcome.kind}: {outcome.failures}", file=sys.stderr)
    return 1 if failed else 0


def tell(outcome: Outcome) -> None:
    state = "works" if outcome.works else f"refused: {outcome.refused}" if outcome.refused else f"{outcome.failures}"
    print(f"{outcome.kind:26} {state} {outcome.figures or ''}", flush=True)


def row(outcome: Outcome) -> dict[str, Any]:
    made = {name: value for name, value in outcome.made.items() if name != "source"}
    result = {"type": outcome.kind, "works": outcome.works, "refused": outcome.refused, "failures": outcome.failures}
    return {name: value for name, value in {**result, **made, **outcome.figures}.items() if value not in ("", {}, None)}


def page(outcomes: list[Outcome]) -> str:
    works = [outcome for outcome in outcomes if outcome.works]
    refused = [outcome for outcome in outcomes if outcome.refused]
    text = INTRO.format(
        transformers=transformers.__version__, total=len(outcomes), works=len(works), refused=len(refused),
        length=LENGTH, tolerance=TOLERANCE,
    )  # fmt: skip
    text += WORKS + "".join(
        f"| {o.kind} | {o.made['attention']} | {len(o.made['layers'])} of {o.made['of']} | {notes(o)} |\n"
        for o in works
    )
    return text + REFUSED + "".join(f"| {o.kind} | {o.refused} |\n" for o in refused)


def notes(outcome: Outcome) -> str:
    """What a user of the type should know."""
    made = outcome.made
    parts = [f"needs `{option}`" for option in made["options"]]
    left = [kind for i, kind in enumerate(made["layer_types"] or []) if i not in made["layers"]]
    parts += [f"{left.count(kind)} {kind} left" for kind in dict.fromkeys(left)]
    parts += [name for name in ("attention sinks", "soft-capped logits") if made.get(name.replace(" ", "_"))]
    if "own" in made["layouts"]:
        parts.append("both layouts")
    source = made["source"]
    if source["padding_shifts"]:
        parts.append("the source counts padding as positions")
    if max(source["cached"]) > SOURCE_DIFFERS:
        parts.append("goes on from a cache a token at a time, as the source")
    if outcome.figures["cached"] > TOLERANCE:
        parts.append(
            f"cached logits differ by {outcome.figures['cached']:g}, the source's by {source['cached'][0]:.1g}"
        )
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
