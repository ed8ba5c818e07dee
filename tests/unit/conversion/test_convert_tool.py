"""tools/convert_hf_to_mcore.py: the checkpoint it writes, and its errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ross_mcore.architecture import ModelConfig
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.safe_load import read_metadata, read_tensor, tensor_shapes
from ross_mcore.commands import convert as tool
from ross_mcore.conversion import mapping
from ross_mcore.conversion.table import convert_out
from ross_mcore.models.inventory import inventory

from .conftest import Held

SMALL = ["--denoiser-type", "denoiser_vit2x", "--denoiser-width", "16"]


def run(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], save: Path, *more: str) -> int:
    arguments = ["--language-model", folders["language"], "--vision-model", folders["vision"], "--save", save, *more]
    if "pixel_decoder" in folders:
        arguments += ["--pixel-decoder", folders["pixel_decoder"], *SMALL]
    monkeypatch.setattr(sys, "argv", ["convert_hf_to_mcore.py", *map(str, arguments)])
    return tool.main()


def contents(checkpoint: folder.Checkpoint) -> dict[str, torch.Tensor]:
    metadata = read_metadata(checkpoint.path)
    return {name: read_tensor(checkpoint.path, metadata, name) for name in tensor_shapes(metadata)}


def test_converted_checkpoint_holds_the_sources_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, source_folders: dict[str, Path], tmp_path: Path
) -> None:
    assert run(monkeypatch, source_folders, tmp_path / "base") == 0
    checkpoint = folder.require_checkpoint(tmp_path / "base")
    model = checkpoint.model_config()
    tensors = contents(checkpoint)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == inventory(model)
    language = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
    table = (*mapping.LANGUAGE, *mapping.OUTPUT_MATRIX[False])
    back = dict(convert_out(table, Held(language), model.language))
    theirs = load_file(source_folders["language"] / "model.safetensors")
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    for name, tensor in load_file(source_folders["vision"] / "model.safetensors").items():
        assert torch.equal(tensors[f"vision_model.tower.{name}"], tensor)
    for name, tensor in load_file(source_folders["pixel_decoder"] / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensors[f"pixel_decoder.autoencoder.{name}"], tensor)
    assert tensors["vision_projection.0.weight"].abs().max() <= 8**-0.5 and tensors["vision_projection.0.bias"].any()
    assert not tensors["denoiser.final_layer.linear.weight"].any() and tensors["denoiser.pos_embed"].any()
    assert (checkpoint.tokenizer / "tokenizer.json").is_file() and checkpoint.preprocessor_config.is_file()


def test_same_seed_same_bytes(monkeypatch: pytest.MonkeyPatch, source_folders: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(monkeypatch, source_folders, tmp_path / name, "--seed", seed) == 0
        results.append((tmp_path / name / "iter_0000000" / "__0_0.distcp").read_bytes())
    assert results[0] == results[1] != results[2]


def test_plain_llava_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, source_folders: dict[str, Path], tmp_path: Path
) -> None:
    del source_folders["pixel_decoder"]
    assert run(monkeypatch, source_folders, tmp_path / "base", "--dtype", "bfloat16") == 0
    checkpoint = folder.require_checkpoint(tmp_path / "base")
    assert checkpoint.model_config().denoiser is None
    tensors = contents(checkpoint)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not [name for name in tensors if name.startswith(("denoiser", "pixel_decoder"))]


def test_two_shards_with_an_index(
    monkeypatch: pytest.MonkeyPatch, source_folders: dict[str, Path], tmp_path: Path
) -> None:
    path = source_folders["language"]
    whole = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(whole))}
    for file in set(weight_map.values()):
        save_file({name: whole[name] for name, where in weight_map.items() if where == file}, path / file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert run(monkeypatch, source_folders, tmp_path / "base") == 0
    index.write_text(json.dumps({"weight_map": {name: f"../{file}" for name, file in weight_map.items()}}))
    assert run(monkeypatch, source_folders, tmp_path / "again") == 2
    assert folder.find_checkpoint(tmp_path / "again") is None


@pytest.mark.slow
def test_weights_of_torch_save(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    source_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    """pytorch_model.bin, several with an index, and a VAE's give the checkpoint of the same tensors in safetensors."""
    assert run(monkeypatch, source_folders, tmp_path / "base") == 0
    language, vision, vae = (source_folders[name] for name in ("language", "vision", "pixel_decoder"))
    tensors = load_file(language / "model.safetensors")
    (language / "model.safetensors").unlink()
    tower = {f"vision_model.{name}": tensor for name, tensor in load_file(vision / "model.safetensors").items()}
    torch.save({**tower, "vision_model.embeddings.position_ids": torch.arange(4)}, vision / "pytorch_model.bin")
    torch.save(load_file(vae / "diffusion_pytorch_model.safetensors"), vae / "diffusion_pytorch_model.bin")
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + n % 2}-of-00002.bin" for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        torch.save(
            {name: torch.nn.Parameter(tensors[name]) for name in tensors if files[name] == file}, language / file
        )
    (language / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert run(monkeypatch, source_folders, tmp_path / "again") == 0
    assert "model.safetensors is read; pytorch_model.bin is not" in caplog.text
    (vision / "model.safetensors").unlink()
    assert run(monkeypatch, source_folders, tmp_path / "tower") == 0
    torch.save(tensors, language / "pytorch_model.bin")  # read before the index, as in transformers
    for path in language.glob("pytorch_model-*"):
        path.unlink()
    assert run(monkeypatch, source_folders, tmp_path / "one") == 0
    expected = contents(folder.require_checkpoint(tmp_path / "base"))
    for name in ("again", "tower", "one"):
        found = contents(folder.require_checkpoint(tmp_path / name))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


class Attack:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch /tmp/ran_code_of_a_pickle",))


def weights_of(folders: dict[str, Path], content: object, **options: bool) -> None:
    (folders["language"] / "model.safetensors").unlink()
    torch.save(content, folders["language"] / "pytorch_model.bin", **options)


def harm_hostile(folders: dict[str, Path]) -> None:
    weights_of(folders, {"model.norm.weight": Attack()})


def harm_legacy(folders: dict[str, Path]) -> None:
    weights_of(folders, load_file(folders["language"] / "model.safetensors"), _use_new_zipfile_serialization=False)


def harm_nested(folders: dict[str, Path]) -> None:
    weights_of(folders, {"state_dict": load_file(folders["language"] / "model.safetensors")})


def harm_renamed(folders: dict[str, Path]) -> None:
    (folders["language"] / "model.safetensors").rename(folders["language"] / "pytorch_model.bin")


def harm_cut(folders: dict[str, Path]) -> None:
    weights_of(folders, load_file(folders["language"] / "model.safetensors"))
    path = folders["language"] / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])


