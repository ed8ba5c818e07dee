"""Conversion in both directions, bit by bit: the recorded checkpoints, and every combination of families with a
vocabulary that needs padding."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ross_mcore.commands import convert as convert_hf_to_mcore
from ross_mcore.commands import export as convert_mcore_to_hf
from tests.recorded import FAMILIES, GOLDEN, TOKENIZERS, read_json, tied_source
from tests.sources import SOURCES, VOCABULARY, Source, write_source


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch):
    """convert(tool, "--flag", value, ...) -> the exit status of that tool."""

    def run(tool: Any, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        return tool.main()

    return run


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def recorded_folder(family: str) -> Path:
    return GOLDEN / f"model_{family}" / "hf_checkpoint"


@pytest.fixture(scope="module", params=[*FAMILIES, "tied", *SOURCES], ids=lambda p: getattr(p, "name", p))
def ross(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a full checkpoint of the reference, its tokenizer)"""
    folder = Path(tmp_path_factory.mktemp("source"))
    if isinstance(request.param, Source):
        return write_source(folder, request.param), request.param.tokenizer
    if request.param == "tied":  # beside `components`, to which its config.json points
        shutil.copytree(GOLDEN / "components", folder / "components")
        return tied_source(folder / "model" / "ross"), GOLDEN / "data" / TOKENIZERS["qwen2_siglip"]
    return recorded_folder(request.param), GOLDEN / "data" / TOKENIZERS[request.param]


def test_ross_round_trip(ross: tuple[Path, Path], convert: Any, tmp_path: Path) -> None:
    source, tokenizer = ross
    assert convert(convert_hf_to_mcore, "--ross-model", source, "--tokenizer", tokenizer, "--save", tmp_path / "a") == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back") == 0
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(source))
    # once more from what was written, which has all it needs, in shards
    (tmp_path / "back").rename(tmp_path / "moved")
    assert convert(convert_hf_to_mcore, "--ross-model", tmp_path / "moved", "--save", tmp_path / "b") == 0
    shards = ("--max-shard-size", "60KB", "--mm-vision-tower", read_json(source / "config.json")["mm_vision_tower"])
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "b", "--save", tmp_path / "again", *shards) == 0
    assert_equal(tensors_of(tmp_path / "again"), tensors_of(source))
    index = read_json(tmp_path / "again" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(source).values())
    for file in (tmp_path / "again").glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
            assert shard.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in names} == {file.name}
            assert len(names) == 1 or sum(shard.get_tensor(name).nbytes for name in names) <= 60_000


