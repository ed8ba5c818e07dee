"""ROSS -> checkpoint -> a model over several ranks -> checkpoint -> ROSS and Hugging Face folders, with equal bits.

Every family and tower, tied and not, with a vocabulary that needs padding, at every layout of the table. The processes
of a layout are started once and pass all sources through.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ross_mcore import platform
from ross_mcore.checkpoint.folder import require_checkpoint
from ross_mcore.checkpoint.safe_load import read_metadata
from ross_mcore.conversion.assembly import import_ross
from ross_mcore.conversion.export import Export, ExportOptions
from ross_mcore.data.tokenizer import load_tokenizer
from tests.distributed.harness import run_ranks
from tests.recorded import FAMILIES, GOLDEN, TOKENIZERS
from tests.sources import SOURCES, Source, write_source

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2xpp2": (2, 2)}
ROWS = [*SOURCES, Source("qwen2", "siglip", dtype=torch.bfloat16), *FAMILIES]


def name_of(row: Source | str) -> str:
    return row if isinstance(row, str) else f"{row.name}_{str(row.dtype).removeprefix('torch.')}"


def pass_through_model(root: str, names: list[str], layout_name: str) -> None:
    """On each rank: loads every base checkpoint into a model of this layout and saves it."""
    platform.initialize_process_group(1)
    from ross_mcore.checkpoint.sharded import load_model_weights, save_checkpoint
    from ross_mcore.checkpoint.torch_dist import sharding_metadata
    from ross_mcore.models.language import Execution
    from ross_mcore.models.ross import RossModel
    from ross_mcore.parallel import groups
    from ross_mcore.parallel.layout import Placement, make_layout

    tensor, pipeline = LAYOUTS[layout_name]
    for name in names:
        base = require_checkpoint(Path(root) / "base" / name)
        config = base.model_config()
        layout = make_layout(config, Placement(tensor, pipeline), world_size=tensor * pipeline)
        dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
        here = groups.initialize(layout, 1, 1)
        model = RossModel(config, here, Execution(dtype=dtype), here.stage.chunks[0])
        metadata = sharding_metadata()
        model.load_state_dict(load_model_weights(base, model.sharded_state_dict(metadata=metadata)))
        state = {"model": model.sharded_state_dict(metadata=metadata)}
        save_checkpoint(Path(root) / layout_name / name, 1, state, config, assets=base.path)
    groups.destroy()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(a root with `base/<name>`, a converted checkpoint per row; name -> its source folder)"""
    root = Path(tmp_path_factory.mktemp("round_trips"))
    folders = {}
    for row in ROWS:
        name = name_of(row)
        if isinstance(row, str):
            folder, tokenizer = GOLDEN / f"model_{row}" / "hf_checkpoint", GOLDEN / "data" / TOKENIZERS[row]
        else:
            folder, tokenizer = write_source(root / "source" / name, row), row.tokenizer
        import_ross(root / "base" / name, folder, tokenizer, base=GOLDEN if isinstance(row, str) else None)
        folders[name] = folder
    return root, folders


@pytest.fixture(scope="module", params=LAYOUTS)
def passed(request: pytest.FixtureRequest, sources: tuple[Path, dict[str, Path]]) -> str:
    """A layout, after every source has passed through it."""
    root, folders = sources
    tensor, pipeline = LAYOUTS[request.param]
    run_ranks(pass_through_model, tensor * pipeline, str(root), list(folders), request.param)
    return request.param


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", [name_of(row) for row in ROWS])
def test_round_trip(passed: str, name: str, sources: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    root, folders = sources
    checkpoint = require_checkpoint(root / passed / name)
    theirs = load_file(folders[name] / "model.safetensors")
    dtype = theirs["model.norm.weight"].dtype  # denoiser and VAE are float32 in all our models

    ross = tmp_path / "ross"
    paths = {"mm_vision_tower": f"{checkpoint.model_config().vision.model_type}", "mm_pixel_decoder": "vae"}
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    Export(checkpoint, tokenizer, ExportOptions(dtype, **paths)).write_ross(ross)
    assert_equal(load_file(ross / "model.safetensors"), theirs)

    parts = tmp_path / "parts"
    Export(checkpoint, tokenizer, ExportOptions(dtype)).write_parts(parts)
    within = ("model.embed", "model.layers", "model.norm", "lm_head")
    language = {name: tensor for name, tensor in theirs.items() if name.startswith(within)}
    assert_equal(load_file(parts / "language_model" / "model.safetensors"), language)
    for prefix, file in (
        ("model.vision_tower.vision_tower.", next(parts.glob("*_vision_tower")) / "model.safetensors"),
        ("model.pixel_decoder.pixel_decoder.", parts / "pixel_decoder" / "diffusion_pytorch_model.safetensors"),
    ):
        start = len(prefix)
        assert_equal(load_file(file), {name[start:]: t for name, t in theirs.items() if name.startswith(prefix)})


def test_ranks_really_held_shards(passed: str, sources: tuple[Path, dict[str, Path]]) -> None:
    """A tensor-parallel matrix is saved in one piece per rank (fc1 in two: gate and up)."""
    root, folders = sources
    tensor, _ = LAYOUTS[passed]
    for name in folders:
        items = read_metadata(require_checkpoint(root / passed / name).path).state_dict_metadata
        assert len(items["language_model.decoder.layers.0.self_attention.linear_qkv.weight"].chunks) == tensor
        assert len(items["language_model.embedding.word_embeddings.weight"].chunks) == tensor
        assert len(items["language_model.decoder.layers.1.mlp.linear_fc1.weight"].chunks) >= tensor
