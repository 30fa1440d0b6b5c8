"""Compiles what decoding launches for an H100, and prints the names of the kernels. In a process of its own: Triton's
interpreter must be off. What a launch passes is taken down and compiled, on a machine without a GPU, too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dijiang_convert.modeling import decode_kernels
from dijiang_convert.modeling.attention import Call
from dijiang_convert.modeling.cache import StaticDiJiangCacheLayer
from tests.modeling.test_decode_kernels import DEFAULT, Inputs, layer

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip


class Compiled:
    """Stands for a kernel: compiles it for what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        values = {**dict(zip(names, args, strict=False)), **constants}
        signature, fixed = {}, {}
        for name in names:
            value = values[name]
            if name in constants or value is None:
                signature[name], fixed[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, signature, fixed)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        print(self.kernel.__name__)


def main() -> None:
    for name in ("gates", "find_features", "attend"):
        setattr(decode_kernels, name, Compiled(getattr(decode_kernels, name)))
    child = layer(DEFAULT, 16, 16, 8)
    inputs, cache = Inputs(child, 1, torch.bfloat16), StaticDiJiangCacheLayer(child.kept, 1)
    cache.update(*inputs.qkv[1:])
    call = Call(cache, inputs.hidden, inputs.cos_sin, scaling=0.25, softcap=30.0)
    turn = decode_kernels.rotation(child.apply_rotary, *inputs.cos_sin, 8)
    with torch.no_grad():
        decode_kernels.decode(child, cache, *inputs.qkv, None, turn, inputs.mask, call)


if __name__ == "__main__":
    main()
