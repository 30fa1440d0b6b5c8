"""What lies beside a checkpoint's weights: the modeling code, and the source's tokenizer, chat template and license."""

import importlib.metadata
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import DijiangError, Unsupported
from ..progress import console
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
# Of a source's files these don't come along: weights are laid out anew, and the card tells of the new model.
LEFT_BEHIND = (
    ".safetensors", ".bin", ".index.json", ".py", ".md", ".h5", ".msgpack", ".pt", ".pth", ".ot", ".onnx", ".gguf",
)  # fmt: skip

CODE_KEYS = ("auto_map", "custom_pipelines", "custom_generate")
LARGE_JSON = ("tokenizer.json", "vocab.json")  # which name no code


def made_with() -> dict[str, str]:
    """The libraries that a checkpoint was made with, and their versions."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def write_code(folder: Path) -> None:
    """Puts the modeling files beside the weights, as transformers' trust_remote_code wants them."""
    for name in MODELING_FILES:
        shutil.copyfile(Path(__file__).parents[1] / "modeling" / name, folder / name)


def copy_companions(source: Path, target: Path, without: Collection[str] = ("config.json",)) -> None:
    """Tokenizer, generation config, chat template, license: whatever lies beside the weights; and the further modules
    of a sentence-transformers model."""
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and not path.name.startswith(".") and not path.name.endswith(LEFT_BEHIND)
        if not wanted or path.name in without:
            continue
        shutil.copyfile(path, target / path.name)
        if path.suffix == ".json" and path.name not in LARGE_JSON:
            try:
                content = json.loads(path.read_bytes())
            except ValueError:  # it names nothing to anybody
                continue
            if (harmless := without_code(content)) != content:
                write_json(target / path.name, harmless)
                console.print(f"left out: code of the source's own that {path.name} names", soft_wrap=True)
    for name in module_folders(source):
        shutil.copytree(source / name, target / name)


def without_code(value: Any) -> Any:
    """A config without what tells transformers to run a repository's code: a converted model runs this package's
    alone, and who trusts that need not trust another's."""
    if isinstance(value, dict):
        return {key: without_code(each) for key, each in value.items() if key not in CODE_KEYS}
    return [without_code(each) for each in value] if isinstance(value, list) else value


def module_folders(folder: Path) -> list[str]:
    """What follows the Transformer in a sentence-transformers model (pooling, dense layers, normalisation) lies in
    folders that its modules.json names.

    Raises DijiangError where one is missing or outside, and Unsupported for modules with code of their own."""
    if not (folder / "modules.json").is_file():
        return []
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    own = [each["type"] for each in modules if not each["type"].startswith("sentence_transformers.")]
    if own:
        raise Unsupported(f"modules.json names {own[0]}, code of the model's own: only sentence-transformers' modules")
    names = [each["path"] for each in modules if each["path"]]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (folder / name).is_dir():
            raise DijiangError(f"modules.json names {name}, no folder of {folder}: get the model again")
    return names
