"""Which architectures convert, why others don't, and that those that do run as the kernel says they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dijiang_convert.architecture.examine import check_kernel, examine
from dijiang_convert.architecture.layers import select_layers
from dijiang_convert.checkpoint.loading import load_converted
from dijiang_convert.convert import convert
from dijiang_convert.errors import DijiangError, Unsupported
from dijiang_convert.modeling.configuration_dijiang import Kernel
from tests.models import window_and_state
from tests.sources_on_disk import TOKENS, VOCABULARY, random_model, write_tokenizer

# The names that nearly all configs give to the same things: 4 heads of 8 that share 2 for keys.
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512, **TOKENS,
}  # fmt: skip
# Where one differs, or has no heads of its own for keys (so that it has 4).
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"num_key_value_heads": None, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"num_key_value_heads": None, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "num_hidden_layers": 6},
    "gemma2": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "bloom": {"n_head": 4, "n_layer": 2},
}


def config_of(kind: str, **changes: Any) -> PreTrainedConfig:
    values = {**SMALL, **CHANGES.get(kind, {}), **changes}
    return transformers.CONFIG_MAPPING[kind](**{key: value for key, value in values.items() if value is not None})


def config_json(kind: str, **changes: Any) -> dict[str, Any]:
    """As config.json holds it."""
    config = config_of(kind).to_dict()
    return {**config, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)], **changes}


def reason(config: dict[str, Any], kind: type[DijiangError] = Unsupported, **options: Any) -> str:
    with pytest.raises(DijiangError) as call:
        examine(config, **options)
    assert type(call.value) is kind
    text = str(call.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("kind", "kv_heads", "layers"),
    [
        ("gpt_neox", 4, (0, 1)),
        ("llama", 2, (0, 1)),
        ("mistral", 2, None),  # every layer has a sliding window by default
        ("opt", 4, (0, 1)),
        ("qwen2", 2, (0, 1)),
        ("qwen3", 2, (0, 1)),
        ("phi", 2, (0, 1)),
        ("phi3", 2, (0, 1)),
        ("gpt2", 4, (0, 1)),
        ("olmo2", 2, (0, 1)),
        ("smollm3", 2, (0, 1)),
        ("cohere", 2, (0, 1)),
        ("stablelm", 2, (0, 1)),
        ("starcoder2", 2, (0, 1)),
        ("granite", 2, (0, 1)),
        ("mixtral", 2, (0, 1)),
        ("gemma3_text", 2, (5,)),  # the others have a sliding window
    ],
)
def test_what_attention_looks_like(kind: str, kv_heads: int, layers: tuple[int, ...] | None) -> None:
    config = config_json(kind)
    if layers is None:
        assert "sliding window: it is linear already" in reason(config)
        config, layers = {**config, "sliding_window": None}, (0, 1)
    found = examine(config)
    shape = found.layers
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.value_dim) == (4, kv_heads, 8, 8)
    assert shape.layers == layers and shape.hidden_size == 32
    assert found.rotary_removable
    check_kernel(Kernel(), found)
    assert found.model_class.__name__ == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model = random_model(config_of(kind))
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert shape.attention_class in {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("falcon", "falcon does not route its attention through AttentionInterface"),
        ("bloom", "bloom does not route its attention through AttentionInterface"),
        ("gpt_neo", "gpt_neo does not route its attention through AttentionInterface"),
        ("doge", "doge reads or changes its attention mask itself"),
        ("mamba", "mamba is recurrent: it has no attention to convert"),
    ],
)
def test_architectures_that_do_not_convert(kind: str, expected: str) -> None:
    assert expected in reason(config_json(kind))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
        (transformers.T5Config().to_dict(), "t5 is an encoder-decoder"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2Model"]}, "takes input_values: only models of text and"),
        ({"model_type": "llama", "architectures": ["BertModel"]}, "BertModel is no model of type llama"),
        ({"model_type": "llama", "architectures": ["LlamaForEverything"]}, "no model class 'LlamaForEverything'"),
        ({"model_type": "hyperformer"}, "knows no model type 'hyperformer'"),
        ({"model_type": "hyperformer", "auto_map": {"AutoConfig": "a.B"}}, "hyperformer comes with its own code"),
        ({}, "knows no model type 'None'"),
    ],
)
def test_what_is_neither_decoder_nor_encoder(config: dict[str, Any], expected: str) -> None:
    assert expected in reason(config)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", None])
def test_quantised_weights(method: str | None) -> None:
    section = {"bits": 4} if method is None else {"bits": 4, "quant_method": method}
    message = reason(config_json("llama", quantization_config=section))
    assert f"quantised ({method or 'unknown'})" in message


@pytest.mark.parametrize("changes", [{"dijiang": {}}, {"model_type": "dijiang_llama"}])
def test_a_converted_model(changes: dict[str, Any]) -> None:
    assert "converted already" in reason(config_json("llama", **changes), DijiangError)


def test_a_config_that_is_not_valid() -> None:
    assert "not valid for llama" in reason(config_json("llama", num_attention_heads=0), DijiangError)


def test_rotary_embedding_that_the_kernel_can_not_undo() -> None:
    """Latent attention rotates the last part of each head."""
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, vocab_size=VOCABULARY, **TOKENS,
    )  # fmt: skip
    found = examine({**config.to_dict(), "architectures": ["DeepseekV3ForCausalLM"]})
    assert (found.layers.head_dim, found.layers.value_dim) == (12, 8)
    assert not found.rotary_removable
    with pytest.raises(Unsupported, match="--set rotary=keep"):
        check_kernel(Kernel(), found)
    check_kernel(Kernel(rotary="keep"), found)
    check_kernel(Kernel(far=False), found)


def test_layers_that_do_not_rotate() -> None:
    """Every fourth layer of smollm3 has no position embedding, though it is handed one: there is nothing to undo."""
    config = {**config_of("smollm3", num_hidden_layers=4).to_dict(), "architectures": ["SmolLM3ForCausalLM"]}
    for layers, unrotated in (("all", (3,)), ("3", (3,)), ("0-2", ()), ("2,3", (3,))):
        found = examine(config, layers)
        assert found.layers.unrotated == unrotated
        check_kernel(Kernel(), found)


def test_examining_leaves_transformers_as_it_was() -> None:
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb
    examine(config_json("llama"))
    with pytest.raises(Unsupported):
        examine(config_json("doge"))
    assert modeling_llama.apply_rotary_pos_emb is before


FULL, LOCAL = [0, 1, 2, 3, 4, 7], [5]  # of 8 layers; 6 has no attention


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", FULL),
        ("none", []),
        ("sliding-only", [5]),
        ("all,sliding-only", [0, 1, 2, 3, 4, 5, 7]),
        ("0", [0]),
        ("5", [5]),  # by its number, though all leaves it as it is
        ("0,3", [0, 3]),
        ("3,0,3", [0, 3]),
        ("1-3,7", [1, 2, 3, 7]),
        ("every:2", [0, 2, 4]),
        ("every:1", FULL),
        ("every:100", [0]),
        ("not-every:2", [0, 2, 4]),
        ("not-every:4", [0, 1, 2, 4]),
        ("not-every:8", [0, 1, 2, 3, 4]),
        ("not-last:3", [0, 1, 2, 3, 4]),
        ("not-last:1", [0, 1, 2, 3, 4]),
        ("not-last:4,sliding-only", [0, 1, 2, 3, 5]),
    ],
)
def test_layers_are_chosen(spec: str, expected: list[int]) -> None:
    assert select_layers(spec, 8, FULL, LOCAL, "gemma") == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *((spec, "is not valid: give all, none, sliding-only, 0,3,8-23, every:N, not-every:N or not-last:N")
            for spec in (
            "", "1,", "-1", "1-", "1-2-3", "a-b", "every:", "every:0", "every:-1", "every:x", "not-last:0", "sliding",
            "not-last:", "1.5", "²", "every:²", "0 1", "not-every:0", "all:2", "none,",
        )),
        ("8", "there is no layer 8, the model has 0 to 7"),
        ("0-99999999999", "there is no layer 8, the model has 0 to 7"),
        ("12-99", "there is no layer 12, the model has 0 to 7"),
        ("6", "layer 6 has no attention to convert"),
        ("0,5-2", "is not valid: give all, none"),
        ("not-every:1", "chooses no layer of 8"),
        ("not-last:8", "chooses no layer of 8"),
        ("not-last:100", "chooses no layer of 8"),
    ],
)  # fmt: skip
def test_layers_that_are_none(spec: str, expected: str) -> None:
    with pytest.raises(DijiangError) as call:
        select_layers(spec, 8, FULL, LOCAL, "gemma")
    assert expected in str(call.value) and "\n" not in str(call.value)


def test_layers_that_share_keys_go_together() -> None:
    """The last layers of gemma3n take keys and values of earlier ones."""
    kinds = ["sliding_attention", "full_attention"] * 3
    text = config_of("gemma3n_text", head_dim=8, num_hidden_layers=6, num_kv_shared_layers=2, layer_types=kinds)
    config = {**text.to_dict(), "architectures": ["Gemma3nForCausalLM"]}
    found = examine(config).layers
    assert found.layers == (1, 3, 5) and found.borrowing == (5,)
    assert examine(config, "1").layers.layers == (1,)
    for layers in ("3", "5", "0-3"):
        assert "share keys and values: choose all of them or none" in reason(config, layers=layers)


ROTATING = ("qwen3", "phi", "olmo2", "stablelm", "cohere")


@pytest.mark.parametrize("kind", ["opt", "gpt2", *ROTATING])
def test_converted_models_run(kind: str, tmp_path: Path) -> None:
    """Cached and full passes agree, and with the rotation removed from far keys a shift of all positions changes
    nothing."""
    random_model(config_of(kind)).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    settings = ["window=8", "block=8", "memory=8"]
    convert(str(tmp_path / "source"), tmp_path / "out", recipe="frequency", settings=settings)
    model = load_converted(tmp_path / "out", device=torch.device("cpu")).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".dijiang." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = torch.randint(VOCABULARY - 2, (2, 150))
    with torch.no_grad():
        full = model(input_ids=ids).logits
        steps, cache = [], None
        for piece in (ids[:, :37], *ids[:, 37:].split(1, dim=1)):
            result = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
        assert full.isfinite().all() and full.std() > 1e-3
        assert (torch.cat(steps, dim=1) - full).abs().max() <= 1e-4
        if kind in ROTATING:
            window_and_state(model)
            places = torch.arange(150).expand(2, -1)
            here, there = (model(input_ids=ids, position_ids=each).logits for each in (places, places + 50))
            assert (there - here).abs().max() <= 1e-5


def test_a_kept_rotation_depends_on_position(tmp_path: Path) -> None:
    """What the shift above would show where the rotation stays."""
    random_model(config_of("qwen3")).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    convert(
        str(tmp_path / "source"),
        tmp_path / "out",
        recipe="frequency",
        settings=["window=8", "block=8", "memory=8", "rotary=keep", "frequency=4.0"],
    )
    model = window_and_state(load_converted(tmp_path / "out", device=torch.device("cpu")).eval())
    ids, positions = torch.randint(VOCABULARY - 2, (1, 150)), torch.arange(150)[None]
    with torch.no_grad():
        change = model(input_ids=ids, position_ids=positions + 50).logits - model(input_ids=ids).logits
    assert change.abs().max() > 1e-3


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_carries_over(rope: str, tmp_path: Path) -> None:
    """Inside a long window it is the source's attention; far features see no rotation, whatever the scaling."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    source = random_model(config_of("llama", max_position_embeddings=256, rope_parameters=parameters))
    source.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    ids, positions = torch.randint(VOCABULARY - 2, (1, 200)), torch.arange(200)[None]
    convert(str(tmp_path / "source"), tmp_path / "whole", recipe="window-only", settings=["window=200", "block=200"])
    settings = ["window=8", "block=8", "memory=8", "frequency=4.0"]
    convert(str(tmp_path / "source"), tmp_path / "out", recipe="frequency", settings=settings)
    whole, far = (load_converted(tmp_path / name, device=torch.device("cpu")).eval() for name in ("whole", "out"))
    with torch.no_grad():
        expected = source(input_ids=ids).logits
        assert (whole(input_ids=ids).logits - expected).abs().max() <= 1e-5
        assert (far(input_ids=ids).logits - expected).abs().max() > 1e-3
        logits = window_and_state(far)(input_ids=ids).logits
        assert (far(input_ids=ids, position_ids=positions + 37).logits - logits).abs().max() <= 1e-5


def test_what_tracing_needs_no_values_for() -> None:
    """XMOD picks rows by a mask, of which there are no values without weights. JetMoE needs them, and says so."""
    from tests.sweep.tiny import tiny_config

    config = {**tiny_config("xmod").to_dict(), "architectures": ["XmodForCausalLM"]}
    assert examine(config).layers.layers == (0, 1)
    for kind, name, expected in (
        ("jetmoe", "JetMoeForCausalLM", "goes by values as it runs"),
        ("minimax", "MiniMaxForCausalLM", "takes no cache but one of its own class"),
    ):
        assert expected in reason({**tiny_config(kind).to_dict(), "architectures": [name]})


def test_dynamic_rope_scaling_is_refused() -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    assert "change with length" in reason(config_json("llama", rope_parameters=parameters))
