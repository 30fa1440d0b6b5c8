"""Configuration of converted models: the source's own config with one more section, ``dijiang``.

`DiJiang<Name>Config` exists for every `<Name>Config` of transformers: the class is built when it is asked for.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    # Dynamic loading hashes a file together with the files that it imports: so two versions of the code are told apart.
    # Each file is named here, since old versions of transformers copy only these, and have to reach the check below.
    from .attention import DiJiangAttention  # noqa: F401
    from .cache import DiJiangCacheLayer  # noqa: F401
    from .decay import StateDecay  # noqa: F401
    from .feature_map import FeatureMap  # noqa: F401
    from .interface import dijiang_attention  # noqa: F401
    from .kernel import attend_blocks  # noqa: F401
    from .layout import Layout  # noqa: F401
    from .linear import attend_chunks  # noqa: F401
    from .memory import Memory  # noqa: F401
    from .modeling_dijiang import DiJiangMixin  # noqa: F401
    from .packing import packed_mask  # noqa: F401
    from .past import Past  # noqa: F401
    from .rotary import rotation  # noqa: F401
    from .state import State  # noqa: F401
    from .step import attend_token  # noqa: F401
    from .table import Table  # noqa: F401

REQUIRES_TRANSFORMERS = "5.18.0"

# The check comes before all other names of transformers, which an old version may lack. A development version counts
# as its release.
if [int(n) for n in transformers.__version__.split(".")[:2]] < [int(n) for n in REQUIRES_TRANSFORMERS.split(".")[:2]]:
    raise ImportError(
        f"this DiJiang checkpoint needs transformers >= {REQUIRES_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers>={REQUIRES_TRANSFORMERS}'"
    )


# The least and the most of a kernel's numbers. Beyond these, a text of a few tokens takes gigabytes.
RANGES = {
    "window": (0, 2**16), "sinks": (0, 2**16), "memory": (0, 2**20), "block": (1, 2**10), "decay_rank": (0, 2**12),
    "seed": (-(2**63), 2**63 - 1),
}  # fmt: skip
MOST_BLOCKS = 2**10  # of a window, since each takes a step of its own
MOST_SCORES = 2**22  # of a block's queries and the window's keys, in each head


@dataclass(frozen=True)
class Kernel:
    """The attention that replaces softmax in every converted layer: a recipe's kernel. Sizes are in tokens.

    window: the fewest tokens before a query that its window holds. The window is the query's own block and the
        window / block blocks before it; 0 for none, so that not even the query's own key is exact.
    sinks: how many of the first tokens keep a row of the table for ever, in 8 bits a number (encoders: unrounded).
    memory: how many other keys keep a row once they have left the window: those with the best scores.
    block: how many tokens leave the window together.
    far: whether keys that leave the window enter a state. Without a state a key that has no row is forgotten.
    signed: whether features are made of y and −y, 2·head_dim of them, or of y alone.
    frequency: start of the learned diagonal T, or "quasi-random" for the paper's fixed one.
    projection: whether a learned W is added to T C.
    learned_features: whether D, a, b and c are learned; without them features are softmax(T C x̂) and have no log-scale.
    rotary: features are made of queries and keys with rotary embedding ("keep") or without it ("remove").
    decay: "learned" for each key/value head, "retnet" for RetNet's, fixed for each query head, or "none".
    selective: whether a token's hidden state moves the decay and its key's log-scale (as in selective state spaces).
    decay_rank: rank of the map from the hidden state to one more decay for each feature (as in gated linear attention,
        arXiv 2312.06635); 0 for a decay of each head alone.
    shift: whether features see queries and keys with a learned share of the previous token's added, a convolution of
        width 2.
    normalize: whether the weighted sum of values is divided by the sum of weights.
    gate: whether the output has group norm a head and a gate SiLU(x W_G).
    seed: of all that is drawn at random, a "quasi-random" T and the start of learned parameters.

    Raises ValueError for a value out of range, and for values that exclude each other.
    """

    window: int = 128
    sinks: int = 4
    memory: int = 432
    block: int = 64
    far: bool = True
    signed: bool = True
    frequency: float | str = 1.0
    projection: bool = True
    learned_features: bool = True
    rotary: str = "remove"
    decay: str = "learned"
    selective: bool = True
    decay_rank: int = 16
    shift: bool = False
    normalize: bool = True
    gate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float | str" or field.name == "frequency":
                good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6
                if not (good or value == "quasi-random"):
                    raise ValueError(f"kernel.frequency is {value!r}: give a positive number up to 1e6 or quasi-random")
            elif type(value) is not type(field.default):
                raise ValueError(f"kernel.{field.name} is {value!r}: give a {type(field.default).__name__}")
        for name, (least, most) in RANGES.items():
            if getattr(self, name) < least:
                raise ValueError(f"kernel.{name} is {getattr(self, name)}: give {least} or more")
            if getattr(self, name) > most:
                raise ValueError(f"kernel.{name} is {getattr(self, name)}: give {most} or less")
        if self.window % self.block:
            raise ValueError(
                f"kernel.window is {self.window}, no whole multiple of kernel.block, {self.block}: change one of them"
            )
        if self.window > min(MOST_BLOCKS * self.block, MOST_SCORES // self.block):
            raise ValueError(
                f"kernel.window is {self.window} and kernel.block {self.block}: a window has at most {MOST_BLOCKS} "
                f"blocks, and window x block is at most {MOST_SCORES}"
            )
        if self.window == 0 and (self.sinks or self.memory):
            raise ValueError("kernel.window is 0, which keeps no exact keys: set kernel.sinks and kernel.memory to 0")
        if self.rotary not in ("keep", "remove"):
            raise ValueError(f"kernel.rotary is {self.rotary!r}: give keep or remove")
        if self.decay not in ("learned", "retnet", "none"):
            raise ValueError(f"kernel.decay is {self.decay!r}: give learned, retnet or none")
        if not self.far and self.window == 0:
            raise ValueError("kernel.far is false and kernel.window is 0: nothing is left to attend to")
        if self.selective and not (self.learned_features and self.decay == "learned"):
            raise ValueError("kernel.selective needs learned_features and decay learned: set kernel.selective false")
        if self.decay_rank and self.decay != "learned":
            raise ValueError(f"kernel.decay_rank needs decay learned, not {self.decay}: set kernel.decay_rank 0")
        if not self.normalize and self.window > 0:
            raise ValueError("kernel.normalize is false: the window needs the denominator, set kernel.window to 0")
        if self.frequency == "quasi-random" and self.learned_features:
            raise ValueError("kernel.frequency quasi-random is the paper's fixed T: set kernel.learned_features false")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Layers:
    """Which layers are converted, and the shape of their attention.

    attention_class, attention_name: the class of the source's attention modules, and the attribute of their parents
        that holds them. Such modules get the kernel if `layers` has their `layer_index`.
    layers: the numbers of the converted layers.
    heads, kv_heads, head_dim, value_dim: query heads, key/value heads, and the width of a key and of a value.
    hidden_size: width of the attention module's input.
    rotates: whether attention has rotary embedding, so that it depends on positions.
    rotary_dim: how many numbers of each head, the first ones, the model's rotary function takes; 0 for none.
    unrotated: those of `layers` that have no rotary embedding, in a model where other layers do.
    borrowing: those of `layers` that take keys and values of an earlier layer, and don't update the cache.
    memory: for each of `layers`, the rows of memory of each key/value head, where heads have different numbers.
    causal: whether a token sees only itself and those before it; False in encoders.
    """

    attention_class: str
    attention_name: str
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int
    rotates: bool = False
    rotary_dim: int = 0
    unrotated: tuple[int, ...] = ()
    borrowing: tuple[int, ...] = ()
    memory: tuple[tuple[int, ...], ...] = ()
    causal: bool = True

    def memory_of(self, index: int) -> tuple[int, ...]:
        """Rows of memory of each key/value head of one of `layers`; () where all have the kernel's."""
        return self.memory[self.layers.index(index)] if self.memory else ()


