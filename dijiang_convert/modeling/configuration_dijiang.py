"""Configuration of converted models: the source's own config with one more section, ``dijiang``.

`DiJiang<Name>Config` exists for every `<Name>Config` of transformers: the class is built when it is asked for.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import transformers

if TYPE_CHECKING:
    # Makes dynamic loading treat all files as one: they are hashed together. Each is named, since transformers too old
    # for this code copies no others, and would fail over them before it can be told its age below.
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

# Before anything else of transformers is named: an old one may not have it. Development versions count as released.
if [int(n) for n in transformers.__version__.split(".")[:2]] < [int(n) for n in REQUIRES_TRANSFORMERS.split(".")[:2]]:
    raise ImportError(
        f"this DiJiang checkpoint needs transformers >= {REQUIRES_TRANSFORMERS}, found {transformers.__version__}: "
        f"pip install -U 'transformers>={REQUIRES_TRANSFORMERS}'"
    )


@dataclass(frozen=True)
class Kernel:
    """What replaces softmax in every converted layer. Raises ValueError for a combination that means nothing.

    window: how many keys before a token keep their exact softmax weight at least: those of its own block and of
        window / block blocks before it. 0 keeps none, not even the token's own.
    sinks: how many of the first tokens keep a row of their own for ever, in 8 bits a number (encoders: as they are).
    memory: how many of all other keys that left the window keep one, those with the best scores.
    block: tokens that leave the window together.
    far: a state of all keys that left the window. False has none: what is in no exact row is forgotten.
    signed: features of y and −y (2·head_dim of them) instead of y alone.
    frequency: start of the learned diagonal T, or "quasi-random" for the paper's fixed one.
    projection: adds the learned W to T C.
    learned_features: D, a, c and b are learned too; False leaves softmax(T C x̂) with no log-scale.
    rotary: "keep" computes far features after rotary embedding, "remove" undoes it for them.
    decay: "learned" a key/value head, "retnet" fixed a query head, or "none".
    selective: a key's log-scale and decay depend on its token's hidden state too (as in selective state spaces).
    decay_rank: each feature decays at a rate of its own besides, which the hidden state moves through so many numbers
        (as in gated linear attention); 0 for one decay a head.
    shift: far queries and keys have a learned share of the token before (a convolution of width 2, as linear attentions
        that are trained from scratch have it).
    normalize: False drops the denominator.
    gate: group norm a head and an output gate SiLU(x W_G).
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
                good = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
                if not (good or value == "quasi-random"):
                    raise ValueError(f"kernel.frequency is {value!r}: give a positive number or quasi-random")
            elif type(value) is not type(field.default):
                raise ValueError(f"kernel.{field.name} is {value!r}: give a {type(field.default).__name__}")
        for name, least in (("window", 0), ("sinks", 0), ("memory", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"kernel.{name} is {getattr(self, name)}: give {least} or more")
        if self.window % self.block:
            raise ValueError(
                f"kernel.window is {self.window}, no whole multiple of kernel.block, {self.block}: change one of them"
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
        if self.decay_rank < 0:
            raise ValueError(f"kernel.decay_rank is {self.decay_rank}: give 0 or more")
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

    attention_class, attention_name: the class of the source's attention modules, and the name that their parents have
        for them. Those whose `layer_index` is in `layers` get the kernel.
    rotates: whether attention has rotary embedding, so that it depends on positions.
    rotary_dim: how much of each head, the first part, the model's rotary function takes; 0 for none.
    borrowing: those of `layers` that take keys and values of an earlier layer, and don't update the cache.
    unrotated: those of `layers` that have no rotary embedding, in a model where others do.
    memory: rows of memory of each key/value head of each of `layers`, where they share it unequally.
    causal: whether a token sees those before it alone; False in encoders.
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
    """The kernel and the layers that a converted model's config names. Raises ValueError for another version's."""
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
            # Of a multimodal model the text part alone; the others keep what they choose themselves.
            text = [name for name in ("decoder", "generator", "text_config") if name in self.sub_configs]  # type: ignore[attr-defined]
            kwargs["attn_implementation"] = dict.fromkeys(["", *text], "dijiang") if text else "dijiang"
        super().__post_init__(**kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> type:
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
