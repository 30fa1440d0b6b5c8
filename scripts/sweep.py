"""Converts a tiny random model of every type that transformers has for causal language modelling, and of every encoder
of texts and images, and checks it.

    python -m scripts.sweep [TYPE ...] [--only types|encoders]

What is checked, and where, is in tests/sweep. All types take about 10 minutes on 2 cores. What came of each goes to
benchmarks/results/sweep.json, where types that are not named stay as they were, and docs/architectures.md is written
from it. A type that neither works nor is refused ends it with code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import transformers

from tests.sweep import encoders
from tests.sweep.forks import Answer
from tests.sweep.run import DECODERS, ENCODERS, ROOT, fails, sweep, works
from tests.sweep.tiny import KINDS

RESULTS = ROOT / "benchmarks/results/sweep.json"
HEAD = """# Architectures

<!-- Written by `make sweep`. -->

What a conversion needs is that attention goes through transformers' `AttentionInterface`; no code here is specific to
an architecture. This is what came of every model type that transformers {version} registers for causal language
modelling: a tiny random model of each was saved in the layouts that checkpoints have, converted with a window of 8,
and loaded by `AutoModelForCausalLM` in a process that can't import this package. There

- every base weight is the source's, to the byte on disk and after loading;
- with a window as long as the text, logits are the source's (≤ 1e-4 of their spread): whatever its attention does
  (soft-capping, sinks, norms of queries and keys, scaling) is kept;
- cached and full logits agree (≤ 1e-4, or twice what the source itself differs by, where its recurrent layers round
  differently; in float64 where rounding alone chooses between two keys), also where a long prompt is worked on piece by
  piece; left padding changes nothing that it does not change in the source; greedy texts without a cache, with one and
  with a static one are the same;
- deleting the far part changes the logits beyond the window;
- every kernel parameter gets a gradient, and saving and loading is exact.

**{works} of {all} types work.** The others are refused, by `dijiang inspect` and `dijiang convert`, in one line and
before weights are downloaded. A type's default layers are those with attention to every token before; layers with a
sliding window, recurrent ones and those of images or sound stay as they are. "Options" is what a tiny model of the type
needed with recipe `frequency`: `--set rotary=keep` where the state can't undo its rotary embedding (latent attention,
rotation of the last part of a head; `default`, without a state, needs no option there), `--layers sliding-only` where
every layer has a sliding window.

Models with images, sound or film whose type is not in this list convert too, where their language model's attention
is of this kind: LLaVA, Qwen2-VL, Qwen3-VL, InternVL, SmolVLM, Idefics3, Mistral 3 and others, text alone tested.
`dijiang inspect` tells.
"""


ENCODERS_HEAD = """## Encoders

The same for encoders of texts and images, with the head that transformers registers for them first (masked words, image
classes). On 160 tokens or 145 patches and a window of 8: base weights are kept, and every Auto class that works with
the source loads with the same kernels; with a long window outputs are the source's, of padded rows too; padding changes
nothing (where it does not in the source), deleting the far part changes the output everywhere, every kernel parameter
gets a gradient, and saving is exact. **{works} of {all} types work.**

The tiny MobileBERT has layer norms in the place of its own: without, random weights blow up (queries of 1e5), features
become one-hot, and gradients are not finite. What a trained one does was not tried.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("types", "encoders"), help="types are of decoders")
    args = parser.parse_args()
    content = json.loads(RESULTS.read_text()) if args.types or args.only else {"types": {}, "encoders": {}}
    content["transformers"] = transformers.__version__
    wrong = {}
    for part, known, modules in ("types", KINDS, DECODERS), ("encoders", encoders.KINDS, ENCODERS):
        if args.only in (part, None):
            answers = sweep([kind for kind in args.types or known if kind in known], args.workers, tell, modules)
            content[part] = dict(sorted({**content[part], **{k: kept(a) for k, a in answers.items()}}.items()))
            wrong |= {f"{kind} ({part})": fails(answer) for kind, answer in answers.items() if fails(answer)}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    (ROOT / "docs/architectures.md").write_text(page(content))
    for kind, reason in wrong.items():
        print(f"error: {kind}: {reason}", file=sys.stderr)
    return 1 if wrong else 0


def tell(kind: str, answer: Answer) -> None:
    print(f"{kind}: {'works' if works(answer) else answer.get('refused') or fails(answer)}", flush=True)


def kept(answer: Answer) -> Answer:
    return {name: value for name, value in answer.items() if name != "source"}


def page(content: dict[str, Any]) -> str:
    counts = {part: (sum(map(works, content[part].values())), len(content[part])) for part in ("types", "encoders")}
    lines = [HEAD.format(version=content["transformers"], works=counts["types"][0], all=counts["types"][1])]
    lines += tables(content["types"], "Works", "Refused")
    lines += ["", ENCODERS_HEAD.format(works=counts["encoders"][0], all=counts["encoders"][1])]
    lines += tables(content["encoders"], "Encoders that work", "Encoders that are refused")
    return "\n".join(lines) + "\n"


def tables(answers: dict[str, Answer], works_title: str, refused_title: str) -> list[str]:
    good = {kind: answer for kind, answer in answers.items() if works(answer)}
    lines = [
        f"## {works_title}",
        "",
        "| type | attention | layers of the tiny model | options | notes |",
        "|---|---|---|---|---|",
    ]
    for kind, answer in good.items():
        options = ", ".join(f"`{option}`" for option in answer["options"])
        noted = ", ".join(answer["notes"])
        lines.append(
            f"| {kind} | `{answer['attention']}` | {len(answer['layers'])} of {answer['of']} | {options} | {noted} |"
        )
    lines += ["", f"## {refused_title}", "", "| type | reason |", "|---|---|"]
    for kind, answer in answers.items():
        if "refused" in answer:
            reason = answer["refused"].removeprefix(f"{kind} ").split(": gpt_neox, ")[0]
            lines.append(f"| {kind} | {reason} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
