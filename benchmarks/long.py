"""131,072 tokens through a converted model: is everything finite, and does the error of float32 grow with length?

    python benchmarks/long.py [MODEL] --out LONG.json --into PAGE.md

MODEL is a softmax source, by default the demo's. Its kernels are moved away from their start, since a fresh far part is
nearly flat. The reference is the same model in float64 throughout; errors are those of the last hidden state over 1,024
tokens, relative to its norm. With a memory they are not of rounding alone: keys whose scores are close to each other
take each other's place in half precision. So the default is also run with memory=0. Decoding goes on from the full
prompt for some steps, where the cache must not grow. What memory decoding takes is the resident memory of a process of
its own that reads 1,024 tokens at a time: the most of it over as many steps, behind 1,024 tokens, and once it has read
on to the full length.
"""

import argparse
import gc
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import load_converted, silence
from dijiang_convert.measure.timing import cache_bytes

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


def loaded(folder: Path, name: str) -> Any:
    """The model as loading in that dtype leaves it, its kernels moved; "float64" casts them, too."""
    model = moved(load_converted(folder))
    if name == "float64":
        return model.double()
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data if ".dijiang." in key else parameter.data.to(DTYPES[name])
    return model


def prompt(model: Any, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


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


@torch.no_grad()
def resident(folder: Path, name: str, lengths: list[int], steps: int) -> dict[int, tuple[int, int]]:
    """Bytes of this process that are in memory behind so many tokens, and at most while more are decoded."""
    model, process = loaded(folder, name), psutil.Process()
    cache, ids, found = DynamicCache(config=model.config), prompt(model, lengths[-1]), {}
    for start, end in zip([0, *lengths], lengths, strict=False):
        for piece in ids[:, start:end].split(1024, dim=1):
            model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        before = most = process.memory_info().rss
        for i in range(steps):
            model(input_ids=ids[:, i % end, None], past_key_values=cache, use_cache=True)
            most = max(most, process.memory_info().rss)
        found[end] = before, most
    return found


def alone(function: Any, *arguments: Any) -> Any:
    """What it returns in a process of its own, so that nothing freed before counts."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(rows: list[dict[str, Any]]) -> str:
    lengths = [1024, 16384, 131072]
    columns = ["recipe", "dtype", "error at 1,024", "at 16,384", "at 131,072", "cache"]
    columns += ["memory at 1,024", "at 131,072"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        errors = {int(n): error for n, error in row["relative_error"].items()}
        before, after = row["cache_bytes"]
        assert before == after
        cells = [f"`{row['recipe']}`", row["dtype"], *(f"{errors[n]:.1e}" if n in errors else "" for n in lengths)]
        cells += [f"{before / 1000:,.0f} kB", *(f"{most / 1e6:.0f} MB" for _, most in row["resident_bytes"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--recipes", nargs="*", default=["frequency", "frequency:memory=0", "pure"], metavar="RECIPE[:key=value,…]"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--into", type=Path, help="a file whose part marked `long` becomes the table")
    args = parser.parse_args()
    silence()
    ends = [n for n in (1024 * 2**i for i in range(12)) if n <= args.length]
    figures = []
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "converted"
            name, _, settings = recipe.partition(":")
            convert(args.model, out, recipe=name, settings=[s for s in settings.split(",") if s])
            reference_model = loaded(out, "float64")
            ids = prompt(reference_model, args.length)
            reference = hidden(reference_model, ids, ends)
            for dtype in DTYPES:
                model = loaded(out, dtype)
                found = hidden(model, ids, ends)
                errors = {n: ((found[n] - reference[n]).norm() / reference[n].norm()).item() for n in ends}
                rounded = {n: float(f"{error:.2g}") for n, error in errors.items()}
                row = {"recipe": recipe, "dtype": dtype, "relative_error": rounded}
                row["cache_bytes"] = decoded(model, ids, args.steps)
                row["resident_bytes"] = alone(resident, out, dtype, [1024, args.length], args.steps)
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
