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