def test_parts_round_trip_and_load_in_their_libraries(ross: tuple[Path, Path], convert: Any, tmp_path: Path) -> None:
    """ROSS -> parts -> checkpoint -> ROSS; transformers and diffusers load the parts and compute the same."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import AutoModel, AutoModelForCausalLM

    source, tokenizer = ross
    config, parts = read_json(source / "config.json"), tmp_path / "parts"
    assert convert(convert_hf_to_mcore, "--ross-model", source, "--tokenizer", tokenizer, "--save", tmp_path / "a") == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", parts, "--format", "hf") == 0
    tower = next(parts.glob("*_vision_tower"))
    for library, folder in ((AutoModelForCausalLM, "language_model"), (AutoModel, tower.name), (AutoencoderKL, "vae")):
        path = parts / folder.replace("vae", "pixel_decoder")
        _, info = library.from_pretrained(path, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    assert tensors_of(tower).keys() == {
        name.removeprefix("model.vision_tower.vision_tower.")
        for name in tensors_of(source)
        if name.startswith("model.vision_tower.")
    }
    adapters = [f"--{name.replace('_', '-')}={parts / name}.bin" for name in ("mm_projector", "mm_inv_projector")]
    status = convert(
        convert_hf_to_mcore,
        *("--language-model", parts / "language_model", "--vision-model", tower),
        *("--pixel-decoder", parts / "pixel_decoder", "--denoiser-width", config["mm_inv_width"]),
        *("--denoiser-type", config["mm_inv_projector_type"], *adapters, "--save", tmp_path / "b"),
    )
    assert status == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "b", "--save", tmp_path / "back") == 0
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(source))

    # the language model computes what the source's tensors compute in the library's own model
    model = AutoModelForCausalLM.from_pretrained(parts / "language_model").eval()
    expected = type(model)(model.config).eval()
    state = tensors_of(source)
    expected.load_state_dict({name: state.get(name, state["model.embed_tokens.weight"]) for name in model.state_dict()})
    ids = torch.arange(24).view(2, 12) % config["vocab_size"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.config.rope_parameters["rope_theta"] == config["rope_theta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_one_in_and_out(family: str, convert: Any, tmp_path: Path) -> None:
    """The recorded adapters are converted with language model, tower and VAE, and exported unchanged."""
    recorded = GOLDEN / f"model_{family}"
    config = read_json(recorded / "hf_checkpoint" / "config.json")
    tokenizer = GOLDEN / "data" / TOKENIZERS[family]
    source = ("--ross-model", recorded / "hf_checkpoint", "--tokenizer", tokenizer)
    assert convert(convert_hf_to_mcore, *source, "--save", tmp_path / "whole") == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "whole", "--save", tmp_path / "hf", "--format", "hf") == 0
    bins = sorted((recorded / "stage1_output").glob("*.bin"))
    status = convert(
        convert_hf_to_mcore,
        *("--language-model", tmp_path / "hf" / "language_model", "--vision-model", GOLDEN / config["mm_vision_tower"]),
        *("--pixel-decoder", GOLDEN / config["mm_pixel_decoder"], "--denoiser-width", config["mm_inv_width"]),
        *("--save", tmp_path / "started"),
        *(part for file in bins for part in (f"--{file.stem.replace('_', '-')}", file)),
    )
    assert status == 0
    paths = [f"--{key.replace('_', '-')}={config[key]}" for key in ("mm_vision_tower", "mm_pixel_decoder")]
    out = tmp_path / "stage1"
    assert (
        convert(convert_mcore_to_hf, "--load", tmp_path / "started", "--save", out, "--format", "stage1", *paths) == 0
    )
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "mm_inv_projector.bin", "mm_projector.bin"]
    for file in bins:
        found = torch.load(out / file.name, weights_only=True)
        expected = torch.load(file, weights_only=True)
        assert type(found) is dict and list(found) == list(expected)
        assert_equal(found, expected)
    found, expected = read_json(out / "config.json"), read_json(recorded / "stage1_output" / "config.json")
    # a model made of parts was trained nowhere, so pictures are read as by default
    assert differing(found, expected, family) == {"image_aspect_ratio": ("square", "pad")}


EXPLAINED: dict[str, dict[str, tuple[Any, Any]]] = {
    family: {
        "use_cache": (True, False),  # the reference saves what it switched off for training
        "transformers_version": (None, "4.43.1"),  # who wrote the file: not transformers
    }
    for family in FAMILIES
}
EXPLAINED["qwen2_siglip"]["pad_token_id"] = (509, 0)  # the tokenizer's own; the recorded model was given none


def differing(found: dict[str, Any], recorded: dict[str, Any], family: str) -> dict[str, tuple[Any, Any]]:
    """Fields with different values, (ours, recorded), except EXPLAINED ones."""
    keys = found.keys() | recorded.keys()
    all_of_them = {key: (found.get(key), recorded.get(key)) for key in keys if found.get(key) != recorded.get(key)}
    return {key: values for key, values in all_of_them.items() if EXPLAINED[family].get(key) != values}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_has_every_field_of_the_recorded_one(family: str, convert: Any, tmp_path: Path) -> None:
    source, tokenizer = recorded_folder(family), GOLDEN / "data" / TOKENIZERS[family]
    recorded = read_json(source / "config.json")
    assert convert(convert_hf_to_mcore, "--ross-model", source, "--tokenizer", tokenizer, "--save", tmp_path / "a") == 0
    paths = [f"--{key.replace('_', '-')}={recorded[key]}" for key in ("mm_vision_tower", "mm_pixel_decoder")]
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back", *paths) == 0
    found = read_json(tmp_path / "back" / "config.json")
    assert differing(found, recorded, family) == {}
    assert recorded.keys() - found.keys() == {"transformers_version"} and not found.keys() - recorded.keys()
    generation = "generation_config.json"
    assert read_json(tmp_path / "back" / generation) == read_json(source / generation)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"config.json", generation, "model.safetensors", *(path.name for path in tokenizer.iterdir())}


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_as_the_recorded_checkpoint_does(family: str, convert: Any, tmp_path: Path) -> None:
    """from_pretrained on the whole folder: no tensor of the language model is missing, and, except for tower and
    projector, which the reference's class builds, the unexpected tensors have the recorded numbers and parts."""
    from transformers import AutoTokenizer, LlamaForCausalLM, Qwen2ForCausalLM

    source, tokenizer = recorded_folder(family), GOLDEN / "data" / TOKENIZERS[family]
    assert convert(convert_hf_to_mcore, "--ross-model", source, "--tokenizer", tokenizer, "--save", tmp_path / "a") == 0
    flags = ("--load", tmp_path / "a", "--save", tmp_path / "back", "--max-shard-size", "300KB")
    assert convert(convert_mcore_to_hf, *flags) == 0
    language = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}[family.split("_")[0]]
    _, info = language.from_pretrained(tmp_path / "back", output_loading_info=True)
    recorded = read_json(GOLDEN / f"model_{family}" / "oracle.json")["reload"]
    built = ("model.vision_tower.", "model.mm_projector.")
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(built)]
    assert not info["missing_keys"] and not info["mismatched_keys"] and len(unexpected) == recorded["unexpected"]
    assert all(name.startswith(tuple(recorded["unexpected_prefixes"])) for name in unexpected)
    ids = [AutoTokenizer.from_pretrained(path)("Is it so?").input_ids for path in (tmp_path / "back", tokenizer)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_asked_for(dtype: torch.dtype, convert: Any, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", SOURCES[0])
    save = ("--tokenizer", SOURCES[0].tokenizer, "--save", tmp_path / "a")
    assert convert(convert_hf_to_mcore, "--ross-model", source, *save) == 0
    name = str(dtype).removeprefix("torch.")
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back", "--dtype", name) == 0
    assert_equal(tensors_of(tmp_path / "back"), {k: v.to(dtype) for k, v in tensors_of(source).items()})
    assert read_json(tmp_path / "back" / "config.json")["torch_dtype"] == name


def test_mixed_precisions_are_kept(convert: Any, tmp_path: Path) -> None:
    """A bfloat16 checkpoint of the reference, of which our runs keep denoiser and VAE in float32."""
    source = write_source(tmp_path / "source", Source("llama", "siglip", dtype=torch.bfloat16))
    flags = ("--ross-model", source, "--tokenizer", SOURCES[-1].tokenizer, "--dtype", "bfloat16")
    assert convert(convert_hf_to_mcore, *flags, "--save", tmp_path / "a") == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back") == 0
    kept = ("model.mm_inv_projector.", "model.pixel_decoder.")
    expected = {k: v.float() if k.startswith(kept) else v for k, v in tensors_of(source).items()}
    assert_equal(tensors_of(tmp_path / "back"), expected)
    assert read_json(tmp_path / "back" / "config.json")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "source", [Source("llama", "clip", tower_prefix=""), Source("qwen2", "siglip", tower_prefix="")]
)
def test_tower_without_prefix(source: Source, convert: Any, tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", source)
    flags = ("--ross-model", folder, "--tokenizer", source.tokenizer, "--save", tmp_path / "a")
    assert convert(convert_hf_to_mcore, *flags) == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back") == 0
    start = "model.vision_tower.vision_tower."
    expected = {
        f"{start}vision_model.{name.removeprefix(start)}" if name.startswith(start) else name: tensor
        for name, tensor in tensors_of(folder).items()
    }
    assert_equal(tensors_of(tmp_path / "back"), expected)


def test_linear_projector(convert: Any, tmp_path: Path) -> None:
    source = Source("qwen2", "clip", projector_type="linear")
    folder = write_source(tmp_path / "source", source)
    flags = ("--ross-model", folder, "--tokenizer", source.tokenizer, "--save", tmp_path / "a")
    assert convert(convert_hf_to_mcore, *flags) == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back") == 0
    assert "model.mm_projector.weight" in tensors_of(tmp_path / "back")
    assert_equal(tensors_of(tmp_path / "back"), tensors_of(folder))


def test_llava_baseline_has_no_denoiser(convert: Any, tmp_path: Path) -> None:
    """A checkpoint of the reference's train_llava scripts: ross_enable is false, no denoiser and no VAE."""
    folder = write_source(tmp_path / "source", SOURCES[0])
    without = ("mm_inv", "mm_pixel", "model.mm_inv", "model.pixel")
    rewrite(folder, lambda c: {k: v for k, v in c.items() if not k.startswith(without)} | {"ross_enable": False})
    tensors = {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith(without)}
    save_file(tensors, folder / "model.safetensors")
    flags = ("--ross-model", folder, "--tokenizer", SOURCES[0].tokenizer, "--save", tmp_path / "a")
    assert convert(convert_hf_to_mcore, *flags) == 0
    assert convert(convert_mcore_to_hf, "--load", tmp_path / "a", "--save", tmp_path / "back") == 0
    assert_equal(tensors_of(tmp_path / "back"), tensors)
    config = read_json(tmp_path / "back" / "config.json")
    assert config["ross_enable"] is config["use_mm_inv_proj"] is False and config["mm_pixel_decoder"] is None
    assert not (tmp_path / "back" / "pixel_decoder").exists()


def rewrite(folder: Path, change: Any) -> None:
    config = change(read_json(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop(tensors: dict[str, Tensor], start: str) -> None:
    for name in [name for name in tensors if name.startswith(start)]:
        del tensors[name]


REFUSED = {
    "unknown tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"model.mm_inv_projector.net.extra": torch.zeros(1)})),
        "model.mm_inv_projector.net.extra has no place",
    ),
    "tensor of another variant": (
        lambda f: change_tensors(f, lambda t: t.update({"model.mm_inv_projector.ln_pre.weight": torch.zeros(1)})),
        "model.mm_inv_projector.ln_pre.weight is not known",
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: drop(t, "model.mm_inv_projector.net.pos_embed")),
        "denoiser.pos_embed",
    ),
    "denoiser and VAE lost": (
        lambda f: change_tensors(f, lambda t: (drop(t, "model.mm_inv"), drop(t, "model.pixel"))),
        "from_pretrained drops them",
    ),
    "present but disabled": (lambda f: rewrite(f, lambda c: c | {"ross_enable": False}), "mm_inv_projector.net"),
    "tower not found": (
        lambda f: rewrite(f, lambda c: c | {"mm_vision_tower": "google/siglip"}),
        "give the folder with --vision-model",
    ),
    "another tower": (lambda f: rewrite(f, lambda c: c | {"image_embed_len": 729}), "image_embed_len is 729"),
    "vocabulary": (lambda f: rewrite(f, lambda c: c | {"vocab_size": VOCABULARY - 1}), f"[{VOCABULARY}, 32]"),
    "unsupported": (lambda f: rewrite(f, lambda c: c | {"s2": True}), "s2=True is not implemented"),
    "pictures in tiles": (
        lambda f: rewrite(f, lambda c: c | {"image_aspect_ratio": "anyres"}),
        "expected one of square",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(
    case: str, convert: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, message = REFUSED[case]
    folder = write_source(tmp_path / "source", SOURCES[0])
    harm(folder)
    flags = ("--ross-model", folder, "--tokenizer", SOURCES[0].tokenizer, "--save", tmp_path / "a")
    assert convert(convert_hf_to_mcore, *flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not list((tmp_path / "a").glob("*"))
