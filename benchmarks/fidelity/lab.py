"""The fidelity lab: kernels and recipes at equal token budgets, on one model and one corpus, in one run.

    python -m benchmarks.fidelity.lab MODEL --data FOLDER --seq-len 256 --tokens 300000 --seeds 3 --out RUNS.jsonl \
        {default,window-only,bare-window,sinks,lolcats}:window=16,block=16,memory=0 \
        frequency:window=16,block=16,memory=16 pure hedgehog retnet delta paper

A row is a recipe or one of `baselines.BASELINES`, with settings of the kernel after a colon, and of the stages too
where they have a dot (``pure:distill.learning_rate=3e-4``). Baselines train by the stages of `pure`, or of `frequency`
where they have a window; of the sizes they follow that alone, and the others name the rows that they are compared with.
``bare-window`` is window-only without the first tokens. ``teacher`` is the original trained on as many tokens by
cross-entropy: what the tokens alone are worth. Every run is a line of RUNS.jsonl; runs that are there already are not
repeated. See report.py for tables.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_any, load_converted, load_tokenizer, silence
from dijiang_convert.checkpoint.shards import read_checkpoint
from dijiang_convert.data.rows import Rows, token_rows
from dijiang_convert.measure.recall import recall as repeated_passages
from dijiang_convert.recipe import Stage, adjust_stages, parse_recipe, scale_tokens
from dijiang_convert.training.trainer import run_stage

from .baselines import BASELINES, LoLA
from .measures import fidelity, planted_pairs, transfer_errors

# Recipes of the lab alone: what they start from, and their settings.
RECIPES = {"bare-window": ("window-only", ["sinks=0", "memory=0"])}


def run(args: argparse.Namespace, row: str, tokens: int, seed: int, data: tuple[Rows, Rows], original: Any) -> Any:
    """Converts, trains and measures once."""
    train_rows, held_out = data
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model, stages = build(args, row, Path(folder) / "converted", seed)
        remember(model, True)
        before = fidelity(model, held_out, original)
        errors_before = transfer_errors(model, held_out)
        remember(model, False)
        stages = scale_tokens([s for s in stages if trains(model, s)], tokens)
        for i, stage in enumerate(stages):
            guide = original if stage.train == "full" else None
            model, result = run_stage(
                model, stage, train_rows, teacher=guide, folder=Path(folder) / str(i), seed=seed
            )  # fmt: skip
            print(f"  {stage.name} {result.first_loss:.4f} to {result.last_loss:.4f} in {result.seconds:.0f} s")
    remember(model, True)
    after = fidelity(model, held_out, original)
    return {
        "row": row,
        "seed": seed,
        "budget": tokens,
        "tokens": sum(stage.tokens for stage in stages),
        "seq_len": args.seq_len,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if ".dijiang." in name),
        "untrained": before,
        **after,
        "transfer_errors": {"untrained": errors_before, "trained": transfer_errors(model, held_out)},
        "recall": recall(model, held_out, args.distances),
        "seconds": time.perf_counter() - start,
    }


def recall(model: Any, held_out: Rows, distances: list[int]) -> dict[str, dict[str, float]]:
    """Of pairs of tokens at these distances; without distances, of a passage as `dijiang eval --recall` measures it."""
    if distances:
        return planted_pairs(model, held_out, distances)
    full = held_out.ids[held_out.lengths == held_out.ids.shape[1]]
    return {str(at): dataclasses.asdict(found) for at, found in repeated_passages(model, full).items()}


def build(args: argparse.Namespace, row: str, folder: Path, seed: int) -> tuple[Any, tuple[Stage, ...]]:
    """The model of a row, not yet trained, and its stages."""
    name, _, text = row.partition(":")
    settings = [s for s in text.split(",") if s]
    of_kernel, of_stages = ([s for s in settings if ("." in s.partition("=")[0]) == dot] for dot in (False, True))
    if name == "teacher":
        stage = Stage("train", "cross_entropy", 1, "full", learning_rate=1e-5, seq_len=args.seq_len)
        return load_any(args.model, dtype="float32"), adjust_stages([stage], of_stages)
    recipe, own = RECIPES.get(name, (name, []))
    if name in BASELINES:
        recipe = "frequency" if any(s.startswith("window=") for s in of_kernel) else "pure"
    # Most CPUs have no instructions for bfloat16, and train in it up to sixty times more slowly.
    convert(args.model, folder, recipe=recipe, settings=[*of_kernel, *own], dtype="float32")
    model: Any = load_converted(folder)
    if name in BASELINES:
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "dijiang"):
                arguments = module.dijiang.arguments
                module.dijiang = BASELINES[name](module.dijiang.kernel, module.dijiang.layers)
                module.dijiang.arguments = arguments
    section = read_checkpoint(folder)["dijiang"]
    stages = parse_recipe({"name": recipe, "kernel": section["kernel"], "stages": section["stages"]}).stages
    stages = adjust_stages(stages, [f"seq_len={args.seq_len}", *args.set])
    return model, adjust_stages(stages, of_stages)


def remember(model: Any, on: bool) -> None:
    """Turns LoLA's memory on to measure, and off to train."""
    for module in model.modules():
        if isinstance(module, LoLA):
            module.remembers = on


def trains(model: Any, stage: Stage) -> bool:
    """A kernel without parameters has no first stage: its tokens go to the others."""
    return stage.train != "kernel" or any(".dijiang." in name for name, _ in model.named_parameters())


class WholeRows(Rows):
    """Rows that are one context each, whatever they hold: the baselines don't tell the documents of a row apart."""

    packed = False

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "position_ids": torch.arange(self.ids.shape[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="+", metavar="row[:key=value,…]")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[300_000])
    parser.add_argument("--eval-tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--distances", type=int, nargs="*", default=[8, 32, 96, 192],
        help="tokens between a planted pair and its first half; none for a passage, as dijiang eval --recall has it",
    )  # fmt: skip
    parser.add_argument("--set", action="append", default=[], help="of the stages of all rows")
    args = parser.parse_args()
    silence()
    tokenizer = load_tokenizer(args.model)
    held_out = token_rows(
        args.data, tokenizer, seq_len=args.seq_len, tokens=args.eval_tokens, held_out=True, shuffle_seed=None
    )
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    finished = {(each["row"], each["seed"], each["budget"]) for each in done}
    for seed in args.seeds:
        for tokens in args.tokens:
            rows = token_rows(args.data, tokenizer, seq_len=args.seq_len, tokens=tokens, shuffle_seed=seed)
            train_rows = WholeRows(rows.ids, rows.marks)
            for row in args.rows:
                if (row, seed, tokens) in finished:
                    continue
                result = run(args, row, tokens, seed, (train_rows, held_out), original)
                with args.out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(
                    f"{row} seed {seed} {tokens}: ratio {result['ratio']:.4f} KL {result['kl']:.4f} "
                    f"(untrained {result['untrained']['ratio']:.3f}) {result['seconds']:.0f} s", flush=True
                )  # fmt: skip


if __name__ == "__main__":
    main()
