"""What kind of tensor a name stands for, and in which layer."""

import pytest
import torch
import transformers as tf
from architectures import DECODERS

from merging.models.kinds import Layer, kind_of, layers_of

NAMES = {
    "embedding": [
        "model.embed_tokens.weight",  # Llama, Mistral, Qwen, Gemma, Phi
        "transformer.wte.weight",  # GPT-2
        "wpe.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",  # T5
        "model.decoder.embed_positions.weight",
        "transformer.word_embeddings.weight",
        "model.vision_tower.embeddings.patch_embedding.bias",
    ],
    "attention": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.linear_attn.in_proj_qkv.weight",
        "h.0.attn.c_proj.bias",
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "transformer.h.0.self_attention.dense.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "bert.encoder.layer.0.attention.output.dense.weight",
    ],
    "MLP": [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.fc1.bias",
        "model.decoder.layers.0.fc2.weight",
        "h.0.mlp.c_fc.weight",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
        "bert.encoder.layer.0.output.dense.weight",
    ],
    "experts": [
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.mlp.router.weight",
    ],
    "norms": [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "h.0.ln_1.bias",
        "ln_f.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "gpt_neox.final_layer_norm.weight",
        "bert.embeddings.LayerNorm.bias",
        "vision_model.pre_layrnorm.weight",
    ],
    "head": [
        "lm_head.weight",
        "embed_out.weight",
        "score.weight",
        "classifier.bias",
        "cls.predictions.decoder.weight",
        "output.weight",
    ],
    "other": [
        "model.multi_modal_projector.linear_1.weight",
        "model.altup_unembed_projections.0.weight",
        "model.layers.0.altup.correct_output_scale",
        "backbone.layers.0.mixer.in_proj.weight",
        "weight",
    ],
}


@pytest.mark.parametrize("kind, name", [(k, name) for k, names in NAMES.items() for name in names])
def test_names_tell_the_kind(kind: str, name: str) -> None:
    assert kind_of(name, any(part.isdigit() for part in name.split("."))) == kind


@pytest.mark.parametrize("name", DECODERS)
def test_every_tensor_of_a_decoder_has_a_kind(name: str) -> None:
    with torch.device("meta"):
        names = list(tf.AutoModelForCausalLM.from_config(DECODERS[name]).state_dict())
    layers = layers_of(names)
    kinds = {tensor: kind_of(tensor, layers[tensor] is not None) for tensor in names}
    assert "other" not in kinds.values()
    assert {kinds[n] for n in names if layers[n] is None} == {"embedding", "norms", "head"}
    assert {layer for layer in layers.values() if layer} == {Layer("", i) for i in range(6)}


def test_layers_of_several_stacks_are_told_apart() -> None:
    found = layers_of(
        [
            "shared.weight",
            "encoder.block.3.layer.0.SelfAttention.q.weight",
            "decoder.block.3.layer.0.SelfAttention.q.weight",
            "encoder.final_layer_norm.weight",
        ]
    )
    assert list(found.values()) == [None, Layer("encoder", 3), Layer("decoder", 3), None]
    assert str(Layer("encoder", 3)) == "encoder 3"
    alike = layers_of(["a.b.0.m.w", "b.a.0.m.w"])
    assert list(alike.values()) == [Layer("a.b", 0), Layer("b.a", 0)]
