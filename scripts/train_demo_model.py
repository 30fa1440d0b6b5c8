"""Trains the small GPT-NeoX that ``dijiang demo`` converts, on the standard library's own sources.

    python scripts/train_demo_model.py --minutes 25

It is a Pythia in miniature: the same architecture, head size and rotary share, with a byte-level BPE of 1024
tokens and tied embeddings, so that float32 weights stay under 4 MB. The learning rate follows the clock, not
a step count, so the same seed gives the same batches, but not the same weights on a faster machine.
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from dijiang_convert.data import demo_text
from dijiang_convert.demo import MODEL

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 2048
BLOCK = 512  # tokens of a training sequence
WARMUP = 0.04  # of the training time
REPORT_EVERY = 120  # seconds


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        initializer_range=0.05,  # of the order of 1 / sqrt(hidden_size)
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def pack(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """All texts as one stream of tokens, with the end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([token for text in texts for token in (*tokenizer.encode(text).ids, end)])


def batches(stream: Tensor, size: int) -> Iterator[Tensor]:
    """Batches without end: each epoch cuts the stream into blocks at another offset and shuffles them."""
    while True:
        offset = int(torch.randint(BLOCK, ()))
        blocks = stream[offset:].unfold(0, BLOCK, BLOCK)
        yield from torch.split(blocks[torch.randperm(len(blocks))], size)


@torch.no_grad()
def report(progress: str, model: GPTNeoXForCausalLM, held_out: Tensor) -> None:
    blocks = held_out.unfold(0, BLOCK, BLOCK).unsqueeze(1)
    loss = sum(model(input_ids=block, labels=block).loss.item() for block in blocks) / len(blocks)
    print(f"{progress}  validation loss {loss:.4f}  perplexity {math.exp(loss):.2f}", flush=True)


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.525 + 0.475 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def train(model: GPTNeoXForCausalLM, stream: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start = last_report = time.monotonic()
    tokens = 0
    for batch in batches(stream, args.batch_size):
        now = time.monotonic()
        progress = (now - start) / (60 * args.minutes)
        if progress >= 1:
            break
        if now - last_report >= REPORT_EVERY:
            report(f"{progress:4.0%}  {tokens:,} tokens", model, held_out[: 32 * BLOCK])
            last_report = now
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, progress)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch.numel()
    report(f"done  {tokens:,} tokens, {tokens / len(stream):.2f} epochs", model, held_out)


def save(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes beside ``folder`` first, so that it holds the old model or the new one, never half of each."""
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    fast_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    model.save_pretrained(new)
    fast_tokenizer.save_pretrained(new)
    (new / "model.safetensors").chmod(0o644)  # as it is written, only its owner can read it
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--minutes", type=float, default=25, help="training time (default 25)")
    parser.add_argument("--batch-size", type=int, default=4, help=f"blocks of {BLOCK} tokens (default 4)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default 3e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=MODEL)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    texts = demo_text.documents("train")
    tokenizer = train_tokenizer(texts)
    stream, held_out = pack(texts, tokenizer), pack(demo_text.documents("validation"), tokenizer)
    model = build_model()
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens", flush=True)
    train(model, stream, held_out, args)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
