"""A plain Python session that trains, loads, asks and trains again, without torchrun and without a setup call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.conftest import write_shards
from tests.recorded import GOLDEN, recorded_checkpoint

SESSION = """
import ross_mcore

asked = [ross_mcore.Question("<image>\\nWhat is it?", [{picture!r}])]
base = ross_mcore.load_model({base!r})
before = ross_mcore.answer(base, asked, "qwen_2")

options = dict(load={base!r}, data_path={shards!r}, save="run", training_stage="finetune", num_workers=0)
ross_mcore.train(ross_mcore.Config.from_flat(**options, train_iters=2))
assert ross_mcore.answer(base, asked, "qwen_2") == before, "a model outlives a training"

trained = ross_mcore.load_model("run")
assert trained.checkpoint.iteration == 2 and trained.template == "qwen_2"
ross_mcore.answer(trained, asked)
try:
    ross_mcore.train(ross_mcore.Config.from_flat(**options, train_iters=3, seed=7))
except ross_mcore.UserError as error:
    assert "seed" in str(error)
else:
    raise AssertionError("another seed was accepted")
ross_mcore.train(ross_mcore.Config.from_flat(**options, train_iters=3))
assert ross_mcore.load_model("run").checkpoint.iteration == 3
assert ross_mcore.answer(base, asked, "qwen_2") == before
"""


def test_a_session_trains_and_asks(tmp_path: Path) -> None:
    recorded_checkpoint("qwen2_siglip", tmp_path / "base")
    write_shards(tmp_path / "shards", "mixed")
    code = SESSION.format(
        picture=str(GOLDEN / "data" / "images" / "img0.png"),
        base=str(tmp_path / "base"),
        shards=str(tmp_path / "shards"),
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
