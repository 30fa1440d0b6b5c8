"""131,072 tokens through a converted model: is everything finite, and does the error of float32 grow with length?

    python benchmarks/long.py [MODEL] --out LONG.json --into PAGE.md

MODEL is a softmax source, by default the demo's. Its kernels are moved away from their start, since a fresh far part is
nearly flat. The reference is the same model in float64 throughout; errors are those of the last hidden state over 1,024
tokens, relative to its norm. Decoding goes on from the full prompt for some steps, where the cache must not grow.
"""

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dijiang_convert import convert
from dijiang_convert.benchmark import cache_bytes
from dijiang_convert.models import load_converted, silence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.fidelity.report import write_between

DEMO = Path(__file__).resolve().parents[1] / "dijiang_convert/demo_model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def moved(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@torch.no_grad()
def hidden(model: Any, ids: Tensor, ends: list[int], cache: Any = None) -> dict[int, Tensor]:
    """The last hidden state of the 1,024 tokens before each end, in float64."""
    out = model.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state[0]
    assert out.isfinite().all()
    return {end: out[end - 1024 : end].double() for end in ends}


@torch.no_grad()
def decoded(model: Any, ids: Tensor, steps: int) -> tuple[int, int]:
    """Bytes of the cache after the prompt, and after so many more tokens."""
    cache = DynamicCache(config=model.config)
    hidden(model, ids, [ids.shape[1]], cache)
    before = cache_bytes(cache)
    for i in range(steps):
        logits = model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        assert logits.isfinite().all()
    return before, cache_bytes(cache)


def table(rows: list[dict[str, Any]]) -> str:
    lengths = [1024, 16384, 131072]
    lines = ["| recipe | dtype | error at " + " | at ".join(f"{n:,}" for n in lengths) + " | cache |", "|---" * 6 + "|"]
    for row in rows:
        errors = {int(n): error for n, error in row["relative_error"].items()}
        cells = [f"{errors[n]:.1e}" if n in errors else "" for n in lengths]
        before, after = row["cache_bytes"]
        assert before == after
        lines.append(f"| `{row['recipe']}` | {row['dtype']} | {' | '.join(cells)} | {before / 1000:,.0f} kB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--recipes", nargs="*", default=["default", "pure"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path, help="a file whose part marked `long` becomes the table")
    args = parser.parse_args()
    silence()
    ends = [n for n in (1024 * 2**i for i in range(12)) if n <= args.length]
    figures = []
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            convert(args.model, Path(folder) / "converted", recipe=recipe)
            load = lambda out=Path(folder) / "converted": moved(load_converted(out))  # noqa: E731
            vocabulary = load().config.vocab_size
            ids = torch.randint(vocabulary, (1, args.length), generator=torch.Generator().manual_seed(0))
            reference = hidden(load().double(), ids, ends)
            for name, dtype in DTYPES.items():
                model = load()
                for key, parameter in model.named_parameters():  # as loading in half precision leaves them
                    parameter.data = parameter.data if ".dijiang." in key else parameter.data.to(dtype)
                found = hidden(model, ids, ends)
                errors = {n: ((found[n] - reference[n]).norm() / reference[n].norm()).item() for n in ends}
                rounded = {n: float(f"{error:.2g}") for n, error in errors.items()}
                row = {"recipe": recipe, "dtype": name, "relative_error": rounded}
                row["cache_bytes"] = decoded(model, ids, args.steps)
                figures.append(row)
                if args.out:
                    content = {"length": args.length, "steps": args.steps, "rows": figures}
                    args.out.write_text(json.dumps(content, indent=1) + "\n")
                print(json.dumps(row), flush=True)
                del model
                gc.collect()
    if args.into:
        write_between(args.into, "long", table(figures))


if __name__ == "__main__":
    main()
