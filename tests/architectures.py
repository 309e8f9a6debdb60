"""Tiny configurations of many architectures, with the shapes' proportions kept odd on purpose."""

import transformers as tf

_DIMENSIONS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN = {k: v for k, v in _DIMENSIONS.items() if k != "num_key_value_heads"}

DECODERS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**_DIMENSIONS),
    "llama-bias": tf.LlamaConfig(**_DIMENSIONS, attention_bias=True, mlp_bias=True),
    "llama-tied": tf.LlamaConfig(**_DIMENSIONS, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**_DIMENSIONS),
    "qwen2": tf.Qwen2Config(**_DIMENSIONS),
    "qwen3": tf.Qwen3Config(**_DIMENSIONS, head_dim=8),
    "gemma2": tf.Gemma2Config(**_DIMENSIONS, head_dim=8),
    "gemma3": tf.Gemma3TextConfig(**_DIMENSIONS, head_dim=8),
    "olmo2": tf.Olmo2Config(**_DIMENSIONS),
    "phi3": tf.Phi3Config(**_DIMENSIONS),
    "smollm3": tf.SmolLM3Config(**_DIMENSIONS),
    "cohere": tf.CohereConfig(**_DIMENSIONS),
    "stablelm": tf.StableLmConfig(**_DIMENSIONS),
    "gpt-neox": tf.GPTNeoXConfig(**_PLAIN),
    "gpt2": tf.GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=6,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi": tf.PhiConfig(**_PLAIN),
    "opt": tf.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "starcoder2": tf.Starcoder2Config(**_DIMENSIONS),
    "mixtral": tf.MixtralConfig(**_DIMENSIONS, num_local_experts=3),
    "qwen3-moe": tf.Qwen3MoeConfig(
        **_DIMENSIONS,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[1, 4],
    ),
}


# Classes that are no decoders of text alone.
BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"intermediate_size": 48, "max_position_embeddings": 64}
_TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
OTHER_CLASSES = {
    "bert": (tf.BertModel, tf.BertConfig(**BERT)),
    "bert masked": (tf.BertForMaskedLM, tf.BertConfig(**BERT)),
    "bert classifier": (tf.BertForSequenceClassification, tf.BertConfig(**BERT, num_labels=3)),
    "roberta": (tf.RobertaForMaskedLM, tf.RobertaConfig(**BERT)),
    "llama classifier": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig(**_TEXT, num_labels=2, pad_token_id=0),
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    ),
    "t5 untied": (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            tie_word_embeddings=False,
        ),
    ),
    "bart": (
        tf.BartForConditionalGeneration,
        tf.BartConfig(
            vocab_size=96,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        ),
    ),
    "gemma3 vision": (
        tf.Gemma3ForConditionalGeneration,
        tf.Gemma3Config(
            text_config=tf.Gemma3TextConfig(**_TEXT).to_dict(),
            vision_config=tf.SiglipVisionConfig(**_VISION).to_dict(),
            mm_tokens_per_image=4,
        ),
    ),
    "qwen2-vl": (
        tf.Qwen2VLForConditionalGeneration,
        tf.Qwen2VLConfig(
            text_config={k: v for k, v in _TEXT.items() if k != "head_dim"}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        ),
    ),
    "gemma3n": (  # which has a second embedding, with rows for each token and layer
        tf.Gemma3nForCausalLM,
        tf.Gemma3nTextConfig(
            **_TEXT,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**_VISION)),
    "resnet": (
        tf.ResNetForImageClassification,
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    ),
    "clip": (
        tf.CLIPModel,
        tf.CLIPConfig(
            text_config=BERT | {"eos_token_id": 2}, vision_config=_VISION, projection_dim=16
        ),
    ),
}
