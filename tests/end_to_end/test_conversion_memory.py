"""Export and import of a model of a few hundred MB: memory stays near one shard."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ross_mcore.conversion.assembly import import_ross
from tests.sources import Source, write_source

ROOT = Path(__file__).parents[2]
MEASURE = """
import importlib, re, sys
from pathlib import Path
tool = importlib.import_module(f"ross_mcore.commands.{sys.argv[1]}")
import rich.progress, torch, transformers, diffusers.models.autoencoders.autoencoder_kl
import transformers.models.siglip.modeling_siglip, transformers.utils
transformers.utils.is_flash_attn_2_available()
from ross_mcore.conversion import assembly, export
from ross_mcore.data.tokenizer import load_tokenizer
load_tokenizer(Path(sys.argv[2]))
sys.argv = sys.argv[2:]
def peak():  # of this program alone; getrusage would count the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
assert tool.main() == 0
print("grew by", peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of a process")
def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """257 MB in shards of at most 64 MB, exported and imported, also from one pytorch_model.bin.

    Measured: export 75 MB, imports 74 and 75 MB (a vocabulary matrix of 33 MB and its padded copy).
    """
    big = Source("qwen2", "siglip", dtype=torch.bfloat16)
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    source = write_source(tmp_path / "source", big, shape, 16001)
    import_ross(tmp_path / "base", source, big.tokenizer)
    total = (source / "model.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "source")
    shard, family = 64 * 10**6, 16001 * 1024 * 2
    assert total > 250 * 10**6

    def growth(name: str, *arguments: object) -> int:
        command = [sys.executable, "-c", MEASURE, name, big.tokenizer, *arguments]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    out, back = tmp_path / "out", tmp_path / "back"
    exported = growth("export", "--load", tmp_path / "base", "--save", out, "--max-shard-size", "64MB")
    assert len(list(out.glob("model-*.safetensors"))) == 5
    imported = growth("convert", "--ross-model", out, "--save", back, "--dtype", "keep")
    tensors = {name: tensor for file in out.glob("model-*") for name, tensor in load_file(file).items()}
    torch.save(tensors, out / "pytorch_model.bin")
    for file in out.glob("model*"):
        file.unlink()
    pickled = growth("convert", "--ross-model", out, "--save", tmp_path / "again", "--dtype", "keep")
    print(f"{total / 1e6:.0f} MB: out {exported / 1e6:.0f}, in {imported / 1e6:.0f} and {pickled / 1e6:.0f} MB")
    assert shard / 2 < exported < shard + family
    assert family < imported < 3 * family
    assert family < pickled < 3 * family
