"""The table of parts: properties of a weight from its name; no other file spells a prefix."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from ross_mcore.options import OptimizerOptions
from ross_mcore.parts import PARTS, is_sharded, label_of, order_of, part_of, trains

PACKAGE = Path(__file__).parents[2] / "ross_mcore"

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
    assert sorted(sorted(ORDER), key=order_of) == ORDER
    families = ["vision tower", "projector", "embedding", "decoder layer 2", "decoder layer 11", "final norm"]
    assert list(map(label_of, ORDER)) == [*families, "output layer", "denoiser"]


def test_names_of_moments_and_unknown_names() -> None:
    moments = f"optimizer.state.exp_avg.{ORDER[3]}"
    assert label_of(moments) == "decoder layer 2" and order_of(moments) == order_of(ORDER[3])
    assert part_of(moments).label == "language model" and not is_sharded("blank_posterior")
    assert label_of("blank_posterior") == label_of("language_model.rotary_pos_emb.inv_freq") == "model"
    assert max(map(order_of, ORDER)) < order_of("blank_posterior")
    with pytest.raises(ValueError, match="blank_posterior is not a weight of any part"):
        part_of("blank_posterior")


def test_what_trains() -> None:
    names = [*ORDER, "denoiser.pos_embed", "pixel_decoder.autoencoder.encoder.conv_in.weight"]

    def training(llm_trains: bool, vision_trains: bool) -> list[str]:
        return [name for name in names if trains(name, llm_trains, vision_trains)]

    assert training(False, False) == [ORDER[1], ORDER[7], "denoiser.pos_embed"]
    assert training(True, False) == ORDER[1:]
    assert training(True, True) == ORDER


def test_every_rate_is_an_option_and_has_its_own_tag() -> None:
    options = OptimizerOptions(lr=1.0)
    rated = [part for part in PARTS if part.rate_option]
    assert all(hasattr(options, str(part.rate_option)) for part in rated)
    assert len({part.optimizer_tag for part in rated} | {1.0}) == len(rated) + 1


def test_the_model_holds_every_part_under_its_prefix() -> None:
    code = ast.parse((PACKAGE / "models" / "ross.py").read_text(encoding="utf-8"))
    targets = [target for node in ast.walk(code) if isinstance(node, ast.Assign) for target in node.targets]
    assert {part.prefix for part in PARTS} <= {target.attr for target in targets if isinstance(target, ast.Attribute)}


def test_only_the_table_spells_prefixes() -> None:
    """In strings: a prefix alone or next to a dot. Docstrings and attributes of models are not checked."""
    prefix = "|".join(part.prefix for part in PARTS)
    spelled = re.compile(rf"({prefix})|.*\b({prefix})\\?\.[\w{{*(\\].*|({prefix})\.|.*\w\.({prefix})\b.*", re.DOTALL)
    found = set()
    for path in PACKAGE.rglob("*.py"):
        code = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(code) if isinstance(node, ast.Expr)}
        constants = [node for node in ast.walk(code) if isinstance(node, ast.Constant) and id(node) not in prose]
        if any(isinstance(node.value, str) and spelled.fullmatch(node.value) for node in constants):
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"parts.py"}
