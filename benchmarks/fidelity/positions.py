"""Whether positions matter to a converted model: shifted by a constant, and past the length it was trained at.

    python -m benchmarks.fidelity.positions MODEL --data FOLDER --seq-len 256 --tokens 300000 --out POSITIONS.json \
        frequency:window=16,block=16,memory=0 pure

Converts and finetunes each row by its recipe. Then: the largest change of a logit and the change of perplexity when all
position_ids are shifted, and perplexity by position on rows of 2, 4 and 8 times the training length, beside the
original's. Long rows hold documents end to end, since few are that long.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dijiang_convert import convert, finetune
from dijiang_convert.checkpoint.loading import load_any, load_tokenizer, silence
from dijiang_convert.data.rows import token_rows

from .report import write_between


@torch.no_grad()
def losses(model: Any, ids: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Loss of each next token [rows, length − 1], and the logits of the first rows."""
    found, first = [], None
    positions = torch.arange(ids.shape[1])[None] + shift
    for part in ids.split(max(4096 // ids.shape[1], 1)):
        logits = model(input_ids=part, position_ids=positions.expand(len(part), -1), use_cache=False).logits.float()
        first = logits if first is None else first
        found.append(-logits[:, :-1].log_softmax(-1).gather(-1, part[:, 1:, None])[..., 0])
    assert first is not None
    return torch.cat(found), first


def shifts(model: Any, ids: Tensor, by: list[int]) -> dict[str, dict[str, float]]:
    """Largest change of a logit, and perplexity over that without a shift."""
    plain, logits = losses(model, ids)
    result = {}
    for shift in by:
        moved, other = losses(model, ids, shift)
        result[str(shift)] = {
            "logits": float((other - logits).abs().max()),
            "perplexity_ratio": math.exp(moved.mean() - plain.mean()),
        }
    return result


def lengths(model: Any, ids: Tensor, parts: int = 8) -> list[float]:
    """Perplexity over eighths of a row."""
    loss, _ = losses(model, ids)
    return [math.exp(part.mean()) for part in loss.tensor_split(parts, dim=1)]


def measure(model: Any, multiples: list[int], rows_of: Callable[[int], Tensor]) -> dict[str, Any]:
    """multiples: lengths of rows, the first that of training. rows_of: gives rows of a length."""
    shortest = multiples[0]
    found: dict[str, Any] = {"shifts": shifts(model, rows_of(shortest)[:40], [1, 100, shortest])}
    return found | {str(n): lengths(model, rows_of(n)) for n in multiples}


def table(result: dict[str, Any]) -> str:
    """What shifts change, and perplexity over eighths of rows of 8 times the training length."""
    long = str(8 * result["seq_len"])
    shifts_by = list(next(iter(result["models"].values()))["shifts"])
    header = ["row", *(f"shift {n}" for n in shifts_by), *(f"{i}/8" for i in range(1, 9))]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, found in result["models"].items():
        moved = [f"{found['shifts'][n]['logits']:.1g}, {found['shifts'][n]['perplexity_ratio']:.4f}" for n in shifts_by]
        lines.append(f"| {' | '.join([f'`{name}`', *moved, *(f'{value:.2f}' for value in found[long])])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", nargs="+", metavar="recipe[:key=value,…]")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--eval-tokens", type=int, default=40_000)
    parser.add_argument("--into", type=Path, help="a file whose marked part becomes the table")
    parser.add_argument("--mark", default="positions")
    args = parser.parse_args()
    silence()
    tokenizer = load_tokenizer(args.model)
    text = token_rows(args.data, tokenizer, seq_len=256, tokens=args.eval_tokens, held_out=True, shuffle_seed=None)
    stream = text.ids[text.mask.bool()]  # documents end to end

    def rows_of(length: int) -> Tensor:
        return stream[: len(stream) // length * length].view(-1, length)

    multiples = [args.seq_len * n for n in (1, 2, 4, 8)]
    result: dict[str, Any] = {"seq_len": args.seq_len, "models": {}}
    for row in ("original", *args.rows):
        recipe, _, settings = row.partition(":")
        if row == "original":
            result["models"][row] = measure(load_any(args.model).eval(), multiples, rows_of)
            continue
        with tempfile.TemporaryDirectory() as folder:
            converted, trained = Path(folder) / "converted", Path(folder) / "trained"
            convert(args.model, converted, recipe=recipe, settings=[s for s in settings.split(",") if s])
            finetune(converted, trained, data=args.data, tokens=args.tokens, seq_len=args.seq_len)
            model = load_any(str(trained)).eval()
        result["models"][row] = measure(model, multiples, rows_of)
        print(table(result), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.into:
        write_between(args.into, args.mark, table(result))


if __name__ == "__main__":
    main()
