"""What a model's attention looks like, found by running the model on the meta device: no weights, no code per
architecture.

The model is built from its config alone, with an attention function that only takes notes. This function gets what the
kernel would get, so what the kernel can't follow is refused here, before weights are downloaded. No attention is
computed.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import hub_kernels
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from ..errors import Unsupported
from ..modeling.configuration_dijiang import Layers
from ..modeling.modeling_dijiang import (
    attention_name,
    cache_argument,
    cache_of,
    hidden_states_of,
    layer_index,
    parameter_names,
)
from .layers import select_layers

FOLLOWERS = "gpt_neox, llama, opt, qwen2, qwen3, mistral, phi, gpt2, bert, vit and many more do"
NO_ATTENTION = f"has no attention that goes through AttentionInterface: {FOLLOWERS}"
# Arguments of attention functions that the kernel follows, or that don't change the result.
KNOWN_ARGUMENTS = {
    "mask", "scaling", "softcap", "s_aux", "is_causal", "sliding_window", "dropout", "position_ids", "use_cache",
    "cache_position", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "labels",
}  # fmt: skip
# Arguments by which attention modules get keys of other tokens than their own.
OTHER_STATES = ("encoder_hidden_states", "key_value_states", "cross_attention_states")


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, without weights, in evaluation mode."""
    with torch.device("meta"), init.no_init_weights(), quiet():
        model = model_class(config)
        model.tie_weights()
    return model.eval()


