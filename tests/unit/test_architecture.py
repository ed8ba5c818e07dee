"""Rules of the architecture: who imports whom, which files are pure, who names the device, no effects of imports."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ross_mcore"
FILES = sorted(PACKAGE.rglob("*.py"))

ALLOWED = {
    "errors": set(),
    "launcher": set(),
    "environment": {"platform"},
    "arguments": {"launcher"},
    "architecture": {"checked", "library_configs"},
    "library_configs": {"checked"},
    "checked": set(),
    "batch": {"platform"},
    "options": {"checked"},
    "config": {"architecture", "checked", "costs", "options", "parallel"},
    "flags": {"arguments", "checked", "options", "config"},
    "flops": {"architecture"},
    "machines": set(),
    "costs": {"architecture", "flops", "machines"},
    "parts": {"architecture"},
    "shapes": set(),
    "platform": {"environment", "launcher"},
    "cpu_megatron": set(),
    "megatron_hook": {"platform", "cpu_megatron"},
    "parallel": {"parts", "architecture", "costs", "flops", "machines", "platform", "parallel"},
    "models": {
        *("parts", "shapes", "checked", "library_configs", "architecture"),
        *("batch", "costs", "platform", "parallel", "models"),
    },
    "data": {"checked", "library_configs", "architecture", "batch", "parallel", "data"},
    "shards": {
        *("parts", "checked", "architecture", "batch", "platform"),
        *("parallel", "models", "data", "checkpoint", "shards"),
    },
    "checkpoint": {
        *("parts", "shapes", "checked", "library_configs", "architecture"),
        *("platform", "parallel", "checkpoint"),
    },
    "conversion": {
        *("parts", "shapes", "checked", "library_configs", "architecture"),
        *("models", "data", "checkpoint", "conversion"),
    },
    "logs": {"checked"},
    "engine": {
        *("architecture", "parts", "batch", "checked", "options", "config", "platform"),
        *("parallel", "models", "data", "checkpoint", "engine"),
    },
    "guards": {
        *("checked", "config", "launcher", "logs", "options", "parts", "platform"),
        *("parallel", "data", "checkpoint", "engine", "guards"),
    },
    "reporting": {
        *("checked", "config", "costs", "logs", "machines", "options", "parts", "platform"),
        *("parallel", "data", "checkpoint", "engine", "guards", "reporting"),
    },
    "training": {
        *("launcher", "architecture", "parts", "batch", "checked", "options", "config", "logs", "platform"),
        *("costs", "machines", "parallel", "models", "data", "checkpoint", "engine", "guards", "reporting", "training"),
    },
    "run_report": {"__version__", "checked", "logs", "parts", "data", "checkpoint", "run_report"},
    "serving": {"checked", "logs", "data", "generation", "inference", "trained", "serving"},
    "chat": {"checked", "logs", "data", "shards", "generation", "trained", "chat"},
    "api": {"config", "flags", "training"},
    "commands": {
        *("arguments", "launcher"),
        *("architecture", "checkpoint", "checked", "commands", "config", "conversion", "data", "flags"),
        *("chat", "evaluation", "generation", "inference", "trained"),
        *("logs", "models", "options", "parallel", "parts", "platform", "reporting", "run_report"),
        *("serving", "shards", "training"),
        *("costs", "machines"),
    },
    "evaluation": {
        *("checked", "logs", "parallel", "data", "checkpoint", "shards", "inference", "generation", "trained"),
        "evaluation",
    },
    "__main__": {"__version__", "arguments", "commands"},
    "trained": {"checked", "architecture", "batch", "platform", "parallel", "models", "data", "checkpoint"},
    "generation": {"batch", "platform", "models", "data", "trained"},
    "inference": {"data", "models", "trained"},
}
"""Room or file of the package -> the rooms it may import, besides errors. Downward only."""

PURE = {
    "errors.py": set(),
    "launcher.py": set(),
    "environment.py": set(),
    "arguments.py": set(),
    "architecture.py": set(),
    "library_configs.py": set(),
    "options.py": set(),
    "config.py": set(),
    "flops.py": set(),
    "machines.py": set(),
    "costs.py": set(),
    "parts.py": set(),
    "shapes.py": set(),
    "batch.py": {"torch"},
    "parallel/layout.py": set(),
    "parallel/memory.py": set(),
    "parallel/schedule.py": set(),
    "parallel/timing.py": set(),
    "models/language_weights.py": set(),
    "models/image_tokens.py": {"torch"},
    "models/denoiser.py": {"torch"},
    "models/diffusion.py": {"torch"},
    "serving/protocol.py": set(),
    "serving/gate.py": set(),
    "serving/worker.py": set(),
    "data/typed_parts.py": set(),
    "data/order.py": {"numpy", "torch"},
    "data/replacement.py": {"numpy"},
    "data/mixture.py": {"numpy"},
    "data/packing.py": {"numpy"},
    "data/rows.py": {"numpy"},
    "evaluation/items.py": set(),
    "evaluation/answers.py": set(),
}
"""Files whose only imports are the standard library, the package, and these."""

LIGHT = ["inventory", "projector", "vision", "image_tokens", "denoiser", "diffusion", "pixel_decoder"]
"""Modules of `models` that load neither megatron nor Hugging Face code before something is built."""


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting; type-checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    rooms = {name.split(".")[1] for name in imports_of(path) if name.startswith("ross_mcore.")}
    allowed = ALLOWED[here] | {"errors"}
    assert rooms <= allowed, f"{path.name} imports {rooms - allowed}"


def test_the_data_room_knows_no_megatron() -> None:
    for path in (PACKAGE / "data").glob("*.py"):
        assert not any(name.startswith("megatron") for name in imports_of(path)), path


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_files_import_only_a_few_libraries(name: str) -> None:
    outside = {n.split(".")[0] for n in imports_of(PACKAGE / name)} - set(sys.stdlib_module_names) - {"ross_mcore"}
    assert outside <= PURE[name]


def test_only_platform_names_the_device() -> None:
    named = re.compile(r"torch\.cuda|['\"]cuda|\bnccl\b|\bgloo\b")
    for path in FILES:
        if path.name in ("platform.py", "cpu_megatron.py"):
            continue
        text = path.read_text(encoding="utf-8")
        if not named.search(text):
            continue
        code = ast.parse(text)
        for node in ast.walk(code):  # docstrings may mention gloo; code may not
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        for line in ast.unparse(code).splitlines():
            assert not named.search(line), f"{path}: {line.strip()}"


def test_only_groups_reads_parallel_state() -> None:
    for path in FILES:
        if path.name != "groups.py":
            assert not any("parallel_state" in name for name in imports_of(path)), path


def test_ignored_types_have_a_reason() -> None:
    ignored = re.compile(r"# type: ignore(?!\[[a-z-]+(, [a-z-]+)*\]  # \w)")
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not ignored.search(line), f"{path}:{number}: write `type: ignore[code]  # reason`"
