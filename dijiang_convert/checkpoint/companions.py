"""Writes what lies beside a checkpoint's weights: modeling code, and the source's tokenizer, chat template and license.

The model card is written in `card`, weights in `shards`.
"""

import importlib.metadata
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..architecture.config import ATTENTION_KEYS
from ..errors import DijiangError
from ..files import ADAPTER, check_link, read_any_json
from ..progress import say
from ..source.modules import module_folders
from .quality import EVALUATION
from .shards import write_json

MODELING_FILES = (
    "configuration_dijiang.py",
    "modeling_dijiang.py",
    "attention.py",
    "feature_map.py",
    "decay.py",
    "interface.py",
    "kernel.py",
    "layout.py",
    "linear.py",
    "memory.py",
    "packing.py",
    "past.py",
    "rotary.py",
    "state.py",
    "step.py",
    "table.py",
    "cache.py",
)
# Suffixes of the source's files that are not copied: weights, code and model card are written anew.
LEFT_BEHIND = (
    ".safetensors", ".bin", ".index.json", ".py", ".md", ".h5", ".msgpack", ".pt", ".pth", ".ot", ".onnx", ".gguf",
)  # fmt: skip

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")  # keys of a config that name a repository's code
LARGE_JSON = ("tokenizer.json", "vocab.json")  # large files that name no code, so they need no reading


def made_with() -> dict[str, str]:
    """The libraries that a checkpoint was made with, and their versions."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def write_code(folder: Path) -> None:
    """Copies the modeling files into a checkpoint, where transformers looks for them with trust_remote_code."""
    for name in MODELING_FILES:
        shutil.copyfile(Path(__file__).parents[1] / "modeling" / name, folder / name)


def copy_companions(source: Path, target: Path, without: Collection[str] = ("config.json", EVALUATION)) -> None:
    """Copies what lies beside the source's weights: tokenizer, generation config, chat template, license and the like.

    The folders of `module_folders` are copied as well. Keys that name code are left out of JSON files, and so is JSON
    that can't be read, since another reader might find such keys in it.

    without: names of files that are not copied.
    Raises DijiangError as `check_links`.
    """
    for path in check_links(source):
        if path.name in without:
            continue
        if path.name == ADAPTER:
            say(f"left out: {ADAPTER}, since an adapter beside the weights is not converted")
        elif path.suffix != ".json" or path.name in LARGE_JSON:
            shutil.copyfile(path, target / path.name)
        else:
            try:
                content = read_any_json(path)
            except DijiangError as error:
                say(f"left out: {error}")
                continue
            shutil.copyfile(path, target / path.name)
            if (harmless := without_code(content)) != content:
                write_json(target / path.name, harmless)
                say(f"left out: code of the source's own that {path.name} names")
            if path.name == "generation_config.json" and "cache_implementation" in harmless:
                write_json(target / path.name, {k: v for k, v in harmless.items() if k != "cache_implementation"})
                say(f"left out: {path.name}'s cache, since converted layers have their own")
    for name in module_folders(source):
        shutil.copytree(source / name, target / name)


def check_links(folder: Path) -> list[Path]:
    """The files that lie beside the weights of a model, without those of `module_folders`.

    Raises DijiangError where one of either is a link to a file elsewhere, see `check_link`.
    """
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_BEHIND)
    ]
    for path in (*files, *(path for name in module_folders(folder) for path in (folder / name).rglob("*"))):
        check_link(path, folder)
    return files


def without_code(value: Any) -> Any:
    """A config without the keys that make transformers run a repository's code.

    A converted model runs this package's code alone. Whoever trusts it need not trust the source's code.
    """
    if isinstance(value, dict):
        return {key: without_code(each) for key, each in value.items() if key not in CODE_KEYS}
    return [without_code(each) for each in value] if isinstance(value, list) else value


def without_attention(value: Any) -> Any:
    """A config without the keys that choose an attention function, in its parts as well."""
    if isinstance(value, dict):
        return {key: without_attention(each) for key, each in value.items() if key not in ATTENTION_KEYS}
    return value
