"""Beyond the source's context: perplexity and recall at 1, 2, 4 and 8 times as many tokens, of the original and of what
it is converted to.

    python -m benchmarks.fidelity.beyond MODEL --data FOLDER --context 256 --out BEYOND.json

A row is a recipe, with settings of its kernel after a colon. It trains on rows of the original's context; where its
name ends in ``+extend`` it is measured, then trained by cross-entropy on rows four times as long, and measured again.
Perplexity is always that of the same tokens: at n times the context they are the last half context of n contexts of
text, documents end to end. Recall plants 32 tokens into a text, asks for them again at a distance, and says by how much
(in nats a token) the plant made them likelier; they are drawn at random, or are a passage of other text.
"""

import argparse
import dataclasses
import gc
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dijiang_convert.checkpoint.loading import load_any, load_tokenizer, silence
from dijiang_convert.data.rows import token_rows
from dijiang_convert.recipe import Stage, scale_tokens
from dijiang_convert.training.trainer import run_stage

from .lab import WholeRows, build, trains
from .report import write_between

MULTIPLES = (1, 2, 4, 8)
SIZES = "window=16,block=16,memory=0"
PLANT = 32
# The original with its rotary tables stretched, and no training.
SCALED = {
    "original, linear": {"rope_type": "linear"},
    "original, dynamic": {"rope_type": "dynamic"},
    "original, yarn": {"rope_type": "yarn"},
}


