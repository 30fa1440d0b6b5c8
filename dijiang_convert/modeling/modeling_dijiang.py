"""Models with DiJiang attention: any model of transformers whose attention goes through `AttentionInterface`.

The source's own model class does all it did, but for the attention function, which makes an output of q, k and v. Each
converted attention module gets one child, ``dijiang``, with the kernel's parameters. `DiJiang<Name>` exists for every
model class `<Name>` of transformers: the class is built when it is asked for. Nothing here is specific to an
architecture, and nothing trains.

Shape legend: B batch, N new tokens.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMode

from .attention import Call, DiJiangAttention
from .cache import DiJiangCacheLayer, cache_layer
from .configuration_dijiang import Kernel, Layers, read_section
from .interface import is_all
from .packing import CACHE_NAMES, find_documents, new_tokens, packed_arguments

# Tokens of a prompt that the model takes in one forward when no gradient is needed, which bounds memory.
CHUNK = 2048
# Arguments that `_in_chunks` divides or passes on.
CHUNKED_ARGUMENTS = {
    "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict",
}  # fmt: skip

# ------------------------------------------------------------------------------------------------ model classes


def attach(model: nn.Module, kernel: Kernel, layers: Layers) -> list[str]:
    """Gives each attention module that ``layers`` names its child and its hook. Returns the names of these modules.

    Raises ValueError where the model does not have one for each of the layers.
    """
    converted = []
    for name, module in list(model.named_modules()):
        is_attention = (type(module).__name__, attention_name(name)) == (layers.attention_class, layers.attention_name)
        index = layer_index(name, module)
        if hasattr(module, "dijiang"):  # the model's body is a converted model itself
            converted.append(name)
        elif is_attention and index in layers.layers:
            apply_rotary = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
            rotary = None if index in layers.unrotated else apply_rotary
            module.dijiang = DiJiangAttention(kernel, layers, rotary, layers.memory_of(index))
            module.dijiang.arguments = parameter_names(type(module).forward)
            module.dijiang.borrows = index in layers.borrowing
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)
            converted.append(name)
    if len(converted) != len(layers.layers):
        raise ValueError(
            f"the config names {len(layers.layers)} converted layers of {layers.attention_class}, "
            f"the model has {len(converted)}: the checkpoint was made for another version of its source's code"
        )
    return converted


def attention_name(name: str) -> str:
    """The last part of an attention module's name that is no number, as ``self_attn``."""
    return next((part for part in reversed(name.split(".")) if not part.isdecimal()), "")


def layer_index(name: str, module: nn.Module) -> Any:
    """The number of an attention module's layer: its layer_idx, or else the last number in its name; None without."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    said = getattr(module, "layer_idx", None)
    return said if said is not None or not numbers else numbers[-1]


def _hand_over(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of converted attention modules: adds to the keyword arguments a `Call` with what attention
    functions don't get: the cache, hidden states, cos and sin. (Arguments survive gradient checkpointing and threads;
    attributes of the module would not.) Raises ValueError for a cache that the layer can't use."""
    given = {**dict(zip(module.dijiang.arguments, args, strict=False)), **kwargs}
    cache = cache_of(given)
    layer = None
    if cache is not None:
        if not module.dijiang.layers.causal:
            raise ValueError("this model sees both sides of a token: it has no cache, leave it out")
        if module.config._attn_implementation.startswith("dijiang"):
            layer = cache_layer(cache, module.layer_idx, module.dijiang.sizes)
        elif any(isinstance(each, DiJiangCacheLayer) for each in cache.layers):
            raise ValueError("a DiJiang cache can't serve softmax attention: start from an empty cache")
    if not module.config._attn_implementation.startswith("dijiang"):
        return args, kwargs
    return args, {**kwargs, "dijiang": Call(layer, hidden_states_of(given), given.get("position_embeddings"))}


