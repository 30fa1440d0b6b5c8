"""What answers are worth after a conversion: finding what was read, and following instructions, beside the original.

    python benchmarks/tasks.py ORIGINAL CHECKPOINT… --data FILE --out benchmarks/results/smollm2-tasks.json

- pass key: a sentence with a number, somewhere in a text, which is asked for at its end (in the manner of RULER, arXiv
  2404.06654, with text of FILE around it).
- keys and values: as many lines "NAME: NUMBER" as fit, and one of the names is asked for.
- instructions: `INSTRUCTIONS`, through the chat template where there is one, answered greedily. How many answers begin
  with the same `SAME` tokens as the original's, and how many tokens they have in common on average.

Rows that OUT has are not measured again.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dijiang_convert.checkpoint.loading import load_any, load_tokenizer, silence
from dijiang_convert.data.rows import token_rows

LENGTHS = (512, 1024, 2000)
SAMPLES = 16
SAME = 20
WORDS = (
    "apple river stone cloud table horse candle garden winter mirror bridge silver forest button letter violin "
    "anchor basket copper dragon engine feather gravel hammer island jacket kettle ladder marble needle orange "
    "pepper quarry ribbon saddle temple umbrella valley window yellow zipper blanket cotton dinner emerald falcon "
    "ginger harbor"
)
NAMES = WORDS.split()
INSTRUCTIONS = [
    *(f"Explain in two sentences what {what} is." for what in (
        "photosynthesis", "inflation", "a black hole", "democracy", "an algorithm", "gravity", "a metaphor", "DNA",
        "the water cycle", "a prime number",
    )),
    *(f"Write one sentence that uses the word '{word}'." for word in (
        "harbor", "although", "curious", "telescope", "quietly", "borrow", "storm", "golden", "teacher", "forgotten",
    )),
    *(f"Give three {things}." for things in (
        "tips for sleeping better", "uses of a paper clip", "countries in South America", "reasons to learn to swim",
        "ideas for a birthday present", "animals that live in the sea", "words that rhyme with cat",
        "ways to save water", "questions to ask a new neighbour", "healthy breakfasts",
    )),
    *(f"Translate into French: {text}" for text in (
        "Good morning.", "Where is the station?", "I like your house.", "The book is on the table.", "Thank you.",
    )),
    *(f"What is {sum_}?" for sum_ in ("12 + 30", "7 times 8", "100 - 45", "half of 36", "the capital of Italy")),
    *(f"Rewrite this politely: {text}" for text in (
        "Give me the report.", "You are late.", "I don't want to come.", "Be quiet.", "Your plan is bad.",
    )),
    *(f"Write a short {kind}." for kind in (
        "poem about rain", "story about a lost dog", "note to thank a friend", "joke about computers",
        "recipe for pancakes",
    )),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the original first")
    parser.add_argument("--data", required=True, help="text to hide pass keys in")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    silence()
    tokenizer = load_tokenizer(args.models[0])
    rows = token_rows(args.data, tokenizer, seq_len=max(LENGTHS), tokens=max(LENGTHS) * SAMPLES, held_out=True)
    texts = [tokenizer.decode(row[:length]) for row, length in zip(rows.ids, rows.lengths, strict=True)]
    content = json.loads(args.out.read_text()) if args.out.exists() else {}
    for i, name in enumerate(args.models):
        if Path(name).name in content:
            continue
        model = load_any(name).eval()
        found: dict[str, Any] = {}
        for length in LENGTHS:
            for task in (pass_key, pairs):
                prompts = [task(random.Random(sample), tokenizer, texts, length) for sample in range(SAMPLES)]
                right = [number in tokenizer.decode(answer(model, tokenizer, x, 8)) for x, number in prompts]
                found[f"{task.__name__} {length}"] = fmean(right)
                print(name, task.__name__, length, fmean(right), flush=True)
        model.float()  # rounding to bfloat16 alone would change a third of the answers
        found["answers"] = [answer(model, tokenizer, asked(tokenizer, x), SAME) for x in INSTRUCTIONS]
        original = found["answers"] if i == 0 else content[Path(args.models[0]).name]["answers"]
        common = [in_common(own, theirs) for own, theirs in zip(found["answers"], original, strict=True)]
        found["same answers"] = fmean(count >= min(SAME, len(x)) for count, x in zip(common, original, strict=True))
        found["tokens in common"] = fmean(common)
        print(name, found["same answers"], found["tokens in common"], flush=True)
        content[Path(name).name] = found
        args.out.write_text(json.dumps(content) + "\n")


def pass_key(chosen: random.Random, tokenizer: Any, texts: list[str], length: int) -> tuple[list[int], str]:
    """The tokens of a prompt, and the number that answers it."""
    number = str(chosen.randrange(10_000, 100_000))
    hidden, question = (
        tokenizer.encode(part, add_special_tokens=False)
        for part in (
            f" The pass key is {number}. Remember it: {number} is the pass key. ",
            " What is the pass key? The pass key is",
        )
    )
    text = tokenizer.encode(chosen.choice(texts))[: length - len(hidden) - len(question)]
    place = chosen.randrange(len(text))
    return [*text[:place], *hidden, *text[place:], *question], number


def pairs(chosen: random.Random, tokenizer: Any, texts: list[str], length: int) -> tuple[list[int], str]:
    """The same. Names come once each: of as many words as are needed."""
    names = [f"{a} {b}" for a in NAMES for b in NAMES if a != b]
    chosen.shuffle(names)
    lines, known, ids = [], {}, 0
    while ids < length - 20:
        name = names.pop()
        known[name] = str(chosen.randrange(10_000, 100_000))
        lines.append(f"{name}: {known[name]}\n")
        ids += len(tokenizer.encode(lines[-1]))
    name = chosen.choice(list(known))
    return tokenizer.encode("".join(lines) + f"\n{name}:"), known[name]


def asked(tokenizer: Any, instruction: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(instruction)
    messages = [{"role": "user", "content": instruction}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, ids: list[int], count: int) -> list[int]:
    """At most so many tokens, greedily."""
    prompt = torch.tensor([ids], device=model.device)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def in_common(own: list[int], theirs: list[int]) -> int:
    """How many tokens two answers begin with alike."""
    same = [a == b for a, b in zip(own, theirs, strict=False)]
    return same.index(False) if False in same else len(same)


if __name__ == "__main__":
    main()
