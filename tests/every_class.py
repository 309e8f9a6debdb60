"""Tiny random checkpoints of every class of transformers that has tokens, on demand.

build("LlamaForCausalLM", seed=1).save_pretrained(folder)

A config is shrunk by the names of its fields: `SIZES` says how large each may be, whatever class
has it, and `EXCEPTIONS` what a class needs besides. Fields that a class derives from others (lists
with one entry a layer, above all) are left to the class. Every parameter is random, so that no
tensor equals another by default.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
VOCABULARY = 97  # a number that no other dimension has

SIZES = {
    name: size
    for size, names in (
        (LAYERS, """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers
            depth encoder_layers num_encoder_layers"""),
        (VOCABULARY, """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size
            src_vocab_size tgt_vocab_size n_vocab"""),
        (1, """n_group topk_group num_expert_group first_k_dense_replace num_dense_layers
            moe_layer_start_index attn_layer_offset expert_layer_offset num_mem_blocks
            split_ngram_parts"""),
        (2, """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
            text_encoder_layers speech_encoder_layers t2u_encoder_layers t2u_decoder_layers
            num_experts_per_tok num_experts_per_token moe_k moe_topk top_k attn_layer_period
            expert_layer_period decoder_sparse_step interleave_moe_layer_step index_n_heads
            global_attn_every_n_layers sliding_window_pattern layer_group_size n_groups
            mamba_n_groups num_codebooks spatial_merge_size hc_lowrank index_topk_blocks"""),
        (3, "moe_layer_end_index"),
        (4, """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
            encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
            swa_num_attention_heads linear_num_heads linear_num_value_heads num_query_groups
            num_experts num_local_experts n_routed_experts moe_num_experts n_mamba_heads
            mamba_num_heads mamba_n_heads speech_encoder_attention_heads
            t2u_encoder_attention_heads t2u_decoder_attention_heads chunk_size mamba_chunk_size
            encoder_hash_byte_group_vocab ngram_vocab_size_base make_ngram_vocab_size_divisible_by
            num_centroids centroid_intermediate_top_k zero_expert_num sliding_window
            sliding_window_size window_size local_attention_window_len local_attention
            attention_window_size index_topk index_block_size rel_extent d_rel conv_kernel"""),
        (8, """head_dim swa_head_dim d_head dim_head linear_head_dim linear_key_head_dim
            linear_value_head_dim attention_head_dim attention_head_size index_head_dim v_head_dim
            qk_nope_head_dim qk_rope_head_dim kv_channels d_kv global_head_dim rotary_dim
            mamba_d_state ssm_state_size state_size loop_gate_rank laurel_rank adapter_rank
            position_embedding_size hidden_size_per_layer_input"""),
        (16, """kv_lora_rank q_lora_rank o_lora_rank qk_head_dim moe_intermediate_size patch_size
            expert_ffn_hidden_size shared_expert_intermediate_size mamba_d_head mamba_head_dim
            shared_experts_intermediate_size shared_intermediate_size mm_posemb_size
            moe_shared_expert_intermediate_size num_positions num_position_embeddings
            projection_dim max_source_positions segment_types"""),
        (32, """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim
            attention_hidden_size lru_width backbone_hidden_size router_hidden_size mm_embed_dim
            output_proj_dims audio_embed_dim hidden_size_global out_hidden_size image_size
            conv_channels num_mel_bins input_embedding_size output_embedding_size shape_embed_dim
            pronunciation_embed_dim cross_attention_hidden_size adapter_out_dim"""),
        (48, """intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff
            d_inner dff feed_forward_size n_inner dense_intermediate_size intermediate_size_mlp d_ff
            speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"""),
        (64, """max_position_embeddings n_positions max_seq_len n_ctx context_length mamba_d_ssm
            max_target_positions max_sequence_length shape_vocab_size pronunciation_vocab_size"""),
    )
    for name in names.split()
}  # fmt: skip
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# What a config class needs besides SIZES; of a config inside another by that one's key.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "BltPatcherConfig": {"vocab_size": VOCABULARY},
    "CohereCompassTextConfig": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
    "DbrxFFNConfig": {"moe_top_k": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DiffusionGemmaTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "DoryConfig": {"n_input_layers": 1, "n_output_layers": 1},
    "Dots1Config": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
    "Dots3NoteTextConfig": {
        "head_dim": 16,
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 8,
    },
    "Gemma3nTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * LAYERS,
        "num_kv_shared_layers": 2,
    },
    "Gemma4TextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
    },
    "Gemma4UnifiedTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
    },
    "Gemma4AssistantConfig": {
        "text_config": {
            "model_type": "gemma4_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "GotOcr2VisionConfig": {"output_channels": 16, "mlp_dim": 48},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2Config": {"full_attn_idxs": [1, 3], "block_multiple_of": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"head_dim": 16},
    "MinistralConfig": {"head_dim": 8},
    "MoshiConfig": {"audio_vocab_size": 61},
    "MoshiDepthConfig": {"audio_vocab_size": 61, "input_size": 32},
    "NeoMMEConfig": {"head_dim": 16},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NemotronHConfig": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "Phi4MultimodalAudioConfig": {
        "num_blocks": 1,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 16,
    },
    "Qwen4ExpTextConfig": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "eos_token_id": 2,
        "ple_layer_ids": [1, 3],  # counted from 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ReformerConfig": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "xLSTMConfig": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
    "Zamba2Config": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}

# Classes that cannot be made at this size, or here at all, and why.
UNBUILDABLE = {"Gemma3nForConditionalGeneration": "its vision tower needs timm and Pillow"}

CAUSAL = tuple(
    name
    for name in dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if name not in UNBUILDABLE
)


def tiny_config(config_class: type[tf.PretrainedConfig], **changes: Any) -> tf.PretrainedConfig:
    """Return a config of a class in which every size that SIZES names is small."""
    changes = EXCEPTIONS.get(config_class.__name__, {}) | changes
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    try:
        made = vars(config_class())
    except Exception:  # a class whose defaults do not fit together
        parts = config_class.sub_configs.items()
        made = {name: part() for name, part in parts if issubclass(part, tf.PretrainedConfig)}
    defaults = {name: made.get(name, default) for name, default in fields.items()}
    given: dict[str, Any] = {}
    for name, default in defaults.items():
        if isinstance(default, tf.PretrainedConfig):
            given[name] = tiny_config(type(default), **changes.pop(name, {}))
        elif isinstance(default, bool) or not isinstance(default, int | list | tuple):
            continue
        elif name in SPECIAL_TOKENS:
            given[name] = SPECIAL_TOKENS[name]
        elif isinstance(default, int) and name in SIZES:
            given[name] = SIZES[name]
        elif isinstance(default, int) and name.endswith(("_token_id", "_token_index")):
            given[name] = 3 + sum(map(ord, name)) % 90
    if "kv_lora_rank" in fields and "num_key_value_heads" in given:
        given["num_key_value_heads"] = SIZES[
            "num_attention_heads"
        ]  # latent attention has no groups
    return config_class(**(given | changes))


def build(
    name: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> tf.PreTrainedModel:
    """Return a tiny model of a class in which every parameter and stored buffer is random."""
    cls = getattr(tf, name)
    return randomised(cls(tiny_config(cls.config_class, **changes)), seed, dtype)


def randomised(
    model: tf.PreTrainedModel, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tf.PreTrainedModel:
    """Fill every parameter and stored buffer of a model with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def runs_on(model: tf.PreTrainedModel) -> dict[str, Any]:
    """Return a few tokens to run a decoder on."""
    books = model.config.num_codebooks if "Musicgen" in type(model).__name__ else 1
    return {"input_ids": torch.arange(3, 11).expand(books, -1), "use_cache": False}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def loaded(name: str, folder: Path) -> tuple[tf.PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint into its class, in float32: the model, and what transformers reports."""
    model, report = getattr(tf, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), report


def tokenizer(ids: Sequence[int]) -> Tokenizer:
    """Return a tokenizer whose n-th token has the n-th id."""
    made = Tokenizer(models.WordLevel({f"w{n}": i for n, i in enumerate(ids)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made
