"""Triton's interpreter, which runs kernels on CPU tensors, with what it lacks: shims for tests, none on a GPU."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dijiang_convert.modeling import accelerated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def take_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to kernels. bfloat16, which numpy does not know, is computed with in float32 and rounded."""
    monkeypatch.setattr(accelerated, "MODE", "interpret")
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, binary_op = InterpreterBuilder.create_dot, InterpreterBuilder.binary_op

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return create_dot(self, wide(a), wide(b), *more)

    def operation(self: Any, a: Any, b: Any, op: Any) -> Any:
        result = binary_op(self, wide(a), wide(b), op)
        is_narrow = a.dtype.scalar == tl.bfloat16 and result.data.dtype == np.float32
        return self.create_fp_trunc(result, tl.bfloat16) if is_narrow else result

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "binary_op", operation)


def run_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention's own kernels: the autotuner, which would time them, takes the first choice, and counters
    of loops, plain integers in the interpreter, have the one method of tensors that they use."""
    take_kernels(monkeypatch)
    if DEVICE == "cuda":
        return
    from triton.runtime.autotuner import Autotuner

    def first_choice(self: Any, *args: Any, **options: Any) -> Any:
        return self.fn.run(*args, **options, **self.configs[0].all_kwargs())

    monkeypatch.setattr(Autotuner, "run", first_choice)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops.") and hasattr(module, "tl"):
            monkeypatch.setattr(module, "range", _counting, raising=False)


class _Counter(int):
    def to(self, dtype: Any) -> _Counter:
        return self


def _counting(*bounds: Any) -> Iterator[_Counter]:
    return map(_Counter, builtins.range(*(int(x.handle.data.item()) if hasattr(x, "handle") else x for x in bounds)))
