"""How prefill and decoding grow with length, for every recipe, on the CPU, in one run.

    python benchmarks/speed.py MODEL

Prints prefill time at 16,384 tokens over that at 2,048 (8 is linear), time of a decoded token at position 16,384 over
that at 1,024 (1 is constant), and the cache's bytes at both. Lengths take turns; figures are medians.
"""

import argparse
import json
import tempfile
from pathlib import Path

from dijiang_convert import benchmark, convert
from dijiang_convert.recipe import recipe_names

LENGTHS = (1024, 2048, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recipes", nargs="*", default=["default", "pure", "paper", "window-only"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    assert set(args.recipes) <= set(recipe_names())
    figures = []
    for recipe in args.recipes:
        with tempfile.TemporaryDirectory() as folder:
            convert(args.model, Path(folder) / "converted", recipe=recipe)
            result = benchmark(Path(folder) / "converted", lengths=LENGTHS, repeats=args.repeats, decode_tokens=100)
        rows = {row.length: row for row in result.rows}
        prefill = {n: n / row.prefill_tokens_per_second for n, row in rows.items()}
        figures.append(
            {
                "recipe": recipe,
                "prefill_16384_over_2048": prefill[16384] / prefill[2048],
                "decode_16384_over_1024": rows[1024].decode_tokens_per_second / rows[16384].decode_tokens_per_second,
                "cache_bytes": {n: rows[n].cache_bytes for n in (1024, 16384)},
                "prefill_tokens_per_second_at_16384": rows[16384].prefill_tokens_per_second,
                "decode_tokens_per_second_at_16384": rows[16384].decode_tokens_per_second,
            }
        )
        print(json.dumps(figures[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