def _separate(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of the source's body, which some libraries call without its head: packed rows get the mask that
    keeps their documents apart. A call that has a mask has padding, or comes from `_checked`."""
    names = parameter_names(type(body).forward)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    documents = _documents(body, given) if given.get("attention_mask") is None else None
    return (args, kwargs) if documents is None else ((), packed_arguments(given, documents, body.config, names))


def _documents(model: Any, given: dict[str, Any]) -> Tensor | None:
    """The document of each token in packed rows, [B, N], or None; see `find_documents`. Attention functions other than
    these find documents themselves."""
    attention = model.config._attn_implementation
    if attention.startswith("dijiang") or attention in ("sdpa", "eager"):
        return find_documents(given, _is_causal(model.config))
    return None


def cache_of(given: dict[str, Any]) -> Cache | None:
    """The cache among a module's arguments, or None; of an `EncoderDecoderCache` the part for self-attention."""
    cache = next((value for value in given.values() if isinstance(value, Cache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def hidden_states_of(given: dict[str, Any]) -> Tensor | None:
    """The input of an attention module, [B, N, hidden]: its ``hidden_states``, else its first tensor of three
    dimensions; None if it has neither."""
    tensors = (value for value in given.values() if isinstance(value, Tensor) and value.dim() == 3)
    return given["hidden_states"] if isinstance(given.get("hidden_states"), Tensor) else next(tensors, None)


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> list[str]:
    """The names of a method's parameters, without self."""
    return list(inspect.signature(forward).parameters)[1:]


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of the cache among the parameters of a model's forward, which versions of transformers change; None if
    the forward takes no cache."""
    return next((name for name in CACHE_NAMES if name in inspect.signature(forward).parameters), None)


class DiJiangMixin:
    """What a converted model adds to its source's class: kernels, their initialisation, and checks of checkpoints."""

    _keep_in_fp32_modules_strict: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _register_body(type(self), config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        kernel, layers = read_section(config)
        attach(self, kernel, layers)  # type: ignore[arg-type]
        body = self.base_model  # type: ignore[attr-defined]
        if not isinstance(body, DiJiangMixin):
            body.register_forward_pre_hook(_separate, with_kwargs=True)
        self._initialize_kernels()
        # Parameters of kernels stay float32 whatever the model's dtype.
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or []) | {"dijiang"}

    def _initialize_kernels(self) -> None:
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, DiJiangAttention):
                module.reset_parameters()
                for each in module.modules():  # the source's own initialisation must skip kernels
                    each._is_hf_initialized = True  # type: ignore[assignment]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        self._initialize_kernels()
        super().initialize_weights()  # type: ignore[misc]

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Raises ValueError for a checkpoint that lacks tensors, which transformers would fill with random numbers, or
        that has unknown tensors of kernels. (Other unknown tensors are those that the source's class ignores.)"""
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        missing, unexpected = set(loading_info.missing_keys), set(loading_info.unexpected_keys)
        missing -= set(self.all_tied_weights_keys)  # type: ignore[attr-defined]
        unexpected = {key for key in unexpected if ".dijiang." in key}
        if type(self).__name__ not in (self.config.architectures or []):  # type: ignore[attr-defined]
            missing = {key for key in missing if ".dijiang." in key}  # another head brings tensors of its own
        for kind, keys in (("lacks", missing), ("has unknown", unexpected)):
            if keys:
                raise ValueError(f"the checkpoint {kind} {len(keys)} tensors, {min(keys)} first: it is damaged")

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Puts the DiJiang layers into the cache that generate() makes or is given. Raises ValueError for assisted
        decoding from a filled cache."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        is_ours = self.config._attn_implementation == "dijiang"  # type: ignore[attr-defined]
        cache = next((model_kwargs[name] for name in CACHE_NAMES if name in model_kwargs), None)
        if isinstance(cache, Cache) and is_ours:
            for name, module in self.named_modules():  # type: ignore[attr-defined]
                if isinstance(getattr(module, "dijiang", None), DiJiangAttention):
                    cache_layer(cache, layer_index(name, module), module.dijiang.sizes)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            elif GenerationMode.ASSISTED_GENERATION in args and cache.get_seq_length() > 0:
                # transformers would feed the whole prompt to the filled cache again
                raise ValueError("assisted decoding starts from an empty cache: leave the filled one out")


def _register_body(model_class: Any, config: Any) -> None:
    """Registers the converted body with AutoModel, which heads of many model types ask for their body. The body goes
    with the class of this very config: dynamic loading makes config classes of its own."""
    source_config = model_class.source_config
    body: Any = MODEL_MAPPING.get(source_config, None)
    if not isinstance(body, type) or issubclass(model_class, body):
        return
    suffix = "" if body.config_class is source_config else f"Of{source_config.__name__}"  # type: ignore[attr-defined]
    converted = getattr(sys.modules[__name__], f"DiJiang{body.__name__}{suffix}")
    AutoModel.register(type(config), converted, exist_ok=True)
    if type(config).__module__.startswith("transformers_modules."):
        converted.register_for_auto_class("AutoModel")  # a body that AutoModel loads saves its code, too


def _checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that checks arguments, and prepares packed rows and long prompts, before it calls ``forward``, the
    source's. The signature stays the source's, since Trainer and generate() read it."""
    names = list(inspect.signature(forward).parameters)
    cache_name = cache_argument(forward)

    @functools.wraps(forward)
    def checked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cache_name is not None:  # callers may use either name of the cache
            kwargs = {cache_name if name in CACHE_NAMES else name: value for name, value in kwargs.items()}
        given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
        ours = self.config._attn_implementation.startswith("dijiang")
        if ours:
            _refuse(self, given)
        documents = _documents(self, given)
        if documents is not None:
            return forward(self, **packed_arguments(given, documents, self.config, names))
        if ours:
            kwargs.update(_mask_of_unseen(given, self.config))
            kwargs.update(_position_ids(given, self.config, "position_ids" in names, cache_name))
            given.update(kwargs)
            if cache_name is not None and _is_long_prompt(self, given):
                return _in_chunks(self, forward, given, cache_name)
        return forward(self, *args, **kwargs)

    return checked_forward


def _refuse(model: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for arguments that DiJiang attention can't follow."""
    if given.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError("output_attentions: linear attention has no attention matrix to return")
    mask, tokens = given.get("attention_mask"), new_tokens(given)
    # generate() with a static cache gives a dictionary, which has a mask for each kind of layer.
    if isinstance(mask, Tensor) and mask.dim() != 2 and not (tokens is not None and _is_ours(mask, tokens.shape[1])):
        raise ValueError(f"attention_mask has {mask.dim()} dimensions: DiJiang attention takes [batch, length]")


def _is_causal(config: Any) -> bool:
    return bool(config.dijiang.get("causal", True))


def _is_ours(mask: Tensor, count: int) -> bool:
    """Whether a mask for ``count`` new tokens was made by `static_mask`, which generate() calls before the forward."""
    return mask.dim() == 4 and (mask.shape[2] == count + 1 or mask.shape[2:] == (1, count))


def _is_long_prompt(model: Any, given: dict[str, Any]) -> bool:
    """Whether `_in_chunks` can answer a call: long input_ids, logits or hidden states asked for, no gradient."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_causal(model.config):
        return False
    if not model.can_generate() and model.base_model is not model:  # a classifier judges the whole text at once
        return False
    asked = {name for name, value in given.items() if value is not None and value is not False}
    tokens, keep, mask = given.get("input_ids"), given.get("logits_to_keep", 0), given.get("attention_mask")
    if tokens is None or tokens.shape[1] <= CHUNK or asked - CHUNKED_ARGUMENTS:
        return False
    if mask is not None and not (isinstance(mask, Tensor) and (mask.dim() == 2 or mask.shape[1:3] == (1, 1))):
        return False  # a static cache with softmax layers has a mask that can't be divided
    if model.config.get_text_config(decoder=True) is not model.config:  # positions of images need the whole prompt
        return False
    if model._is_stateful:  # some recurrent layers can't go on with several tokens at once
        return False
    if mask is not None and given.get("position_ids") is None and not is_all(mask):
        return False  # some models count learned positions by the tokens of a call
    wants_dict = model.config.return_dict and given.get("return_dict") is not False
    return wants_dict and isinstance(keep, int) and keep <= (tokens.shape[1] - 1) % CHUNK + 1


def _in_chunks(model: Any, forward: Callable[..., Any], given: dict[str, Any], cache_name: str) -> Any:
    """The result of ``forward`` for a long prompt, computed through the cache in chunks of CHUNK tokens. The numbers
    are the same, and the memory of activations does not grow with the prompt. given: the arguments of ``forward``."""
    tokens, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    cache = given.get(cache_name)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True)) if cache is None else cache
    keep, outputs = given.get("logits_to_keep", 0), []
    for start in range(0, tokens.shape[1], CHUNK):
        end = min(start + CHUNK, tokens.shape[1])
        piece = {**given, "input_ids": tokens[:, start:end], cache_name: cache, "use_cache": True}
        if mask is not None:
            of_all = mask[:, : mask.shape[1] - tokens.shape[1] + end] if mask.dim() == 2 else mask[..., start:end]
            piece["attention_mask"] = of_all
        if positions is not None:
            piece["position_ids"] = positions[..., start:end]
        if keep and end < tokens.shape[1]:
            piece["logits_to_keep"] = 1
        outputs.append(forward(model, **piece))
    result = outputs[-1]
    for name in ("logits", "last_hidden_state"):
        if name in result and not keep:
            result[name] = torch.cat([output[name] for output in outputs], 1)
    if given.get("use_cache") is False and given.get(cache_name) is None:
        result[cache_name] = None
    return result


def _mask_of_unseen(given: dict[str, Any], config: Any) -> dict[str, Tensor]:
    """An attention_mask of ones for a compiled call without mask, positions and cache. Without a mask transformers
    would look for packed rows, but a compiled graph can't look at values."""
    tokens = new_tokens(given)
    names = ("attention_mask", "position_ids", *CACHE_NAMES)
    if not torch.compiler.is_compiling() or not _is_causal(config) or tokens is None:
        return {}
    if given.get("use_cache") is not False or any(given.get(name) is not None for name in names):
        return {}
    return {"attention_mask": torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)}


def _position_ids(given: dict[str, Any], config: Any, accepted: bool, cache_name: str | None) -> dict[str, Tensor]:
    """Position ids by the padding mask, where a call has none: features of rotated keys depend on positions. accepted:
    whether the forward takes position_ids."""
    mask = given.get("attention_mask")
    if given.get("position_ids") is not None or not accepted or not isinstance(mask, Tensor) or mask.dim() != 2:
        return {}
    if config.get_text_config(decoder=True) is not config or not config.dijiang["rotates"]:
        return {}  # multimodal models count images, too, and learned positions stay the source's
    tokens, cache = new_tokens(given), given.get(cache_name or "")
    if tokens is None or is_all(mask):
        return {}
    positions, seen = (mask.long().cumsum(-1) - 1).clamp(min=0), mask.shape[1] - tokens.shape[1]
    if isinstance(cache, Cache) and seen > 0:  # a static cache's mask may have places for tokens to come
        seen = cache.get_seq_length()
    return {"position_ids": positions[:, torch.arange(tokens.shape[1], device=mask.device) + seen]}


def __getattr__(name: str) -> type:
    """Builds `DiJiang<Name>` when it is first asked for, or `DiJiang<Name>Of<Config>`: a model class that several model
    types share, with the config class of one of them, as DiJiangLlamaForCausalLMOfExaoneConfig."""
    model, _, config = name.removeprefix("DiJiang").partition("Of")
    base = getattr(transformers, model, None) if name.startswith("DiJiang") else None
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    source_config: Any = getattr(transformers, config) if config else base.config_class
    config_class = getattr(sys.modules[read_section.__module__], f"DiJiang{source_config.__name__}")
    namespace = {
        "__module__": __name__,
        "config_class": config_class,
        "source_config": source_config,
        "forward": _checked(base.forward),
    }
    globals()[name] = type(name, (DiJiangMixin, base), namespace)
    # transformers renames checkpoint keys by class name or model type: our names get the rules of the source's.
    for own, source in ((name, base.__name__), (config_class.model_type, source_config.model_type)):
        mapping = get_checkpoint_conversion_mapping(source)
        if mapping is not None:
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
    return globals()[name]