def harm_pointer(folders: dict[str, Path]) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
    (folders["language"] / "model.safetensors").write_text(text)


def harm_pointer_bin(folders: dict[str, Path]) -> None:
    harm_pointer(folders)
    harm_renamed(folders)


def harm_other_format(folders: dict[str, Path]) -> None:
    (folders["language"] / "model.safetensors").rename(folders["language"] / "model.gguf")


def harm_unknown(folders: dict[str, Path]) -> None:
    path = folders["vision"] / "model.safetensors"
    save_file({**load_file(path), "head.adapter": torch.zeros(2)}, path)


def harm_shape(folders: dict[str, Path]) -> None:
    config = json.loads((folders["language"] / "config.json").read_text())
    (folders["language"] / "config.json").write_text(json.dumps({**config, "vocab_size": 149}))


def harm_quantised(folders: dict[str, Path]) -> None:
    path = folders["language"] / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"].to(torch.int8)}, path)


def harm_infinite(folders: dict[str, Path]) -> None:
    path = folders["vision"] / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.patch_embedding.bias"][3] = float("nan")
    save_file(weights, path)


def harm_truncated(folders: dict[str, Path]) -> None:
    path = folders["pixel_decoder"] / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def harm_tokenizer(folders: dict[str, Path]) -> None:
    (folders["language"] / "tokenizer.json").unlink()


