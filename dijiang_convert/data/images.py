"""Reads image files as pixels, for training and measuring models of images.

Stages count tokens, and an image counts as many as the model makes of it. There is no augmentation.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DijiangError
from .readers import HELD_OUT

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_SHARE = 20  # one image in 20 is held out where no folder is named for it


class Images:
    """A data set of images. Each item is {"pixel_values": [channels, height, width]}.

    items: what ``load`` takes, one for each image. load: returns the pixels, [channels, height, width].
    tokens_each: tokens that the model makes of an image.
    """

    packed = False

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Tensor], tokens_each: int) -> None:
        self.items, self.load, self.tokens_each = items, load, tokens_each

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.load(self.items[index])}

    @property
    def tokens(self) -> int:
        return len(self) * self.tokens_each


def image_tokens(config: Any) -> int:
    """Tokens that a model makes of an image: one for each patch, and a class token."""
    sides = [[side, side] if isinstance(side, int) else side for side in (config.image_size, config.patch_size)]
    (height, width), (rows, columns) = sides
    return (height // rows) * (width // columns) + 1


def open_images(data: Any, folder: Path, config: Any, held_out: bool = False) -> Images:
    """The image files of folders or globs, as pixels that the model's own image processor makes.

    Args:
        data: a folder, a glob, or several of them.
        folder: the model's folder, with preprocessor_config.json.
        config: the model's config.
        held_out: whether to take the images set aside for evaluation, those in folders with such a name (validation,
            test) or else one in 20, or all others.

    Raises:
        DijiangError: there are no images or too few, or no processor.
    """
    files = image_files([data] if isinstance(data, str) else list(data))
    top = os.path.commonpath([file.parent for file in files])
    aside = [f for f in files if not HELD_OUT.isdisjoint(part.lower() for part in f.relative_to(top).parts[:-1])]
    aside = aside or files[::HELD_SHARE]
    chosen = aside if held_out else [file for file in files if file not in {*aside}]
    if not chosen:
        raise DijiangError(f"{data} has {len(files)} images, too few to train on some and measure on others: give more")
    processor = _processor(folder)

    def load(file: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        except OSError as error:
            raise DijiangError(f"can't read {file} ({error}): repair it or leave it out") from error

    return Images(chosen, load, image_tokens(config))


def random_images(config: Any, count: int) -> Images:
    """``count`` images of random pixels, to time a model with."""
    side = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    pixels = torch.randn(count, config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    return Images(range(count), lambda i: pixels[i], image_tokens(config))


def image_files(names: Sequence[str]) -> list[Path]:
    """The image files in ``names`` (files, folders or globs), sorted. Raises DijiangError if there are none."""
    found: set[Path] = set()
    for name in names:
        for match in map(Path, glob.glob(os.path.expanduser(name), recursive=True)):
            found |= {*match.rglob("*")} if match.is_dir() else {match}
    files = sorted(path for path in found if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        raise DijiangError(f"no images in {', '.join(names)}: give a folder of {', '.join(SUFFIXES)} files with --data")
    return files


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DijiangError(f"can't load the image processor of {folder}: {reason}") from error
