"""`dijiang inspect`: what a conversion would do to a model. Reads only its config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .architecture.examine import Architecture, check_kernel, examine
from .architecture.trace import skeleton
from .errors import Unsupported
from .modeling.configuration_dijiang import Kernel, Layers
from .modeling.modeling_dijiang import attach
from .modeling.past import Sizes
from .recipe import Recipe, load_recipe
from .source.resolve import read_config, resolve
from .training.estimate import StageCost, stage_cost, teacher_copies

LENGTHS = (1024, 8192, 65536)


@dataclass(frozen=True)
class InspectResult:
    """``reason`` says why a model is not supported. Sizes are in bytes, for one sequence.

    state_bytes: what converted layers keep at any length; kv_cache_bytes_at: what they kept as softmax, by length;
        smaller_from: the length in tokens from which the latter is more, None where sliding windows keep it small.
        Encoders keep nothing.
    weights_bytes: what is downloaded, and what a copy of it takes.
    finetune_tokens, finetune_bytes, finetune_operations: what the recipe's stages train on, the memory that the largest
        of them takes, and the floating-point operations of them all, by the formulas of `estimate`.
    """

    source: str
    architecture: str
    supported: bool
    reason: str | None = None
    layers: int = 0
    layers_converted: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    parameters: int = 0
    new_parameters: int = 0
    state_bytes: int = 0
    kv_cache_bytes_at: dict[int, int] | None = None
    smaller_from: int | None = None
    weights_bytes: int = 0
    finetune_tokens: int = 0
    finetune_bytes: int = 0
    finetune_operations: int = 0


def inspect(
    source: str,
    *,
    recipe: str | None = None,
    revision: str | None = None,
    layers: str = "all",
    settings: Sequence[str] = (),
) -> InspectResult:
    """Looks at a model through its config alone. Arguments as in `convert`.

    Raises DijiangError where there is no such model or recipe; an unsupported one is a result, not an error.
    """
    found = resolve(source, revision)
    config = read_config(found)
    kind = str((config.get("architectures") or [config.get("model_type")])[0])
    try:
        architecture = examine(config, layers)
        chosen = load_recipe(recipe or architecture.recipe, settings)
        check_kernel(chosen.kernel, architecture)
    except Unsupported as error:
        return InspectResult(str(found), kind, False, str(error))
    shape = architecture.layers
    new = architecture.new_parameters(chosen.kernel)
    half = str(config.get("dtype", config.get("torch_dtype"))) in ("float16", "bfloat16")
    dtype = torch.bfloat16 if half else torch.float32
    width = dtype.itemsize
    count = getattr(architecture.config.get_text_config(), "num_hidden_layers", 0)
    kept = state_bytes(chosen.kernel, shape, dtype) if shape.causal else 0
    costs = _stage_costs(architecture, chosen, width)
    return InspectResult(
        source=str(found),
        architecture=kind,
        supported=True,
        layers=max([count, *(index + 1 for index in shape.layers)]),
        layers_converted=len(shape.layers),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        parameters=architecture.parameters,
        new_parameters=new,
        state_bytes=kept,
        kv_cache_bytes_at={n: _kv_cache_bytes(shape, n, width) for n in LENGTHS} if shape.causal else None,
        smaller_from=kept // _kv_cache_bytes(shape, 1, width) + 1 if kept and not _slides(architecture) else None,
        weights_bytes=architecture.parameters * width,
        finetune_tokens=sum(cost.tokens for cost in costs),
        finetune_bytes=max((cost.memory_bytes for cost in costs), default=0),
        finetune_operations=sum(cost.operations for cost in costs),
    )


def _slides(architecture: Architecture) -> bool:
    """Whether converted layers had sliding windows, whose cache stops to grow."""
    config: Any = architecture.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) is not None
    return any(types[layer] == "sliding_attention" for layer in architecture.layers.layers)


def _kv_cache_bytes(layers: Layers, length: int, width: int) -> int:
    return len(layers.layers) * layers.kv_heads * (layers.head_dim + layers.value_dim) * length * width


def _stage_costs(architecture: Architecture, recipe: Recipe, width: int) -> list[StageCost]:
    model = skeleton(architecture.model_class, architecture.config)
    attach(model, recipe.kernel, architecture.layers)
    copies = zip(recipe.stages, teacher_copies(recipe.stages), strict=True)
    return [stage_cost(model, recipe.kernel, architecture.layers, s, width, copy) for s, copy in copies]


def state_bytes(kernel: Kernel, layers: Layers, dtype: torch.dtype) -> int:
    """What the cache of all converted layers holds for one sequence, with keys and values of this dtype."""
    turned = layers.rotates and kernel.rotary == "remove"
    like = torch.empty(0, dtype=dtype, device="meta")
    total = 0
    for layer in layers.layers:
        far_k = kernel.far and (kernel.shift or (turned and layer not in layers.unrotated))
        sizes = Sizes(
            kernel, layers.heads, layers.kv_heads, layers.head_dim, layers.value_dim, far_k, layers.memory_of(layer)
        )
        total += sum(x.nbytes for x in sizes.empty(1, like).tensors())
    return total
