"""What a diagnosis says."""

from __future__ import annotations

from ross_mcore.engine.finite import Diagnosis

LAYER, OUTPUT = "language_model.decoder.layers.2.mlp.linear_fc1.weight", "language_model.output_layer.weight"


def test_what_a_diagnosis_says() -> None:
    assert str(Diagnosis(None, None)) == "all weights are finite"
    said = str(Diagnosis(LAYER, OUTPUT))
    assert said == (
        f"weights are not finite from the decoder layer 2 ({LAYER}) on, gradients are not from the output layer "
        f"({OUTPUT}) back"
    )
