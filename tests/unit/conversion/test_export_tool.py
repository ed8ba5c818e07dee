"""tools/convert_mcore_to_hf.py: its configuration files, its errors, and no files left after them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.commands import convert
from ross_mcore.commands import export as tool
from ross_mcore.conversion.assembly import import_ross
from ross_mcore.conversion.export import Export
from ross_mcore.conversion.export_config import refuse_other_tower
from ross_mcore.conversion.stream import TensorWriter
from ross_mcore.data.chat_templates import TurnTemplate
from ross_mcore.data.tokenizer import load_tokenizer
from tests.sources import SOURCES

SOURCE = SOURCES[0]


@pytest.fixture(scope="module")
def base(converted: Path) -> Path:
    return converted


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["convert_mcore_to_hf.py", *map(str, arguments)])
        return tool.main()

    return run


def rewritten(base: Path, root: Path, change: Callable[[dict[str, Tensor]], object], train_state: dict | None = None):
    """The checkpoint of `base` again under `root`, its tensors changed."""
    checkpoint = folder.require_checkpoint(base)
    stored = StoredTensors(checkpoint.path)
    tensors = {name: stored.read(name) for name in stored.names()}
    change(tensors)
    partial = folder.begin(root, 0)
    with TensorWriter(partial) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    folder.publish(root, 0, checkpoint.model_config(), train_state, assets=checkpoint.path)
    return root


def test_config_has_the_facts_of_the_run(base: Path, export: Callable[..., int], tmp_path: Path) -> None:
    state = {"training_stage": "pretrain", "image_aspect_ratio": "square", "seq_length": 123}
    moment = {"optimizer.state.exp_avg.vision_model.tower.post_layernorm.bias": torch.zeros(16)}
    run = rewritten(base, tmp_path / "run", lambda tensors: tensors.update(moment), state)
    assert export("--load", run, "--save", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tune_mm_mlp_adapter"] is config["unfreeze_mm_vision_tower"] is True
    assert config["image_aspect_ratio"] == "square" and config["tokenizer_model_max_length"] == 256
    assert config["mm_vision_tower"] == str(tmp_path / "out" / "siglip_vision_tower")
    assert (tmp_path / "out" / "siglip_vision_tower" / "preprocessor_config.json").is_file()


def drop_denoiser(tensors: dict[str, Tensor]) -> None:
    del tensors["denoiser.pos_embed"]


def add_unknown(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.surprise"] = torch.zeros(2)


def make_large(tensors: dict[str, Tensor]) -> None:
    tensors["pixel_decoder.autoencoder.decoder.conv_out.bias"] += 1e6


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (drop_denoiser, (), "asks for tensor denoiser.pos_embed, shape [1, 4, 32], which the checkpoint lacks"),
        (add_unknown, (), "has no place for tensor language_model.surprise"),
        (make_large, ("--dtype", "float16"), "decoder.conv_out.bias has 1e+06"),
        (None, ("--mm-vision-tower", "openai/clip-vit-large-patch14-336"), "looks at the name only"),
    ],
)
def test_model_that_cannot_be_exported_is_named_and_nothing_is_left(
    base: Path,
    export: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], None] | None,
    flags: tuple[str, ...],
    message: str,
) -> None:
    run = rewritten(base, tmp_path / "run", change) if change else base
    assert export("--load", run, "--save", tmp_path / "out", *flags) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir() if path.name != "run"] == []


def test_changes_that_the_reference_needs_are_printed(
    base: Path, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It chooses its class by the folder's name, and reads slow tokenizers only."""
    assert export("--load", base, "--save", tmp_path / "ross-qwen2-tiny") == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'ross-qwen2-tiny'}\n")
    shutil.copytree(SOURCE.tokenizer, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("merges.txt"))
    import_ross(tmp_path / "fast", base.parent / "source" / "ross", tmp_path / "tokenizer")
    assert export("--load", tmp_path / "fast", "--save", tmp_path / "model") == 0
    assert "rename model to one that has Qwen2 in it" in capsys.readouterr().out
    assert (tmp_path / "model" / "merges.txt").read_text() == (SOURCE.tokenizer / "merges.txt").read_text()
    written = Export(folder.require_checkpoint(base), load_tokenizer(SOURCE.tokenizer))
    written._add_reference_remarks(tmp_path / "qwen2", tmp_path / "tokenizer")
    (note,) = written.notes
    assert "put tokenizer.model of the original beside it, or its vocab.json and merges.txt" in note


