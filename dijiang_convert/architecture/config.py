"""Refuses a config.json with values that no model can have, before anything is built from it.

transformers checks types, and that some numbers fit each other. What it leaves out ends in a NaN, or takes all memory.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import DijiangError

LAYERS = re.compile(
    r"(n|num|encoder|decoder|hidden)_(\w+_)?layers?$|depths?$"
)  # keys that say how many layers there are
# Keys by which a config chooses an attention function: they would choose another one than the kernel.
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
MOST_LAYERS = 2048  # the deepest Transformers that were published have 1,000
HEADS = re.compile(r"heads?$")  # keys that say how many heads there are
MOST_HEADS = 2**14
EPSILON = re.compile(r"(^|_)(eps|epsilon)$")  # keys of what is added below a root
# Keys of what rotary embeddings divide by.
ABOVE_ZERO = re.compile(r"(^|_)theta$|^(rotary_emb_base|factor|low_freq_factor|high_freq_factor|attention_factor)$")


def check_config(config: dict[str, Any]) -> None:
    """Raises DijiangError for a config.json with a value that no model can have."""
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise _bad("architectures", names, "give a list with the name of its class")
    for key, value in _values(config):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in ("dtype", "torch_dtype") and not _is_dtype(value):
            raise _bad(key, value, "give float32, float16 or bfloat16")
        if key in ATTENTION_KEYS and "/" in str(value):
            raise _bad(key, value, "attention from the Hub is code, which is not run: take the key out")
        if number and math.isnan(value):
            raise _bad(key, value, "give a number")
        for keys, most in ((LAYERS, MOST_LAYERS), (HEADS, MOST_HEADS)):
            if number and keys.search(key) and value > most:
                raise _bad(key, value, f"the most is {most:,}")
        if number and EPSILON.search(key) and not 0 <= value < math.inf:
            raise _bad(key, value, "give 0 or more")
        if number and ABOVE_ZERO.search(key) and not 0 < value < math.inf:
            raise _bad(key, value, "give a number above 0")


def _bad(key: str, value: Any, remedy: str) -> DijiangError:
    return DijiangError(f"config.json says {key} is {value!r:.80}: {remedy}, or get the model again")


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within a config, with the key that it has, or that the list has which it is in."""
    yield key, value
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _values(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _values(each, key)


def _is_dtype(value: Any) -> bool:
    if value is None or value == "auto":
        return True
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
