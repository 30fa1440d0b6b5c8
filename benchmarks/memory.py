"""Memory of training, estimated and measured, on random models: python -m benchmarks.memory

Measured is what torch allocates in two optimizer steps, by its profiler, with the model's and a teacher's own weights.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from dijiang_convert import convert
from dijiang_convert.checkpoint.loading import converted_config, load_converted, silence
from dijiang_convert.checkpoint.shards import write_json
from dijiang_convert.demo import MODEL
from dijiang_convert.measure.timing import peak_memory
from dijiang_convert.recipe import Stage
from dijiang_convert.training import trainer
from dijiang_convert.training.estimate import plan_costs, teacher_copies
from dijiang_convert.training.trial import Stopwatch, random_rows

MODELS: dict[str, Any] = {
    "tiny": transformers.GPTNeoXConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, vocab_size=1024
    ),
    "mid": transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=16_384,
    ),
}  # fmt: skip
STAGES = (
    Stage("transfer", "attention_transfer", 1_000_000, seq_len=512, batch_tokens=2048),
    Stage("distill", "distillation", 1_000_000, "lora", seq_len=512, batch_tokens=2048),
    Stage("distill-full", "distillation", 1_000_000, "full", seq_len=512, batch_tokens=2048),
    Stage("extend", "cross_entropy", 1_000_000, "lora", seq_len=2048, batch_tokens=2048),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    silence()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = converted(MODELS[name], Path(temporary))
            for stage in STAGES:
                estimated, found = compare(folder, stage)
                rows.append({"model": name, "stage": stage.name, "estimated_bytes": estimated, "measured_bytes": found})
                print(json.dumps({**rows[-1], "ratio": round(estimated / found, 2)}), flush=True)
    if args.out:
        write_json(args.out, rows)


def converted(config: Any, folder: Path, settings: Sequence[str] = ()) -> Path:
    """A random model of this config, with the demo model's tokenizer, converted."""
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    for path in MODEL.glob("tokenizer*"):
        shutil.copy(path, folder / "source")
    convert(str(folder / "source"), folder / "converted", recipe="frequency", settings=settings)
    return folder / "converted"


def compare(folder: Path, stage: Stage) -> tuple[int, int]:
    """(estimated, measured) bytes of a stage at its peak."""
    (copy,) = teacher_copies([stage])
    (cost,) = plan_costs([stage], converted_config(folder), [copy])
    model = load_converted(folder)
    teacher = load_converted(folder, attention="softmax").eval().requires_grad_(False) if copy else None
    weights = sum(p.nbytes for each in (model, teacher) if each is not None for p in each.parameters())
    data = random_rows(model, stage.seq_len, 2 * cost.rows)
    with tempfile.TemporaryDirectory() as temporary:

        def run() -> None:
            trainer.run_stage(model, stage, data, teacher=teacher, folder=Path(temporary), log=Stopwatch())

        _, peak = peak_memory(torch.device("cpu"), run)
    return cost.memory_bytes, weights + peak


if __name__ == "__main__":
    main()
