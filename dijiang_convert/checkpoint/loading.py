"""Loads models and tokenizers: converted checkpoints with this package's code, any others with that of transformers.

Code that lies in a repository or a folder is never run.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..architecture.config import check_config
from ..architecture.trace import quiet
from ..errors import DijiangError
from ..files import read_json
from ..modeling import configuration_dijiang, modeling_dijiang
from ..source.resolve import download, resolve
from .shards import read_checkpoint


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of that name, or the default one for None. Raises DijiangError if PyTorch can't use the device."""
    if name is None:
        return default_device()
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DijiangError(f"no device {name!r} here: --device takes cpu, or cuda where PyTorch sees a GPU") from error


def load_converted(
    folder: str | Path, attention: str = "dijiang", device: torch.device | None = None, dtype: str | None = None
) -> PreTrainedModel:
    """Loads a converted checkpoint, with this package's code and never the folder's.

    attention: "dijiang", "softmax" for softmax attention on the base weights, or a function of `AttentionInterface`.
    device: None for the default one.
    dtype: of the weights, as transformers names it; None for that of the checkpoint.
    Raises DijiangError if the folder is no converted checkpoint, or its weights don't fit.
    """
    name = read_checkpoint(folder)["architectures"][0]
    try:
        model_class = getattr(modeling_dijiang, name)
        chosen = softmax_implementation(model_class) if attention == "softmax" else attention
        with quiet():
            model: Any = model_class.from_pretrained(
                str(folder), config=converted_config(folder, attn_implementation=chosen), dtype=dtype or "auto"
            )
    except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise DijiangError(f"can't load {folder}: {' '.join(str(error).split())[:300]}") from error
    if attention == "dijiang":
        _check_attention(model, folder)
    return model.to(device or default_device())


def _check_attention(model: PreTrainedModel, folder: str | Path) -> None:
    """Raises DijiangError where a converted layer runs another attention function than its kernel."""
    for module in model.modules():
        if hasattr(module, "dijiang") and not module.config._attn_implementation.startswith("dijiang"):  # type: ignore[union-attr, operator]
            raise DijiangError(
                f"{folder} runs {module.config._attn_implementation} attention: take attn_implementation out of its "  # type: ignore[union-attr]
                "config.json, or convert the source again"
            )


def is_converted(model: PreTrainedModel) -> bool:
    return getattr(model.config, "dijiang", None) is not None


def check_weights(folder: Path, source: object) -> None:
    """Compares names and shapes of the tensors of a converted checkpoint with its model, by their headers alone.

    Raises DijiangError where the model lacks a tensor, or one has another shape than ``source``'s config says.
    """
    model_class = getattr(modeling_dijiang, read_checkpoint(folder)["architectures"][0])
    try:
        with quiet():
            model_class.from_pretrained(str(folder), config=converted_config(folder), device_map="meta", dtype="auto")
    except (ValueError, RuntimeError) as error:
        reason = next(
            (line for line in str(error).splitlines() if "size mismatch" in line or "MISMATCH" in line), error
        )
        told = " ".join(str(reason).split())[:200]
        raise DijiangError(
            f"the weights of {source} are not those of its config.json ({told}): get it again"
        ) from error


def check_generation_config(folder: Path) -> None:
    """Raises DijiangError where the folder has a generation_config.json that transformers can't load."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    read_json(path)
    try:
        with quiet():
            GenerationConfig.from_pretrained(str(folder))
    except Exception as error:  # transformers compares and merges the values of any type that the file may hold
        reason = " ".join(str(error).split())[:200]
        raise DijiangError(f"{path} is not valid ({reason}): get it again, or take it away") from error


def softmax_implementation(model_class: Any) -> str:
    """The attention function that runs a converted model as the softmax model it was.

    That is "sdpa", or "eager" for models whose logits are soft-capped or have sinks, which PyTorch's SDPA lacks.
    """
    return "sdpa" if model_class._supports_sdpa else "eager"


def load_any(
    source: str, device: torch.device | None = None, revision: str | None = None, dtype: str | None = None
) -> PreTrainedModel:
    """Loads a converted checkpoint, or any model that transformers knows, by alias, Hub id or folder.

    A model that generates no text gets the class that its config names, any other is a causal language model. Raises
    DijiangError if the model can't be found or loaded.
    """
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file() and "dijiang" in read_json(folder / "config.json"):
        return load_converted(folder, device=device, dtype=dtype)
    found = download(resolve(source, revision)).folder
    assert found is not None
    if "dijiang" in read_json(found / "config.json"):  # a converted checkpoint on the Hub
        return load_converted(found, device=device, dtype=dtype)
    check_config(read_json(found / "config.json"))
    try:
        with quiet():
            model: Any = _class_of(found).from_pretrained(str(found), dtype=dtype or "auto", trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise DijiangError(f"can't load {source}: {' '.join(str(error).split())[:300]}") from error
    return model.to(device or default_device())


def _class_of(folder: Path) -> Any:
    """The class that the config names, if it generates no text, else AutoModelForCausalLM."""
    name = (read_json(folder / "config.json").get("architectures") or [""])[0]
    named = getattr(transformers, name, None)
    is_other = isinstance(named, type) and issubclass(named, PreTrainedModel) and not issubclass(named, GenerationMixin)
    return named if is_other else AutoModelForCausalLM


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a converted checkpoint or of any model. Raises DijiangError if it can't be found or loaded."""
    folder = Path(source).expanduser()
    options: dict[str, Any] = {}
    if not folder.is_dir():
        folder = download(resolve(str(source))).folder or folder
    if "dijiang" in read_json(folder / "config.json"):
        options["config"] = converted_config(folder)  # without it, AutoTokenizer needs the folder's code
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # `tokenizers` raises no other class for a bad tokenizer.json, transformers any
        reason = " ".join(str(error).split())[:200]
        raise DijiangError(f"can't load the tokenizer of {source}: {reason}") from error


def converted_config(folder: str | Path, **options: Any) -> Any:
    """The config of a converted checkpoint, as transformers parses it."""
    name = read_checkpoint(folder)["auto_map"]["AutoConfig"].rpartition(".")[2]
    return getattr(configuration_dijiang, name).from_pretrained(str(folder), **options)


def silence() -> None:
    """Turns off progress bars and notes of the libraries. This package's own tell what a user needs."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it notes that a home folder can't be written
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\b")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def generates(model: Any) -> bool:
    """Whether a model, converted or not, predicts the next token.

    Other models return hidden states, or what a head computes from hidden states.
    """
    section = getattr(model.config, "dijiang", None) or {}
    return isinstance(model, GenerationMixin) and section.get("causal", True)


def predicts(config: Any) -> bool:
    """What `generates` says of a converted checkpoint's model, by its config."""
    return issubclass(getattr(modeling_dijiang, config.architectures[0]), GenerationMixin) and config.dijiang["causal"]


def takes_images(config: Any) -> bool:
    """Whether a converted checkpoint's model takes images, by its config."""
    return getattr(modeling_dijiang, config.architectures[0]).main_input_name == "pixel_values"


def hidden_size(model: PreTrainedModel) -> int:
    config: Any = model.config.get_text_config()
    return config.hidden_size
