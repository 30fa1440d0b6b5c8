"""What conversion and finetuning do to encoders: a text encoder and a ViT, both small and trained here.

    python -m benchmarks.encoders LLAMA TEXT HELD_OUT [--tokens N] [--seeds N] [--work FOLDER] [--into PAGE]

The text encoder is a small causal Llama taught to see both sides: its weights in EuroBERT, which is that architecture
without the causal mask, trained on masked tokens of TEXT. The ViT (257 tokens an image) tells apart letters drawn at
random places and sizes. Both are converted by each recipe with its SETTINGS (a window of 16, and as many keys in the
memory where there is one), measured against the original on held-out text or images, finetuned on TEXT or the training
images by the recipe's own stages, and measured again.
Writes the mean over seeds to benchmarks/results/encoders.json, and as a table into PAGE.
"""

import argparse
import dataclasses
import json
import random
import string
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.fidelity.report import write_between
from dijiang_convert import convert, evaluate, finetune
from dijiang_convert.checkpoint.loading import load_any, silence
from dijiang_convert.data.images import open_images

RECIPES = {"text": ("encoder", "frequency", "pure", "window-only"), "vit": ("encoder",)}
WINDOW = ["window=16", "block=16"]
SETTINGS = {"encoder": [*WINDOW, "memory=16"], "frequency": [*WINDOW, "memory=16"], "window-only": WINDOW, "pure": []}
ROW, MASKED = 512, 0.2
SIDE, PATCH = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama")
    parser.add_argument("text")
    parser.add_argument("held_out")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500, help="of an encoder's own training")
    parser.add_argument("--work", type=Path, default=Path("encoders"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/encoders.json")
    parser.add_argument("--into", type=Path, help="a page whose marked part becomes the table")
    args = parser.parse_args()
    silence()
    text, vit, images = args.work / "text", args.work / "vit", args.work / "images"
    if not text.is_dir():
        train_text(args.llama, args.text, text, args.steps)
    if not images.is_dir():
        draw_letters(images)
    if not vit.is_dir():
        train_vit(images / "train", vit, args.steps)
    rows = []
    for name, source, data, held_out in ("text", text, args.text, args.held_out), ("vit", vit, images, images):
        for recipe in RECIPES[name]:
            found = [measure(source, recipe, str(data), str(held_out), args, seed) for seed in range(args.seeds)]
            row = {"model": name, "recipe": recipe, **{key: mean(f[key] for f in found) for key in found[0]}}
            if name == "vit":
                row["original_accuracy"] = accuracy(source, images)
            rows.append(row)
            print(json.dumps(row), flush=True)
    content = {"tokens": args.tokens, "seeds": args.seeds, "settings": SETTINGS, "rows": rows}
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    if args.into:
        write_between(args.into, "encoders", table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Before and after finetuning."""
    keys = {
        "hidden_error": "error of hidden states",
        "hidden_cosine": "their cosine",
        "embedding_cosine": "embeddings' cosine",
        "top1_agreement": "same choice",
        "accuracy": "accuracy",
    }
    lines = [f"| model | recipe | {' | '.join(keys.values())} |", f"|---|---|{'---|' * len(keys)}"]
    for row in rows:
        cells = [f"{row[f'before_{k}']:.3f} → {row[f'after_{k}']:.3f}" if f"after_{k}" in row else "" for k in keys]
        if "original_accuracy" in row:
            cells[-1] += f" (original {row['original_accuracy']:.3f})"
        lines.append(f"| {row['model']} | `{row['recipe']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean(values: Any) -> float:
    values = list(values)
    return round(sum(values) / len(values), 5)


def measure(source: Path, recipe: str, data: str, held_out: str, args: Any, seed: int) -> dict[str, float]:
    """Likeness to the original before and after finetuning, and of a ViT the accuracy."""
    name = f"{source.name}-{recipe}-{seed}"
    converted, tuned = args.work / f"{name}-converted", args.work / f"{name}-finetuned"
    convert(str(source), converted, recipe=recipe, settings=SETTINGS[recipe], force=True)
    stages = ["distill"] if recipe == "window-only" else []
    finetune(converted, tuned, data=data, tokens=args.tokens, stages=stages, seed=seed, force=True, report=False)
    result: dict[str, float] = {}
    for when, folder in ("before", converted), ("after", tuned):
        like = evaluate(folder, baseline=str(source), data=held_out, max_tokens=100_000).likeness
        assert like is not None
        result |= {f"{when}_{key}": value for key, value in dataclasses.asdict(like).items()}
        if source.name == "vit":
            result[f"{when}_accuracy"] = accuracy(folder, Path(data))
    return result


# -------------------------------------------------------------------------------------------------------------- text


def train_text(llama: str, data: str, out: Path, steps: int) -> None:
    source, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    start, end, mask = source.config.bos_token_id, source.config.eos_token_id, 0
    config = transformers.EuroBertConfig(
        **{name: getattr(source.config, name) for name in names},
        bos_token_id=start, eos_token_id=end, pad_token_id=end, mask_token_id=mask,
    )  # fmt: skip
    model = transformers.EuroBertForMaskedLM(config)
    model.load_state_dict(source.state_dict())
    texts = pq.read_table(data).column("text").to_pylist()
    rows = [[start, *tokenizer(t, add_special_tokens=False)["input_ids"][: ROW - 2], end] for t in texts]
    torch.manual_seed(0)
    random.seed(0)

    def loss() -> Tensor:
        picked = random.sample(rows, 16)
        length = max(map(len, picked))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in picked])
        real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in picked])
        hidden = (torch.rand(ids.shape) < MASKED) & (real == 1)
        asked = torch.where(hidden & (torch.rand(ids.shape) < 0.9), mask, ids)
        return model(input_ids=asked, attention_mask=real, labels=ids.masked_fill(~hidden, -100)).loss

    train(model, loss, steps)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(model: nn.Module, loss: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * max(0.02, 1 - s / steps))
    for step in range(steps):
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {value.item():.3f}", flush=True)


# ------------------------------------------------------------------------------------------------------------ images


def draw_letters(folder: Path, each: int = 100) -> None:
    """A quarter as many to validate on."""
    rng = random.Random(0)
    for part, count in ("train", each), ("validation", each // 4):
        (folder / part).mkdir(parents=True)
        for letter in string.ascii_uppercase:
            for i in range(count):
                tile = Image.new("L", (SIDE, SIDE))
                font = ImageFont.load_default(rng.randint(28, 44))
                ImageDraw.Draw(tile).text((SIDE / 2, SIDE / 2), letter, 255, font, anchor="mm")
                tile = tile.rotate(0, translate=(rng.randint(-6, 6), rng.randint(-6, 6)))
                colour, ground = ([rng.randint(low, low + 120) for _ in range(3)] for low in (135, 0))
                image = Image.composite(*(Image.new("RGB", tile.size, tuple(c)) for c in (colour, ground)), tile)
                image.save(folder / part / f"{letter}-{i}.png")


def labelled(folder: Path, model_folder: Path, config: Any, held_out: bool) -> tuple[Tensor, Tensor]:
    images = open_images(str(folder), model_folder, config, held_out)
    labels = [string.ascii_uppercase.index(file.name[0]) for file in images.items]
    return torch.stack([images[i]["pixel_values"] for i in range(len(images))]), torch.tensor(labels)


def train_vit(folder: Path, out: Path, steps: int) -> None:
    config = transformers.ViTConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_labels=26,
    )  # fmt: skip
    torch.manual_seed(0)
    random.seed(0)
    model = transformers.ViTForImageClassification(config)
    out.mkdir()
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (out / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels, labels = labelled(folder, out, config, held_out=False)

    def loss() -> Tensor:
        picked = torch.randint(0, len(pixels), (32,))
        return model(pixel_values=pixels[picked], labels=labels[picked]).loss

    train(model, loss, steps)
    model.save_pretrained(out)


@torch.no_grad()
def accuracy(model_folder: Path, images: Path) -> float:
    model = load_any(str(model_folder)).eval()
    pixels, labels = labelled(images, model_folder, model.config, held_out=True)
    found = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in pixels.split(32)])
    return (found == labels).float().mean().item()


if __name__ == "__main__":
    main()