def harm_processor(folders: dict[str, Path]) -> None:
    (folders["vision"] / "preprocessor_config.json").unlink()


def harm_family(folders: dict[str, Path]) -> None:
    config = json.loads((folders["language"] / "config.json").read_text())
    (folders["language"] / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))


def harm_json(folders: dict[str, Path]) -> None:
    (folders["pixel_decoder"] / "config.json").write_text("[1, 2")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (harm_hostile, "pytorch_model.bin was refused: it is damaged, or holds more than tensors"),
        (harm_legacy, "format of torch before 1.6"),
        (harm_nested, "not a dictionary of tensors"),
        (harm_renamed, "no file of torch.save"),
        (harm_cut, "pytorch_model.bin was refused"),
        (harm_pointer, "model.safetensors is a Git LFS pointer"),
        (harm_pointer_bin, "Git LFS pointer"),
        (harm_other_format, "it has model.gguf, which is not read"),
        (harm_unknown, "head.adapter"),
        (harm_shape, "[150, 16], the architecture says [149, 16]"),
        (harm_quantised, "model.safetensors: tensor model.norm.weight is torch.int8"),
        (harm_infinite, "vision/model.safetensors: tensor embeddings.patch_embedding.bias has numbers that are not"),
        (harm_truncated, "not a whole safetensors file"),
        (harm_tokenizer, "tokenizer.json"),
        (harm_processor, "preprocessor_config.json"),
        (harm_family, "mistral"),
        (harm_json, "cannot be read"),
    ],
)
def test_bad_source_is_named_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source_folders: dict[str, Path],
    tmp_path: Path,
    harm: object,
    message: str,
) -> None:
    harm(source_folders)  # type: ignore[operator]
    assert run(monkeypatch, source_folders, tmp_path / "base") == 2
    said = capsys.readouterr().err
    assert message.lower() in said.lower() and "Traceback" not in said
    assert not Path("/tmp/ran_code_of_a_pickle").exists()
    assert not list((tmp_path / "base").glob("*"))


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom ross_mcore.commands import convert\n"
        "try: convert.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--language-model" in done.stdout and "iter_0000000" in done.stdout


def test_model_config_survives(
    monkeypatch: pytest.MonkeyPatch, source_folders: dict[str, Path], tmp_path: Path, model_config: ModelConfig
) -> None:
    assert run(monkeypatch, source_folders, tmp_path / "base") == 0
    found = folder.require_checkpoint(tmp_path / "base").model_config()
    assert found.language == model_config.language and found.vision.image_tokens == model_config.vision.image_tokens
    assert found.pixel_decoder == model_config.pixel_decoder


def test_a_failed_conversion_leaves_the_run_it_would_have_replaced(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source_folders: dict[str, Path],
    tmp_path: Path,
    model_config: ModelConfig,
) -> None:
    root = tmp_path / "run"
    folder.begin(root, 7)
    folder.publish(root, 7, model_config, {"iteration": 7})
    (root / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    harm_quantised(source_folders)  # found when the tensor is read
    assert run(monkeypatch, source_folders, root, "--overwrite") == 2
    assert "torch.int8" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != folder.LOCK}
    assert after == before and [path.name for path in tmp_path.iterdir() if "run" in path.name] == ["run"]
    inside = {**source_folders, "language": Path(shutil.copytree(source_folders["language"], root / "language"))}
    assert run(monkeypatch, inside, root, "--overwrite") == 2
    assert "which would be moved" in capsys.readouterr().err


def test_a_folder_in_use_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    assert run(monkeypatch, source_folders, tmp_path / "base") == 0
    iteration = tmp_path / "base" / "iter_0000000"
    assert run(monkeypatch, source_folders, iteration, "--overwrite") == 2
    assert "is one checkpoint" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert run(monkeypatch, source_folders, tmp_path / "other", "--overwrite") == 2
    assert "is not empty (it has notes.txt)" in capsys.readouterr().err
