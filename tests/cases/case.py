"""A case: an input like one that people bring, the command that takes it, and what must come out.

Each file test_*.py of this folder has a table of cases of one kind; `run` runs a case. A case names its public source
where it has one.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ross_mcore.__main__ import main
from tests.distributed.harness import end_of_ranks
from tests.recorded import GOLDEN

TOKENIZER = GOLDEN / "data" / "tok_qwen2"
LLAMA_TOKENIZER = GOLDEN / "data" / "tok_llama_legacyF"
LLAMA3_TOKENIZER = GOLDEN / "data" / "tok_llama3"


@dataclass(frozen=True)
class Place:
    """Where a case makes its input: an empty `folder`. `base` is a converted Qwen2 checkpoint, only to be read."""

    folder: Path
    base: Path

    def write(self, name: str, content: Any) -> Path:
        """A file of bytes, text, or anything else as JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def picture(self, name: str = "images/a.jpg", form: str = "JPEG", size: tuple[int, int] = (40, 30)) -> Path:
        return self.write(name, picture_bytes(form, size))


def picture_bytes(form: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture with many colours."""
    levels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, form)
    return stream.getvalue()


def conversation(question: str = "<image>\nWhat is this?", answer: str = "A car.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@dataclass(frozen=True)
class Case:
    """`make` writes the input and returns the arguments of `command`, a subcommand of `ross`.

    The command must end with `status`, its output (stdout and stderr) must contain every text of `says` and none of
    `never`, nor a traceback; `holds` then looks at the files. `ranks`: number of processes.
    """

    name: str
    command: str
    make: Callable[[Place], Sequence[object]]
    status: int
    says: Sequence[str] = ()
    never: Sequence[str] = ()
    holds: Callable[[Place], None] | None = None
    ranks: int = 1
    source: str = ""

    def run(self, place: Place) -> None:
        arguments = [self.command, *map(str, self.make(place))]
        statuses = end_of_ranks(command_of_rank, self.ranks, arguments, place.folder)
        outputs = [(place.folder / f"output.{rank}").read_text() for rank in range(self.ranks)]
        output = "\n".join(outputs)
        assert statuses == [self.status] * self.ranks, f"exit status {statuses}\n{output}"
        for text in self.says:
            assert text in output, f"{text!r} is not in the output:\n{output}"
        for text in (*self.never, "Traceback"):
            assert text not in output, f"{text!r} is in the output:\n{output}"
        if self.holds is not None:
            self.holds(place)


def command_of_rank(arguments: list[str], folder: Path) -> None:
    """Runs `ross` with its output in a file of this rank."""
    output = os.open(folder / f"output.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ["COLUMNS"] = "200"
    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        raise SystemExit(status)