@dataclass(frozen=True)
class _Seen:
    """One call of the attention function.

    module, name: the attention module, and its name in the model. query, key: the call's tensors, since layers that
    share keys are known by having the same tensor. arguments: the other arguments. rotary_dim: how many numbers of each
    head were given to the rotary function, 0 if none. marked: whether the module handed on a keyword argument.
    """

    module: Any
    name: str
    query: torch.Tensor
    key: torch.Tensor
    heads: tuple[int, int, int, int]  # query heads, key/value heads, head_dim, value_dim
    arguments: dict[str, Any]
    rotary_dim: int
    marked: bool

    @property
    def index(self) -> Any:
        """The number of the module's layer; None, which `layers` refuses, if it has none."""
        return layer_index(self.name, self.module)

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and the tokens before it."""
        said = self.arguments.get("is_causal")
        return getattr(self.module, "is_causal", True) if said is None else bool(said)


class Notes:
    """Runs a model once on the meta device and notes every call of its attention function."""

    LENGTH = 256  # tokens of the text, or pixels of an image's side: keys that stand for several tokens show

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.calls = model, list[_Seen]()
        self.kind = model.config.model_type
        self.of_images = model.main_input_name == "pixel_values"
        self.config: Any = model.config.get_text_config(decoder=True)
        if self.of_images and getattr(model.config, "vision_config", None) is not None:
            raise Unsupported(f"{self.kind} is of images and texts: save its vision model alone, and convert that")
        self.length = min(self.LENGTH, getattr(self.config, "max_position_embeddings", None) or self.LENGTH)
        self.names = {module: name for name, module in model.named_modules()}
        self.arguments: dict[nn.Module, dict[str, Any]] = {}  # of each module's last call
        self.classes: set[type] = set()  # of attention modules that take any keyword argument
        self.rotary_dim = 0  # what the rotary function took since the last call
        self.returns_cache = self.asked_for_causal = False

    def run(self) -> None:
        """Runs the model. Raises Unsupported, with the likely reason, where it can't run on the meta device."""
        try:
            self._run(self._padding_mask)
            if self._unmarked():  # a class's first module is unmarked: the class is known after its call
                self._run(self._padding_mask)
        except Exception as error:
            if not self.calls and self.model._is_stateful:
                raise Unsupported(
                    f"{self.kind} is recurrent or has a cache of its own: the kernel has no place"
                ) from error
            reason = f"{self.kind} can't be traced without weights ({first_line(error)})"
            if "meta tensor" in str(error):
                reason = f"{self.kind} goes by values as it runs, and there are none before its weights are downloaded"
            if "cache of its own" in str(error):
                reason = f"{self.kind} takes no cache but one of its own class, where the kernel has no place"
            with contextlib.suppress(Exception):
                self._run(sdpa_mask)
                reason = f"{self.kind} reads or changes its attention mask itself, which linear attention has none of"
            raise Unsupported(reason) from error

    def _unmarked(self) -> set[type]:
        """The classes of attention modules of which none handed on a keyword argument."""
        return {type(s.module) for s in self.calls} - {type(s.module) for s in self.calls if s.marked}

    def _run(self, mask_function: Callable[..., Any]) -> None:
        self.calls.clear()
        hooks = [m.register_forward_pre_hook(self._note_arguments, with_kwargs=True) for m in self.model.modules()]
        AttentionInterface.register("dijiang_probe", self._note)
        AttentionMaskInterface.register("dijiang_probe", mask_function)
        sources = {source for m in self.model.modules() if (source := _rotary_source(m)) is not None}
        functions = [(source, source.apply_rotary_pos_emb) for source in sources]
        try:
            for source, function in functions:
                source.apply_rotary_pos_emb = self._noting_rotation(function)  # type: ignore[attr-defined]
            with torch.no_grad(), quiet(), _WithoutValues(), _torch_alone():
                self.model.set_attn_implementation("dijiang_probe")
                out = self.model(**self._inputs())
                self.returns_cache = any(isinstance(value, Cache) for value in out.values())
        finally:
            AttentionInterface._global_mapping.pop("dijiang_probe", None)
            AttentionMaskInterface._global_mapping.pop("dijiang_probe", None)
            for source, function in functions:
                source.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
            for hook in hooks:
                hook.remove()

    def _inputs(self) -> dict[str, Any]:
        """The model's input: a text, with a cache if the model takes one; or an image."""
        if self.of_images:
            size: Any = getattr(self.config, "image_size", self.LENGTH)
            shape = [1, getattr(self.config, "num_channels", 3), *([size, size] if isinstance(size, int) else size)]
            return {"pixel_values": torch.ones(shape, dtype=self.model.dtype, device="meta")}
        ids = torch.ones(1, self.length, dtype=torch.long, device="meta")
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = cache_argument(self.model.forward)
        return inputs if cache is None else {**inputs, cache: DynamicCache(config=self.config), "use_cache": True}

    def _note_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook of every module: notes the arguments. Modules of known attention classes get one more, the
        keyword argument that `_hand_over` gives to converted modules."""
        self.arguments[module] = {**dict(zip(parameter_names(type(module).forward), args, strict=False)), **kwargs}
        return (args, {**kwargs, "dijiang": True}) if type(module) in self.classes else None

    def _noting_rotation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A rotary function that also notes the width of its input."""

        def rotate(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else next(iter(kwargs.values()))
            self.rotary_dim = first.shape[-1]
            return function(*args, **kwargs)

        return rotate

    def _note(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention function: notes the call, and returns an output without values."""
        heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        name, marked = self.names[module], kwargs.pop("dijiang", False)
        if _takes_more(module):
            self.classes.add(type(module))
        arguments = {**kwargs, "mask": attention_mask}
        self.calls.append(_Seen(module, name, query, key, heads, arguments, self.rotary_dim, marked))
        self.rotary_dim = 0
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def _padding_mask(
        self,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any] = causal_mask_function,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A mask in the form of `dijiang_mask`, but never None: so a model that changes its mask is noticed."""
        self.asked_for_causal |= mask_function is causal_mask_function
        plain = mask_function in (causal_mask_function, bidirectional_mask_function)
        plain = plain or (local_size is not None and kwargs.get("allow_is_causal_skip", True))
        return torch.ones((1, kv_length) if plain else (1, 1, q_length, kv_length), dtype=torch.bool, device="meta")

    def layers(self, spec: str) -> Layers:
        """The layers that ``spec`` names, and the shape of their attention. Raises Unsupported where the kernel can't
        replace one of them, and as `select_layers`."""
        ropes = getattr(self.config, "rope_parameters", None) or {}
        if "dynamic" in [ropes.get("rope_type"), *(r.get("rope_type") for r in ropes.values() if isinstance(r, dict))]:
            raise Unsupported(
                f"the rotary tables of this {self.kind} change with length (rope_type dynamic): keys in a cache "
                "no longer fit: give its config.json another rope_type, as yarn"
            )
        if not self.calls:
            reason = "is recurrent: it has no attention to convert" if self.model._is_stateful else NO_ATTENTION
            raise Unsupported(f"{self.kind} {reason}")
        if not self.returns_cache and any(seen.causal for seen in self.calls):
            raise Unsupported(f"{self.kind} is not said to see both sides, and has no cache outside the model")
        for seen in self.calls:
            if seen.index is None or sum(other.module is seen.module for other in self.calls) > 1:
                raise Unsupported(f"{self.kind} runs the same attention module several times a token")
        calls = {seen.index: seen for seen in self.calls}
        if len(calls) < len(self.calls):
            raise Unsupported(
                f"{self.kind} has several attention modules of one layer number: they can't be told apart"
            )
        count = max(getattr(self.config, "num_hidden_layers", 0), max(calls) + 1)  # some layers have two attentions
        local = sorted(index for index, seen in calls.items() if self._is_local(seen))
        chosen = select_layers(spec, count, sorted(calls.keys() - {*local}), local, self.kind)
        picked = [calls[index] for index in chosen]
        for seen in picked:
            self._check(seen)
        self._check_sharing(calls, chosen)
        classes = {(type(seen.module).__name__, attention_name(seen.name)) for seen in picked}
        shapes = {seen.heads for seen in picked}
        if len(classes) > 1 or len(shapes) > 1:
            raise Unsupported(f"the layers of {self.kind} differ in head shape {sorted(shapes)}: choose with --layers")
        first = picked[0] if picked else self.calls[0]
        classes.add((type(first.module).__name__, attention_name(first.name)))
        rotary_dims = {seen.rotary_dim for seen in picked} - {0}
        if len(rotary_dims) > 1:
            raise Unsupported(f"the layers of {self.kind} rotate {sorted(rotary_dims)} of a head: choose with --layers")
        rotary_dim = max(rotary_dims, default=0)
        seen_to_rotate = any(seen.rotary_dim for seen in self.calls)
        unrotated = tuple(seen.index for seen in picked if seen_to_rotate and not seen.rotary_dim)
        borrowing = tuple(i for i in chosen if any(calls[j].key is calls[i].key for j in calls if j < i))
        hidden = hidden_states_of(self.arguments.get(first.module, {}))
        width = self.config.hidden_size if hidden is None else hidden.shape[-1]
        rotates = any(
            _rotary_source(seen.module) is not None or "position_embeddings" in self.arguments.get(seen.module, {})
            for seen in picked
        )
        return Layers(
            *classes.pop(), tuple(chosen), *first.heads, width, rotates, rotary_dim, unrotated, borrowing,
            causal=first.causal,
        )  # fmt: skip

    def of(self, layers: Layers) -> list[_Seen]:
        """The calls of ``layers``."""
        return [seen for seen in self.calls if seen.index in layers.layers]

    def rotary_removable(self, layers: Layers) -> bool:
        """Whether ``layers`` have no rotary embedding, or one that `without_rotation` can undo."""
        picked = [seen for seen in self.of(layers) if seen.index not in layers.unrotated]
        if not picked:
            return True
        tables = self.arguments[picked[0].module].get("position_embeddings")
        if not layers.rotates:
            return True
        if not (isinstance(tables, tuple) and len(tables) == 2 and layers.rotary_dim):
            return False
        # A part of a head that is rotated must be the first, as it is everywhere but in latent attention.
        rope = getattr(self.config, "rope_parameters", None) or {}
        return layers.rotary_dim == layers.head_dim or rope.get("partial_rotary_factor", 1.0) < 1.0

    def _check(self, seen: _Seen) -> None:
        """Raises Unsupported for a layer whose attention has anything that the kernel does not follow."""
        given = {name for name, value in seen.arguments.items() if value is not None and value is not False}
        unknown = sorted(given - KNOWN_ARGUMENTS)
        if unknown:
            raise Unsupported(f"the attention of {self.kind} has {unknown[0]}, which the kernel does not follow")
        queries = seen.query.shape[2] if self.of_images else self.length
        if seen.key.shape[2] != queries or seen.key.shape[0] != 1:
            raise Unsupported(f"the attention of {self.kind} sees other keys than one a token")
        if type(seen.module) in self._unmarked():
            raise Unsupported(f"the attention module of {self.kind} hands nothing on to its attention function")
        mask = seen.arguments["mask"]
        if mask is not None and mask.shape != (1, queries):
            raise Unsupported(f"the attention of {self.kind} has a mask of another shape than causal, or a bias in it")
        if seen.causal != self.calls[0].causal:
            raise Unsupported(f"{self.kind} has layers that are causal and layers that are not")
        arguments = self.arguments[seen.module]
        if not seen.causal:
            if self.model.can_generate() or self.asked_for_causal:
                raise Unsupported(f"{self.kind} is a decoder, and its attention is not said to be causal")
            if any(arguments.get(name) is not None for name in OTHER_STATES):
                raise Unsupported(f"{self.kind} has cross-attention, which has other keys than its own tokens")
            return
        kinds = [type(layer).__name__ for layer in DynamicCache(config=self.config).layers]
        if seen.index < len(kinds) and kinds[seen.index].startswith("LinearAttentionAnd"):
            raise Unsupported(f"layers of {self.kind} have attention and a recurrent state at once, in one cache layer")
        if cache_of(arguments) is None:
            raise Unsupported(f"the attention module of {self.kind} is not handed its cache, which the kernel needs")

    def _check_sharing(self, calls: dict[int, _Seen], chosen: list[int]) -> None:
        """Raises Unsupported where only some of the layers that share keys are chosen: the cache of a converted layer
        returns new keys alone, which are not enough for a softmax layer."""
        for index, seen in calls.items():
            sharing = [i for i, other in calls.items() if other.key is seen.key]
            if index in chosen and not set(sharing) <= set(chosen):
                names = ", ".join(map(str, sharing))
                raise Unsupported(f"layers {names} of {self.kind} share keys and values: choose all of them or none")

    def _is_local(self, seen: _Seen) -> bool:
        """Whether tokens of a layer see only a part of the tokens before."""
        types = getattr(self.config, "layer_types", None)
        if types is not None and types[seen.index] in ("full_attention", "sliding_attention", "chunked_attention"):
            return types[seen.index] != "full_attention"
        return seen.arguments.get("sliding_window") is not None


def _takes_more(module: nn.Module) -> bool:
    """Whether a module's forward takes any keyword argument."""
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())


@contextlib.contextmanager
def _torch_alone() -> Iterator[None]:
    """Runs recurrent layers in plain torch, as transformers does when it exports a model, and not by the kernels of a
    package, which need a GPU."""
    is_exporting = getattr(hub_kernels, "is_torchdynamo_exporting", None)
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        if is_exporting is None:  # a version without this function
            del hub_kernels.is_torchdynamo_exporting
        else:
            hub_kernels.is_torchdynamo_exporting = is_exporting


class _WithoutValues(TorchDispatchMode):
    """Lets models look at values on the meta device, where there are none: every value is 1, or True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1
        if name == "nonzero":
            return args[0].new_zeros((1, args[0].dim()), dtype=torch.long)
        if name in ("index", "index_put", "index_put_"):  # a mask stands for its first element
            chosen = [part for index in args[1] for part in _first_of(index)]
            args = (args[0], chosen, *args[2:])
        return func(*args, **(kwargs or {}))


def _first_of(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The index itself or, for a mask, the indices of the mask's first element, one a dimension."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_zeros(1, dtype=torch.long) for _ in range(index.dim())]


def _rotary_source(module: nn.Module) -> Any:
    """The Python module in which an attention module finds its rotary function, or None if there is none."""
    source = sys.modules[type(module).__module__]
    return source if hasattr(source, "apply_rotary_pos_emb") else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' warnings, of which a model on the meta device gives many that mean nothing."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters of it."""
    return (str(error) or type(error).__name__).strip().split("\n", 1)[0][:160]