@torch.no_grad()
def last_losses(model: Any, rows: Tensor, count: int) -> Tensor:
    """Loss of the last ``count`` tokens of each row, [rows, count]."""
    found = []
    for part in rows.split(max(8192 // rows.shape[1], 1)):
        logits = model(input_ids=part, use_cache=False, logits_to_keep=count + 1).logits[:, :-1].float()
        found.append(-logits.log_softmax(-1).gather(-1, part[:, -count:, None])[..., 0])
    return torch.cat(found)


def perplexities(model: Any, stream: Tensor, context: int, rows: int = 24) -> dict[str, float]:
    """By multiple of the context: always of the same tokens, after more and more text."""
    count, longest = context // 2, context * MULTIPLES[-1]
    ends = torch.linspace(longest, len(stream), rows).long()
    result = {}
    for n in MULTIPLES:
        texts = torch.stack([stream[end - n * context : end] for end in ends.tolist()])
        result[str(n)] = math.exp(last_losses(model, texts, count).mean())
    return result


def recall(model: Any, stream: Tensor, distance: int, samples: int = 24) -> dict[str, float]:
    """Gain, in nats a token, of having seen the same tokens ``distance`` tokens ago: random ones, and a passage."""
    generator = torch.Generator().manual_seed(0)

    def passages(length: int) -> Tensor:
        starts = torch.randint(len(stream) - length, (samples,), generator=generator)
        return torch.stack([stream[start : start + length] for start in starts.tolist()])

    texts, used = passages(16 + distance + PLANT), torch.unique(stream)
    random = used[torch.randint(len(used), (samples, PLANT), generator=generator)]
    result = {}
    for name, plant in (("random", random), ("passage", passages(PLANT))):
        without = torch.cat([texts[:, :-PLANT], plant], 1)
        planted = without.clone()
        planted[:, 16 : 16 + PLANT] = plant
        # The first token tells which plant it is.
        gain = last_losses(model, without, PLANT - 1) - last_losses(model, planted, PLANT - 1)
        result[name] = float(gain.mean())
    return result


def measure(model: Any, stream: Tensor, context: int) -> dict[str, Any]:
    start = time.perf_counter()
    distances = [64, context // 2, *(n * context - 64 for n in MULTIPLES)]
    return {
        "perplexity": perplexities(model.eval(), stream, context),
        "recall": {str(d): recall(model, stream, d) for d in distances},
        "seconds_to_measure": time.perf_counter() - start,
    }


def scaled(args: argparse.Namespace, rope: dict[str, Any]) -> Any:
    """The original with rotary tables stretched to the longest rows."""
    config: Any = AutoConfig.from_pretrained(args.model)
    config.max_position_embeddings = args.context
    stretch = {"factor": float(MULTIPLES[-1]), "original_max_position_embeddings": args.context}
    config.rope_parameters = {**config.rope_parameters, **rope, **stretch}
    return AutoModelForCausalLM.from_pretrained(args.model, config=config).eval()


def train(args: argparse.Namespace, model: Any, stages: list[Stage], original: Any) -> Any:
    for stage in stages:
        rows = token_rows(args.data, load_tokenizer(args.model), seq_len=stage.seq_len, tokens=stage.tokens)
        guide = original if stage.train == "full" and stage.objective == "distillation" else None
        with tempfile.TemporaryDirectory() as folder:
            model, result = run_stage(
                model, stage, WholeRows(rows.ids, rows.marks), teacher=guide, folder=Path(folder)
            )  # fmt: skip
        print(f"  {stage.name} {result.first_loss:.4f} to {result.last_loss:.4f}, {result.seconds:.0f} s", flush=True)
    return model


def table(result: dict[str, Any]) -> str:
    """Perplexity by multiple of the context, then recall by distance: of random tokens, and of a passage."""
    first = next(iter(result["models"].values()))
    header = ["row", *(f"{n}×" for n in first["perplexity"]), *(f"{d} back" for d in first["recall"])]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, found in result["models"].items():
        gains = [f"{each['random']:.2f}, {each['passage']:.2f}" for each in found["recall"].values()]
        lines.append(f"| {' | '.join([f'`{name}`', *(f'{x:.2f}' for x in found['perplexity'].values()), *gains])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens that the original was trained on")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--extend-tokens", type=int, default=100_000)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[
            f"window-only:{SIZES}",
            f"frequency:{SIZES}+extend",
            f"frequency:{SIZES},rotary=keep",
            "frequency:window=16,block=16,memory=16+extend",
            "pure+extend",
        ],
    )
    parser.add_argument("--into", type=Path, help="a file whose marked part becomes the table")
    parser.add_argument("--mark", default="beyond")
    args = parser.parse_args()
    args.seq_len, args.set = args.context, []  # what lab.build reads
    silence()
    text = token_rows(
        args.data, load_tokenizer(args.model), seq_len=256, tokens=args.eval_tokens, held_out=True, shuffle_seed=None
    )
    stream = text.ids[text.mask.bool()].long()
    extend = Stage(
        "extend", "cross_entropy", args.extend_tokens, "lora", learning_rate=2e-4, seq_len=4 * args.context
    )  # fmt: skip
    options = {name: vars(args)[name] for name in ("context", "tokens", "extend_tokens", "eval_tokens")}
    result: dict[str, Any] = {**options, "models": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text())

    def note(name: str, model: Any) -> None:
        result["models"][name] = measure(model, stream, args.context)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result["models"][name]), flush=True)
        gc.collect()

    original: Any = load_any(args.model).eval().requires_grad_(False)
    if "original" not in result["models"]:
        note("original", original)
    for name, rope in SCALED.items():
        if name not in result["models"]:
            note(name, scaled(args, rope))
    if "original+extend" not in result["models"]:
        all_weights = dataclasses.replace(extend, train="full", learning_rate=1e-5)
        note("original+extend", train(args, load_any(args.model), [all_weights], None))
    for row in args.rows:
        if row in result["models"]:
            continue
        name, longer = row.removesuffix("+extend"), row.endswith("+extend")
        with tempfile.TemporaryDirectory() as folder:
            model, stages = build(args, name, Path(folder) / "converted", seed=0)
        model = train(args, model, scale_tokens([s for s in stages if trains(model, s)], args.tokens), original)
        note(name, model)
        if longer:
            note(row, train(args, model, [extend], None))
    if args.into:
        write_between(args.into, args.mark, table(result))


if __name__ == "__main__":
    main()
