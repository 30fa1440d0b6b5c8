"""Bytes that pushes transfer: of a converted checkpoint, of what finetune makes of it, of a second run, of nothing new.

Runs the whole journey against the loopback Hub of the tests, which counts. A client that stores by Xet sends chunks
that the Hub lacks, not files: those are counted by a chunker of the same sizes (gear hash, 8 to 128 KiB, 64 on mean).

    python benchmarks/push.py [--source FOLDER] [--data FILE] [--tokens N]
"""

import argparse
import hashlib
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.hub import Hub

HUB = Hub().start()
SCRATCH = tempfile.TemporaryDirectory()
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_TOKEN": HUB.token, "HF_HOME": SCRATCH.name, "HF_HUB_DISABLE_XET": "1"}

import torch  # noqa: E402  (after the environment that the client reads)
import transformers  # noqa: E402

from dijiang_convert import convert, finetune  # noqa: E402
from dijiang_convert.data.demo_text import documents  # noqa: E402
from dijiang_convert.demo import MODEL  # noqa: E402
from dijiang_convert.push import push  # noqa: E402

GEAR = [random.Random(i).getrandbits(64) for i in range(256)]
LEAST, MOST, MASK = 8 << 10, 128 << 10, (1 << 64) - (1 << 48)  # a cut where 16 high bits are 0: every 64 KiB


def chunks(data: bytes) -> dict[str, int]:
    """Hash and size of every chunk of a file."""
    found, start, state = {}, 0, 0
    for i, byte in enumerate(data):
        state = ((state << 1) + GEAR[byte]) & 0xFFFFFFFFFFFFFFFF
        size = i + 1 - start
        if (size >= LEAST and state & MASK == 0) or size >= MOST or i + 1 == len(data):
            found[hashlib.sha256(data[start : i + 1]).hexdigest()] = size
            start, state = i + 1, 0
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=MODEL)
    parser.add_argument("--data")
    parser.add_argument("--tokens", type=int, default=4000)
    options = parser.parse_args()
    data = options.data or documents("train")[:12]
    work = Path(SCRATCH.name) / "work"
    HUB.add_repo("base/source", options.source)
    stored = {}
    for blob in HUB.repos["base/source"].at("main").files.values():
        stored |= chunks(blob.data)
    rows = []

    def pushed(what: str, folder: Path, repo: str) -> None:
        before = HUB.bytes_received
        push(folder, repo)
        sent, new = HUB.bytes_received - before, {}
        for blob in HUB.repos[repo].at("main").files.values():
            new |= {name: size for name, size in chunks(blob.data).items() if name not in stored}
        stored.update(new)
        weights = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
        total = sum(path.stat().st_size for path in weights)
        rows.append((what, len(weights), total, sent, sum(new.values())))

    convert("base/source", work / "converted")
    pushed("converted", work / "converted", "me/model")
    pushed("converted, once more", work / "converted", "me/model")
    for what, seed, train in (("finetuned (LoRA)", 0, "lora"), ("finetuned again", 1, "lora"), ("in full", 0, "full")):
        out = work / f"out-{seed}-{train}"
        finetune(work / "converted", out, data=data, tokens=options.tokens, seq_len=128, seed=seed, train=train)
        pushed(what, out, "me/model")
    print("| push | files of weights | their bytes | sent, by files | sent, by chunks |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row[0]} | {row[1]} | {' | '.join(f'{value / 1e6:.2f} MB' for value in row[2:])} |")
    print("\n| model, two bytes a weight | weights | of them in what LoRA trains |\n|---|---|---|")
    for name, config in (
        ("Pythia 410M", transformers.GPTNeoXConfig(vocab_size=50304, hidden_size=1024, num_hidden_layers=24,
                                                   num_attention_heads=16, intermediate_size=4096)),
        ("Llama 2 7B", transformers.LlamaConfig()),
    ):  # fmt: skip
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        attention = sum(
            p.numel() for module, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)
            for p in layer.parameters() if "attention." in module or "self_attn." in module
        )  # fmt: skip
        total = sum(p.numel() for p in model.parameters())
        print(f"| {name} | {2 * total / 1e9:.2f} GB | {2 * attention / 1e9:.2f} GB |")


if __name__ == "__main__":
    main()
