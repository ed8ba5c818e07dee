"""The text of a diagnosis."""

from __future__ import annotations

from ross_mcore.engine.finite import Diagnosis

LAYER, OUTPUT = "language_model.decoder.layers.2.mlp.linear_fc1.weight", "language_model.output_layer.weight"


def test_the_text_of_a_diagnosis() -> None:
    assert str(Diagnosis(None, None)) == "all weights are finite"
    assert str(Diagnosis(LAYER, OUTPUT)) == (
        f"weights are not finite from the decoder layer 2 ({LAYER}) on, gradients are not from the output layer "
        f"({OUTPUT}) back"
    )
