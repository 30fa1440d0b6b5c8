"""A tiny random model of every type that transformers registers for causal language modelling.

One mechanism: the fields of a type's config class, nested ones included, are set by name (`FIELDS`), and layers are
added until one has full attention. `CHANGES` has what a few types need besides.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.sources_on_disk import TOKENS, VOCABULARY

KINDS: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
POSITIONS = 512
SLIDING_WINDOW = 24

# value: the names that configs give to what has it. 4 heads of 8, which share 2 for keys where they can.
NAMES: dict[Any, str] = {
    32: "hidden_size d_model n_embd emb_dim embed_dim embedding_size input_embedding_size output_embedding_size "
    "word_embed_proj_dim backbone_hidden_size out_hidden_size vision_output_dim projector_input_dim "
    "projector_output_dim adapter_in_dim adapter_input_size mm_embed_dim audio_embed_dim output_proj_dims "
    "adapter_out_dim hidden_size_global",
    64: "intermediate_size ffn_dim d_inner dff dim_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner "
    "feed_forward_size mlp_dim intermediate_size_mlp dense_intermediate_size mamba_d_ssm",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank "
    "kv_lora_rank o_lora_rank router_hidden_size mamba_d_head mamba_head_dim mamba_d_state ssm_state_size "
    "laurel_rank hc_lowrank index_topk output_channels",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads "
    "n_mamba_heads conf_num_attention_heads index_n_heads indexer_n_heads zero_expert_num rotary_dim",
    2: "num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk "
    "moe_top_k linear_num_key_heads encoder_layers num_encoder_layers depth conf_num_hidden_layers "
    "num_global_layers n_groups num_codebooks",
    8: "head_dim swa_head_dim dim_head d_kv kv_channels attention_head_size v_head_dim qk_nope_head_dim "
    "qk_rope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim "
    "hidden_size_per_layer_input",
    1: "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers",
    VOCABULARY: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size unpadded_vocab_size",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length",
    SLIDING_WINDOW: "sliding_window sliding_window_size local_attention window_size attention_window_size",
}  # fmt: skip
FIELDS: dict[str, Any] = {name: value for value, names in NAMES.items() for name in names.split()}
LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"]
# Fields that are None by default and then follow others: these are given a value of their own.
SET_ANYWAY = {*TOKENS, "num_key_value_heads", "num_kv_heads", "head_dim", "unpadded_vocab_size"}
# Layer types that are no full attention have one of these in their name.
OTHERS = ("sliding", "linear", "conv", "chunked", "mamba", "moe", "mlp", "recurrent")

# A text part, for configs that don't say which model type theirs is.
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
}  # fmt: skip
# The first layer recurrent, the second not.
HYBRID = ["linear_attention", "full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # as from version 0.2 on
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"per_layer_config": {}}},
    "fuyu": {"text_config": {"model_type": "persimmon", **TEXT}},
    "emu3": {
        "vocabulary_map": {"<image>": 255},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 16, "num_res_blocks": 1},
    },
    "gemma3n_text": {
        "num_hidden_layers": 6, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3", **TEXT}},
    # Its cache has a sliding window and its mask has none: released ones are as long as the context.
    "moshi": {"audio_vocab_size": 64, "sliding_window": POSITIONS},
    "qwen4_exp_text": {
        "num_hidden_layers": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4, "indexer_n_heads": 4, "ngram_vocab_size_base": 1000,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xlstm": {"mode": "train"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(kind: str, **changes: Any) -> PreTrainedConfig:
    """The config of a model with at least one layer of full attention, or of two layers where none is.

    Raises what the type's own config raises where it can't be built.
    """
    config_class = transformers.CONFIG_MAPPING[kind]
    extra = {**CHANGES.get(kind, {}), **changes}
    first = None
    for layers in (2, 3, 4, 5, 6, 8):
        config: Any = config_class(**_values(config_class, layers, extra))
        first = first or config
        types = getattr(config.get_text_config(decoder=True), "layer_types", None)
        if types is None or any(not any(name in kind for name in OTHERS) for kind in types):
            return config
    assert first is not None
    return first


def _values(config_class: Any, layers: int, changes: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    for name, default in fields.items():
        if name in LAYERS:
            values[name] = layers
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif name in FIELDS and (default is not None or name in SET_ANYWAY):
            values[name] = FIELDS[name]
        elif "drop" in name and isinstance(default, float):
            values[name] = 0.0
    if "kv_lora_rank" in fields:  # latent attention has as many heads for keys
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "is_decoder" in fields:
        values["is_decoder"] = True
    if fields["is_encoder_decoder"]:  # its decoder alone
        values["is_encoder_decoder"] = False
    for name, sub in config_class.sub_configs.items():
        if sub is transformers.AutoConfig:
            sub = transformers.CONFIG_MAPPING[config_class.sub_configs_defaults[name].model_type]
        if dataclasses.is_dataclass(sub):
            values[name] = {
                **_values(sub, layers, {**CHANGES.get(sub.model_type, {}), **changes.get(name, {})}),
                "model_type": sub.model_type,
            }
    given = {name: value for name, value in changes.items() if not isinstance(value, dict) or name not in values}
    return values | given
