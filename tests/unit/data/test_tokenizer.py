"""Text from a tokenizer's folder in errors and logs cannot control a terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import TokenizerError

RED = "\x1b[31m"
TOKEN = {"content": "<x>", "__type": "AddedToken"}


@pytest.fixture
def folder(golden_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden_data / "tok_qwen2", tmp_path / "tokenizer"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_key_that_would_be_printed_is_refused(folder: Path, file: str) -> None:
    change(folder / file, extra_special_tokens=[{**TOKEN, RED: 1}])
    with pytest.raises(TokenizerError, match=rf"{folder} .*{file}: it has the key '\\x1b\[31m'; copy"):
        load_tokenizer(folder)


def test_a_value_is_quoted_without_control_characters(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder / "config.json", model_type=RED)
    load_tokenizer(folder)
    assert "?[31m" in caplog.text and RED not in caplog.text
