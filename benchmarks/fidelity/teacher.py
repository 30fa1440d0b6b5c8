"""A teacher that remembers, and what a conversion keeps of that: head_dim 64, a long context, recall from afar.

    python -m benchmarks.fidelity.teacher --books FOLDER --tokenizer MODEL --out TEACHER.json
    python -m benchmarks.fidelity.teacher --books FOLDER --tokenizer MODEL --out DRY.json --dry-run   # minutes on a CPU

Trains a GPT-NeoX (27M parameters, context 2,048) on books with pairs of words planted into them and repeated, until it
recalls such pairs; converts it with a window of 64 and as many keys in the memory; distils it on at most 1 % of the
teacher's tokens; and measures perplexity at 2,048 tokens and recall by distance, both beside the teacher's own. Needs a
GPU for a teacher worth the name: --dry-run runs every step of it on a model and budgets so small that the figures mean
nothing.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

from dijiang_convert import convert, evaluate, finetune
from dijiang_convert.checkpoint.loading import load_any
from dijiang_convert.data.rows import Rows, token_rows

from .measures import planted_pairs

PAIRS = 24  # planted into a document, each repeated once
DOCUMENT_WORDS = 1200


@dataclasses.dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 8
    context: int = 2048
    tokens: int = 300_000_000
    batch: int = 32
    window: int = 64
    eval_tokens: int = 200_000
    distances: tuple[int, ...] = (32, 128, 512, 1024, 1900)


DRY = Size(
    hidden=64, layers=2, context=256, tokens=200_000, batch=8, window=16, eval_tokens=4_000, distances=(8, 64, 200)
)


def documents(texts: list[str], seed: int) -> Iterator[str]:
    """Passages of books for ever, with pairs of words planted: "… a b … a b …", any distance apart."""
    rng = random.Random(seed)
    books = [text.split() for text in texts if len(text.split()) > DOCUMENT_WORDS]
    vocabulary = sorted({word for words in books for word in words if word.isalpha() and 3 < len(word) < 9})
    while True:
        words = rng.choice(books)
        start = rng.randrange(len(words) - DOCUMENT_WORDS)
        passage = words[start : start + DOCUMENT_WORDS]
        places = sorted(rng.sample(range(DOCUMENT_WORDS), 2 * PAIRS), reverse=True)
        pairs = [f"{rng.choice(vocabulary)} {rng.choice(vocabulary)}" for _ in range(PAIRS)] * 2
        rng.shuffle(pairs)
        for place, pair in zip(places, pairs, strict=True):
            passage.insert(place, pair)
        yield " ".join(passage)


def write_corpus(books: Path, folder: Path, characters: int, seed: int = 0) -> None:
    """train.jsonl with planted pairs, validation.jsonl of plain books."""
    import datasets

    for split in ("train", "validation"):
        files = sorted(str(file) for file in books.glob(f"*{split}*.parquet"))
        texts = datasets.load_dataset("parquet", data_files=files, split="train")["text"]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            written = 0
            for text in documents(list(texts), seed) if split == "train" else texts:
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written > characters:
                    break


class _Labelled:
    """Rows as Trainer takes them: each token is to be predicted."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.rows.ids[index].long()
        return {"input_ids": ids, "labels": ids}


def train_teacher(size: Size, tokenizer: Any, corpus: Path, out: Path) -> dict[str, float]:
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=max(size.hidden // 64, 1), intermediate_size=4 * size.hidden, rotary_pct=0.25,
        max_position_embeddings=size.context, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    rows = token_rows(str(corpus), tokenizer, seq_len=size.context, tokens=size.tokens)
    data = _Labelled(rows)
    cuda = torch.cuda.is_available()
    steps = size.tokens // (size.batch * size.context)
    arguments = TrainingArguments(
        output_dir=str(out.with_suffix(".run")), max_steps=steps, per_device_train_batch_size=size.batch, bf16=cuda,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=steps // 50, weight_decay=0.1, save_strategy="no",
        logging_steps=max(steps // 20, 1), report_to=[], seed=0, max_grad_norm=1.0,
    )  # fmt: skip
    start = time.perf_counter()
    result = Trainer(model=model, args=arguments, train_dataset=data).train()  # type: ignore[arg-type]
    model.float().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * size.batch * size.context,
        "loss": result.training_loss,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of parquet files named train and validation")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, help="to train the teacher on")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    size = DRY if args.dry_run else Size()
    size = dataclasses.replace(size, tokens=args.tokens or size.tokens)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, teacher, converted, trained = (folder / n for n in ("corpus", "teacher", "converted", "trained"))
        corpus.mkdir()
        write_corpus(args.books, corpus, characters=min(5 * size.tokens, 400_000_000))
        result: dict[str, Any] = {"size": dataclasses.asdict(size), "dry_run": args.dry_run}
        result["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result["teacher"] = train_teacher(size, tokenizer, corpus, teacher)
        settings = [f"window={size.window}", f"block={min(size.window, 64)}", f"memory={size.window}"]
        convert(str(teacher), converted, recipe="frequency", settings=settings)
        budget = max(size.tokens // 100, 20 * size.context) if not args.dry_run else 20 * size.context
        finetune(converted, trained, data=str(corpus), tokens=budget, seq_len=size.context)
        result["distillation_tokens"] = budget
        held_out = token_rows(
            str(corpus), tokenizer, seq_len=size.context, tokens=size.eval_tokens, held_out=True, shuffle_seed=None
        )
        for key, checkpoint in (("untrained", converted), ("converted", trained)):
            found = evaluate(
                checkpoint, baseline=str(teacher), data=str(corpus), seq_len=size.context, max_tokens=size.eval_tokens
            )
            result[key] = dataclasses.asdict(found)
        for key, checkpoint in (("teacher", teacher), ("untrained", converted), ("converted", trained)):
            model = load_any(str(checkpoint)).eval()
            result[key]["recall"] = planted_pairs(model, held_out, list(size.distances))
            print(key, json.dumps(result[key].get("recall")), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"perplexity ratio {result['converted']['perplexity_ratio']:.4f}")


if __name__ == "__main__":
    main()