def test_an_answer_end_that_is_no_token_is_printed(
    base: Path, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The configuration of generation has token ids only."""
    template = tmp_path / "own.yaml"
    template.write_text(TurnTemplate("{text} ", "= ", "The end.").as_text())
    flags = ("--load", base, "--save", tmp_path / "llava", "--format", "llava", "--template", template)
    assert export(*flags) == 0
    assert "answers end at 'The end.', which is no token" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_not_touched(
    base: Path, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert export("--load", base, "--save", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_files_of_a_killed_export_are_removed(base: Path, export: Callable[..., int], tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model-00009-of-00009.safetensors").write_bytes(b"half")
    assert export("--load", base, "--save", tmp_path / "out") == 0
    assert not left.exists() and [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]


def test_weights_have_the_file_mode_of_the_configuration(
    base: Path, export: Callable[..., int], tmp_path: Path
) -> None:
    assert export("--load", base, "--save", tmp_path / "out") == 0
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").glob("[cm]*.[js]*")}
    assert modes["model.safetensors"] == modes["config.json"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("google/siglip-so400m-patch14-384", "siglip_vision_model"),
        ("openai/CLIP-vit", "clip_vision_model"),
        ("/clip/siglip", "clip_vision_model"),
    ],
)
def test_the_reference_picks_a_tower_by_its_path(base: Path, path: str, kind: str) -> None:
    from dataclasses import replace

    vision = folder.require_checkpoint(base).model_config().vision
    for model_type in ("siglip_vision_model", "clip_vision_model"):
        tower = replace(vision, huggingface={**vision.huggingface, "model_type": model_type})
        if model_type == kind:
            refuse_other_tower(path, tower)
        else:
            with pytest.raises(ValueError, match=kind):
                refuse_other_tower(path, tower)


@pytest.mark.parametrize("text", ["0", "5 apples", "-1GB", ""])
def test_malformed_shard_size_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_arguments(["--load", "a", "--save", "b", f"--max-shard-size={text}"])
    assert "is not a size such as 5GB" in capsys.readouterr().err
    options = tool.parse_arguments(["--load", "a", "--save", "b", "--max-shard-size", "1.5GiB"])
    assert options.max_shard_size == 3 * 2**29 and tool.shard_bytes("5GB") == 5 * 10**9


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom ross_mcore.commands import export\n"
        "try: export.parse_arguments(['--help'])\nexcept SystemExit: pass\n"
    )
    command = [sys.executable, "-c", code + "assert 'torch' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--format stage1" in done.stdout and "Peak memory" in done.stdout


@pytest.fixture(scope="module")
def parts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` in Hugging Face's folders."""
    path = tmp_path_factory.mktemp("parts") / "parts"
    tool.export(tool.parse_arguments(["--load", str(base), "--save", str(path), "--format", "hf"]))
    return path


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["code", "other adapter", "not a dictionary", "not a file of torch", "other shape"])
def test_malformed_adapter_is_refused(
    kind: str,
    parts: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mm_projector.bin"
    contents, message = {
        "code": (Harmful(tmp_path / "ran"), "was refused"),
        "other adapter": ({"model.mm_inv_projector.net.pos_embed": torch.zeros(1, 4, 32)}, "is not known"),
        "not a dictionary": ([torch.zeros(1)], "not a dictionary of tensors"),
        "not a file of torch": (None, "was refused"),
        "other shape": ({"model.mm_projector.0.weight": torch.zeros(2, 2)}, "mm_projector"),
    }[kind]
    torch.save(contents, file) if contents is not None else file.write_bytes(b"x" * 100)
    flags = ["--language-model", parts / "language_model", "--vision-model", parts / "siglip_vision_tower"]
    flags += ["--mm-projector", file, "--save", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["convert_hf_to_mcore.py", *map(str, flags)])
    assert convert.main() == 2
    said = capsys.readouterr().err
    assert message in said and str(file) in said and "Traceback" not in said
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "out").glob("*"))


def test_prefixes_of_adapter_names_are_dropped(base: Path, tmp_path: Path) -> None:
    from ross_mcore.conversion.huggingface import AdapterFile

    names = ("model.mm_projector.0.weight", "base_model.model.model.mm_projector.2.bias", "mm_inv_projector.net.x")
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "adapter.bin")
    found = list(AdapterFile(tmp_path / "adapter.bin").names())
    assert found == ["model.mm_projector.0.weight", "model.mm_projector.2.bias", "model.mm_inv_projector.net.x"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either --ross-model"),
        (["--ross-model", "a", "--language-model", "b"], "give either --ross-model"),
        (["--language-model", "b"], "needs --vision-model"),
        (["--ross-model", "a", "--mm-projector", "p.bin"], "--mm-projector cannot be used with --ross-model"),
        (["--language-model", "b", "--vision-model", "c", "--mm-inv-projector", "d"], "needs --pixel-decoder"),
    ],
)
def test_import_flags_that_do_not_go_together(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert.parse_arguments([*flags, "--save", "s"])
    assert message in capsys.readouterr().err