def read_section(config: transformers.PreTrainedConfig) -> tuple[Kernel, Layers]:
    """The kernel and the layers that the section ``dijiang`` of a converted model's config names.

    Raises ValueError for a section of another version, and for a memory that does not fit the layers or the kernel.
    """
    section: dict[str, Any] = config.dijiang  # type: ignore[attr-defined]
    if "block" not in section["kernel"] or not set(section["kernel"]) <= {field.name for field in fields(Kernel)}:
        raise ValueError(
            f"this checkpoint was written by dijiang-convert {section.get('version')}, whose kernel this code does not "
            "know: convert the source again, or load it with its own code (trust_remote_code=True)"
        )
    values = {field.name: section[field.name] for field in fields(Layers) if field.name in section}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list | tuple)}
    lists["memory"] = tuple(
        tuple(heads) if isinstance(heads, list | tuple) else () for heads in lists.get("memory", ())
    )
    kernel, layers = Kernel(**section["kernel"]), Layers(**{**values, **lists})
    shared = layers.memory
    if shared and (len(shared), {len(heads) for heads in shared}) != (len(layers.layers), {layers.kv_heads}):
        raise ValueError(
            f"dijiang.memory is not {len(layers.layers)} lists, one a layer, of {layers.kv_heads} numbers, one a "
            "key/value head: convert the source again"
        )
    if shared and (kernel.decay == "retnet" or not layers.causal):
        raise ValueError("dijiang.memory needs a causal model and a kernel whose decay is not retnet")
    return kernel, layers


class DiJiangConfigMixin:
    """Adds the section ``dijiang`` and makes the DiJiang attention the default of models with this config."""

    dijiang: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("attn_implementation") is None:
            # In a multimodal model only the text part gets it; the other parts keep their own choice.
            text = [name for name in ("decoder", "generator", "text_config") if name in self.sub_configs]  # type: ignore[attr-defined]
            kwargs["attn_implementation"] = dict.fromkeys(["", *text], "dijiang") if text else "dijiang"
        super().__post_init__(**kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> type:
    """Builds `DiJiang<Name>Config` when it is first asked for."""
    base = getattr(transformers, name.removeprefix("DiJiang"), None) if name.startswith("DiJiang") else None
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    namespace = {
        "__module__": __name__,
        "__annotations__": {"dijiang": dict[str, Any] | None},
        "dijiang": None,
        "model_type": f"dijiang_{base.model_type}",
    }
    globals()[name] = type(name, (DiJiangConfigMixin, base), namespace)
    return globals()[name]
