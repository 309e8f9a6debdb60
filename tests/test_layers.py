"""Where tensors stand among the layers."""

import pytest

from merging.models.layers import places
from merging.models.structure import is_named_before


def test_places_of_odd_models() -> None:
    """Two stacks, layers that predict more tokens, a stack of one layer."""
    names = [f"vision.layers.{i}.m.w" for i in range(3)]
    names += [f"text.layers.{i}.m.w" for i in range(6)]
    names += ["text.embed.weight", "head.weight", "single.layers.0.m.w", "mtp.layers.0.m.w"]
    names += [f"merger.mlp.{i}.weight" for i in (0, 2)] + [f"embeds.{i}.weight" for i in range(4)]
    found = places(names, {"text.embed.weight", *names[-4:]}, depth=5, beyond=1)
    assert [found[f"vision.layers.{i}.m.w"] for i in range(3)] == [0, 0.5, 1]
    assert [found[f"text.layers.{i}.m.w"] for i in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert (found["text.embed.weight"], found["head.weight"]) == (0, 1)
    assert {found[f"merger.mlp.{i}.weight"] for i in (0, 2)} == {found["mtp.layers.0.m.w"]} == {1}
    assert {found[f"embeds.{i}.weight"] for i in range(4)} == {0}
    assert found["single.layers.0.m.w"] == 0
    experts = places([f"m.layers.{i}.experts.{e}.w" for i in range(3) for e in range(9)], (), 3)
    assert found and {experts[f"m.layers.1.experts.{e}.w"] for e in range(9)} == {0.5}


@pytest.mark.parametrize(
    "name, is_before",
    [
        ("model.embed_tokens.weight", True),
        ("transformer.word_embeddings_layernorm.weight", True),
        ("model.decoder.project_in.weight", True),
        ("vision_model.class_embedding", True),
        ("vision_tower.pre_layrnorm.weight", True),
        ("vision_model.layernorm_pre.weight", True),
        ("model.encoder.conv1.weight", True),
        ("wav2vec2_bert.feature_projection.projection.weight", True),
        ("model.encoder.conv.conv_layers.1.weight", True),
        ("cpmant.position_bias.relative_attention_bias", True),
        ("model.altup_projections.0.weight", True),
        ("model.norm.weight", False),
        ("model.decoder.project_out.weight", False),
        ("model.multi_modal_projector.mm_soft_emb_norm.weight", False),
        ("model.altup_unembed_projections.0.weight", False),
        ("mtp.pre_fc_norm_embedding.weight", False),
        ("model.embedding_norm.weight", False),  # LFM2's final norm
    ],
)
def test_names_tell_what_stands_before_the_layers(name: str, is_before: bool) -> None:
    assert is_named_before(name) == is_before
