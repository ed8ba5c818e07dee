"""The command `ross` and the scripts that run the same modules."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ross_mcore.__main__ import main
from ross_mcore.commands import COMMANDS, as_started

ROOT = Path(__file__).parents[2]


def test_help_of_every_command_loads_no_library() -> None:
    code = (
        "import sys\nfrom ross_mcore.__main__ import main\n"
        f"for words in ([], *([name] for name in {list(COMMANDS)})):\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'rich', 'PIL', 'yaml'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\n") and done.stdout.count("usage: ") == 1 + len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_script_runs_the_module_of_its_command(name: str) -> None:
    module = importlib.import_module(f"ross_mcore.commands.{name.replace('-', '_')}")
    script = ROOT / COMMANDS[name].script
    assert script.name == module.SCRIPT
    assert f"from {module.__name__} import main" in script.read_text(encoding="utf-8")


def test_every_module_of_commands_is_a_command() -> None:
    modules = {path.stem for path in (ROOT / "ross_mcore" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}


def test_ross_names_its_own_commands() -> None:
    text = (
        "python tools/convert_hf_to_mcore.py --save base; torchrun --nproc-per-node 4 pretrain_ross.py --load base; "
        "see tools/check_checkpoint.py and pretrain_ross.py"
    )
    assert as_started(text, "pretrain_ross.py") == text
    assert as_started(text, "ross train") == (
        "ross convert --save base; torchrun --nproc-per-node 4 --no-python ross train --load base; "
        "see ross check and ross train"
    )


@pytest.mark.parametrize(
    ("words", "says"), [([], "required: COMMAND"), (["trane"], "trane is not a command; did you mean ross train?")]
)
def test_an_unknown_command_exits_with_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_errors_name_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ross check: ") and "ross convert" in said and "tools/" not in said
