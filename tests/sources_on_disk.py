"""Small random models on disk, as a source of a conversion. Nothing is downloaded.

The weights are transformers' own initialisation, the tokenizer is byte-level BPE without merges, so that any text can
be encoded by a vocabulary of 258.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 258
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 0}


def llama_config(**changes: Any) -> PreTrainedConfig:
    """Grouped-query attention: 4 heads of 8 share 2 for keys."""
    values = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, **TOKENS,
    }  # fmt: skip
    return transformers.LlamaConfig(**{**values, **changes})


def neox_config(**changes: Any) -> PreTrainedConfig:
    """Pythia's architecture: a quarter of each head is rotated."""
    values = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "vocab_size": VOCABULARY, "max_position_embeddings": 256, **TOKENS,
    }  # fmt: skip
    return transformers.GPTNeoXConfig(**{**values, **changes})


def random_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model, always the same; noise on every parameter, so that none is at a neutral value."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(dtype)


def write_tokenizer(folder: Path, around: tuple[str, str] | None = None) -> None:
    """around: what it puts before and after a text; it then has a padding token, too."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if around is not None:
        first, last = around
        ends = [(name, names.index(name)) for name in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if around is not None:
        fast.pad_token = names[TOKENS["pad_token_id"]]
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_source(
    folder: Path, config: PreTrainedConfig, *, shard_size: str = "1GB", dtype: torch.dtype = torch.float32
) -> Path:
    """A source as transformers saves it: safetensors, tokenizer, generation config; and what else repositories hold."""
    random_model(config, dtype).save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    (folder / "LICENSE").write_text("Apache License\n")
    (folder / "README.md").write_text("# The source\n")
    return folder


def write_pickles(source: Path, folder: Path, shards: int = 1) -> Path:
    """The same source with pytorch_model.bin, or with an index and ``shards`` of them."""
    folder.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("model"):
            (folder / path.name).write_bytes(path.read_bytes())
    state = dict(transformers.AutoModelForCausalLM.from_pretrained(source).state_dict())
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {key: value for j, (key, value) in enumerate(state.items()) if j % shards == i}
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
