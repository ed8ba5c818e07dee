"""Names of weights in the order of the model."""

from __future__ import annotations

from ross_mcore.guards.finite import Diagnosis, family_of, place_of

ORDER = [
    "vision_model.encoder.layers.3.mlp.fc1.weight",
    "vision_projection.layers.0.bias",
    "language_model.embedding.word_embeddings.weight",
    "language_model.decoder.layers.2.mlp.linear_fc1.weight",
    "language_model.decoder.layers.11.self_attention.linear_qkv.bias",
    "language_model.decoder.final_layernorm.weight",
    "language_model.output_layer.weight",
    "denoiser.blocks.0.attn.qkv.weight",
]


def test_the_order_is_that_of_the_data() -> None:
    assert sorted(sorted(ORDER), key=place_of) == ORDER
    families = ["vision tower", "projector", "embedding", "decoder layer 2", "decoder layer 11", "final norm"]
    assert list(map(family_of, ORDER)) == [*families, "output layer", "denoiser"]


def test_what_a_diagnosis_says() -> None:
    assert str(Diagnosis(None, None)) == "all weights are finite"
    said = str(Diagnosis(ORDER[3], ORDER[6]))
    assert said == (
        f"weights are not finite from the decoder layer 2 ({ORDER[3]}) on, gradients are not from the output layer "
        f"({ORDER[6]}) back"
    )
