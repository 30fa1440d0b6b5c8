"""What a model's attention looks like, found by running it on the meta device: no weights, no code per architecture.

The model is built from its config alone with an attention function that only takes notes. Whatever reaches the
function is what the kernel would get, so what can't be served is refused here, before anything is downloaded.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .errors import DijiangError, Unsupported
from .modeling.configuration_dijiang import Kernel, Layers
from .modeling.modeling_dijiang import (
    UNSUPPORTED_ARGUMENTS,
    DiJiangAttention,
    attach,
    cache_argument,
    layer_index,
    parameter_names,
)

FOLLOWERS = "gpt_neox, llama, opt, qwen2, qwen3, mistral, phi, gpt2, olmo2 and many more do"


@dataclass(frozen=True)
class Architecture:
    """A source that converts.

    model_class: its causal language model; base_class: the same without the head.
    layers: what a kernel would replace; parameters: how many numbers the model has.
    rotary_removable: whether there is no rotary embedding, or one that the kernel can undo in all these layers.
    rotates: whether there is any.
    """

    model_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    config: PreTrainedConfig
    layers: Layers
    parameters: int
    rotary_removable: bool
    rotates: bool

    def new_tensors(self, kernel: Kernel) -> dict[str, torch.Tensor]:
        """Every tensor that a conversion adds, initialised, under the name the checkpoint gives it. What starts at
        random follows the kernel's seed: converting twice gives the same bytes."""
        tensors: dict[str, torch.Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(kernel.seed)
            for name in attach(self._skeleton(), kernel, self.layers):
                child = DiJiangAttention(kernel, self.layers, None)
                child.reset_parameters()
                tensors |= {f"{name}.dijiang.{key}": value for key, value in child.state_dict().items()}
        return tensors

    def _skeleton(self) -> PreTrainedModel:
        return skeleton(self.model_class, self.config)


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device."""
    with torch.device("meta"), init.no_init_weights(), quiet():
        model = model_class(config)
        model.tie_weights()
    return model


def examine(config: dict[str, Any], layers: str = "all") -> Architecture:
    """Finds the attention that the kernel replaces in a model with this config.json.

    Raises Unsupported with the true reason where it can't be, and DijiangError for a bad ``layers``.
    """
    model_class, base_class, parsed = _classes(config)
    if not model_class._can_set_attn_implementation():
        raise Unsupported(f"{parsed.model_type} does not route its attention through AttentionInterface: {FOLLOWERS}")
    parsed._attn_implementation = "eager"
    try:
        model = skeleton(model_class, parsed)
    except Exception as error:
        raise Unsupported(f"{parsed.model_type} can't be built from this config ({_first_line(error)})") from error
    seen = _Notes(model.bfloat16())  # grouped expert kernels take no other type on the meta device
    try:
        seen.run()
    except Exception as error:
        raise Unsupported(f"{parsed.model_type} can't be traced without weights ({_first_line(error)})") from error
    found = seen.layers(layers)
    parsed._attn_implementation = "eager"
    parameters = sum(p.numel() for p in model.parameters())
    removable, rotates = seen.rotary_removable(found), _rotary_source(seen.of(found)[0].module) is not None
    return Architecture(model_class, base_class, parsed, found, parameters, removable, rotates)


def _classes(config: dict[str, Any]) -> tuple[type[PreTrainedModel], type[PreTrainedModel], PreTrainedConfig]:
    kind = str(config.get("model_type"))
    if "dijiang" in config or kind.startswith("dijiang_"):
        raise DijiangError("the model is converted already: go on with dijiang finetune")
    if config.get("is_encoder_decoder"):
        raise Unsupported(f"{kind} is an encoder-decoder: only decoder-only language models are converted")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise Unsupported(f"the weights are quantised ({method}): convert the unquantised model instead")
    if config.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"{kind} comes with its own code: only architectures that transformers has are converted")
    if kind not in transformers.CONFIG_MAPPING:
        raise Unsupported(f"transformers {transformers.__version__} knows no model type {kind!r}: a newer one may")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Unsupported(f"{kind} is not a causal language model: only decoder-only language models are converted")
    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    name = (config.get("architectures") or [default])[0]
    if name != default:
        raise Unsupported(f"{name} is not a causal language model: convert the {default} it was made from")
    try:
        parsed = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:
        raise DijiangError(f"config.json is not valid for {kind} ({_first_line(error)}): get the model again") from None
    bases = MODEL_MAPPING_NAMES[kind]
    base = bases if isinstance(bases, str) else bases[0]
    return getattr(transformers, name), getattr(transformers, base), parsed


@dataclass(frozen=True)
class _Seen:
    module: Any
    name: str
    heads: tuple[int, int, int, int]  # query heads, key/value heads, head_dim, value_dim
    arguments: dict[str, Any]
    rotated: bool

    @property
    def index(self) -> Any:
        """Its layer, an int; None is refused by `_check`."""
        return layer_index(self.name, self.module)


class _Notes:
    """Runs a model once on the meta device and notes every call of its attention function."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.calls = model, list[_Seen]()
        self.names = {module: name for name, module in model.named_modules()}
        self.arguments: dict[nn.Module, dict[str, Any]] = {}  # of the modules that are handed a cache
        self.rotated = False  # since the last call

    def run(self, length: int = 8) -> None:
        hooks = [m.register_forward_pre_hook(self._note_cache, with_kwargs=True) for m in self.model.modules()]
        AttentionInterface.register("dijiang_probe", self._note)
        sources = {source for m in self.model.modules() if (source := _rotary_source(m)) is not None}
        functions = [(source, source.apply_rotary_pos_emb) for source in sources]
        try:
            for source, function in functions:
                source.apply_rotary_pos_emb = self._noting_rotation(function)  # type: ignore[attr-defined]
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            mask = torch.ones(1, length, dtype=torch.long, device="meta")
            with torch.no_grad(), quiet():
                self.model.set_attn_implementation("dijiang_probe")
                cache = DynamicCache(config=self.model.config)
                self.model(
                    input_ids=ids,
                    attention_mask=mask,
                    use_cache=True,
                    **{str(cache_argument(self.model.forward)): cache},
                )
        finally:
            AttentionInterface._global_mapping.pop("dijiang_probe", None)
            for source, function in functions:
                source.apply_rotary_pos_emb = function  # type: ignore[attr-defined]
            for hook in hooks:
                hook.remove()

    def _note_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameter_names(type(module).forward), args, strict=False)), **kwargs}
        if any(isinstance(value, DynamicCache) for value in given.values()):
            self.arguments[module] = given

    def _noting_rotation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            self.rotated = True
            return function(*args, **kwargs)

        return rotate

    def _note(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        heads = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        self.calls.append(_Seen(module, self.names[module], heads, kwargs, self.rotated))
        self.rotated = False
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def layers(self, spec: str) -> Layers:
        kind = self.model.config.model_type
        if not self.calls:
            raise Unsupported(f"{kind} has no attention that goes through AttentionInterface: {FOLLOWERS}")
        for seen in self.calls:
            self._check(seen, kind)
        full = {seen.index: seen for seen in self.calls if not self._is_sliding(seen)}
        if not full:
            raise Unsupported(f"every layer of {kind} has a sliding window: its attention is linear already")
        chosen = select_layers(spec, self.model.config.num_hidden_layers, sorted(full))
        picked = [full[index] for index in chosen]
        classes = {(type(seen.module).__name__, seen.name.rpartition(".")[2]) for seen in picked}
        shapes = {seen.heads for seen in picked}
        if len(classes) > 1 or len(shapes) > 1:
            raise Unsupported(f"the layers of {kind} differ in head shape {sorted(shapes)}: choose with --layers")
        heads, kv_heads, head_dim, value_dim = picked[0].heads
        hidden = self.model.config.get_text_config().hidden_size
        return Layers(*classes.pop(), tuple(chosen), heads, kv_heads, head_dim, value_dim, hidden)

    def of(self, layers: Layers) -> list[_Seen]:
        return [seen for seen in self.calls if seen.index in layers.layers]

    def rotary_removable(self, layers: Layers) -> bool:
        picked = self.of(layers)
        given = self.arguments[picked[0].module]
        rotates = _rotary_source(picked[0].module) is not None
        if not rotates or given.get("position_embeddings") is None:
            return not rotates and "position_embeddings" not in given
        if not all(seen.rotated for seen in picked):  # the kernel would rotate back what never was
            return False
        # Where only a part of each head is rotated it must be the first, as everywhere but in latent attention.
        rope = getattr(self.model.config, "rope_parameters", None) or {}
        dim = given["position_embeddings"][0].shape[-1]
        return dim == layers.head_dim or (dim < layers.head_dim and rope.get("partial_rotary_factor", 1.0) < 1.0)

    def _check(self, seen: _Seen, kind: str) -> None:
        for name in UNSUPPORTED_ARGUMENTS:
            if seen.arguments.get(name) is not None:
                raise Unsupported(f"the attention of {kind} has {name}, which the kernel does not follow yet")
        if not getattr(seen.module, "is_causal", True):
            raise Unsupported(f"{kind} has attention that is not causal: only decoders are converted")
        if seen.index is None or seen.module not in self.arguments:
            raise Unsupported(f"the attention module of {kind} is not handed its cache, which the kernel needs")

    def _is_sliding(self, seen: _Seen) -> bool:
        types = getattr(self.model.config, "layer_types", None)
        if types is not None:
            return types[seen.index] != "full_attention"
        return seen.arguments.get("sliding_window") is not None


def _rotary_source(module: nn.Module) -> Any:
    """The Python module that an attention module's rotary embedding is looked up in, or None if it has none."""
    source = sys.modules[type(module).__module__]
    return source if hasattr(source, "apply_rotary_pos_emb") else None


def check_rotary(kernel: Kernel, architecture: Architecture) -> None:
    """Raises Unsupported where the kernel must undo rotary embedding and can't get at it."""
    if kernel.far and kernel.rotary == "remove" and not architecture.rotary_removable:
        raise Unsupported(
            f"the kernel can't undo the rotary embedding of all these layers of {architecture.config.model_type}: "
            "--set rotary=keep leaves it in the far features, --layers chooses others"
        )


def select_layers(spec: str, count: int, available: list[int]) -> list[int]:
    """Layer indices from ``all``, ``0,3,8-23``, ``every:2`` or ``not-last:2``. Raises DijiangError if out of range."""
    bad = DijiangError(f"--layers {spec!r} is not valid: give all, 0,3,8-23, every:N or not-last:N")
    head, _, number = spec.partition(":")
    if head in ("every", "not-last"):
        if not number.isdecimal() or int(number) < 1:
            raise bad
        n = int(number)
        wanted = list(range(0, count, n)) if head == "every" else list(range(count - n))
    elif spec == "all":
        return available
    else:
        wanted = []
        for part in spec.split(","):
            first, dash, last = part.partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise bad
            start, end = int(first), int(last or first)
            if max(start, end) >= count:
                beyond = max(start, count)
                raise DijiangError(f"--layers {spec!r}: there is no layer {beyond}, the model has 0 to {count - 1}")
            wanted += range(start, end + 1)
        missing = [index for index in wanted if index not in available]
        if missing:
            raise DijiangError(f"--layers {spec!r}: layer {missing[0]} has no full attention to convert")
    chosen = sorted(set(wanted) & set(available))
    if not chosen:
        raise DijiangError(f"--layers {spec!r} chooses no layer of {count}: give all, 0,3,8-23, every:N or not-last:N")
    return chosen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings: a model on the meta device gives many that mean nothing."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().split("\n", 1)[0][:160]
