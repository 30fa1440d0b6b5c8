"""What `dijiang inspect` tells of models of usual sizes, from their configs alone.

    python benchmarks/sizes.py --out benchmarks/results/sizes.json

Memory to finetune is that on a CPU: a GPU keeps fewer activations.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from dijiang_convert.inspect import InspectResult, inspect

CONFIGS: dict[str, PreTrainedConfig] = {
    "pythia-410m": GPTNeoXConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, vocab_size=50304
    ),
    "pythia-1b": GPTNeoXConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192, vocab_size=50304
    ),
    "llama2-7b": LlamaConfig(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.write_text(json.dumps({name: dataclasses.asdict(inspected(name)) for name in CONFIGS}, indent=1) + "\n")


def inspected(name: str) -> InspectResult:
    config = CONFIGS[name]
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = torch.float16
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return dataclasses.replace(inspect(folder), source=name)


if __name__ == "__main__":
    main()
