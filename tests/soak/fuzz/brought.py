"""Valid files like those of other trainers: records of many forms, pictures of many formats, several kinds of tar."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[3]
TEMPLATE = """\
system: "<|im_start|>system\\n{text}<|im_end|>\\n"
user: "<|im_start|>user\\n{text}<|im_end|>\\n"
answer_start: "<|im_start|>assistant\\n"
answer_end: "<|im_end|>"
separator: "\\n"
"""
FORMATS = {"a.jpg": "JPEG", "b.gif": "GIF", "c.bmp": "BMP", "d.tiff": "TIFF", "e.webp": "WEBP", "f.avif": "AVIF"}


def make_brought(folder: Path) -> None:
    """Adds chat.yaml, forms.json, forms.parquet, pictures/ and editions/ to `folder`, in a process of its own.

    pyarrow starts threads, and the fuzzer forks its cases from a process of one thread.
    """
    subprocess.run([sys.executable, "-m", "tests.soak.fuzz.brought", folder], check=True, cwd=ROOT)


def _make(folder: Path) -> None:
    pictures = {name: picture_of(form, number) for number, (name, form) in enumerate(FORMATS.items())}
    (folder / "pictures").mkdir()
    for name, data in pictures.items():
        (folder / "pictures" / name).write_bytes(data)
    (folder / "chat.yaml").write_text(TEMPLATE)
    (folder / "forms.json").write_text(json.dumps(forms()))
    write_parquet(folder / "forms.parquet", pictures)
    (folder / "editions").mkdir()
    for number, members in enumerate(editions(pictures)):
        with tarfile.open(folder / "editions" / f"{number:05d}.tar", "w") as tar:
            for name, data in members:
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))


def forms() -> list[dict[str, Any]]:
    """Records of eight forms, of which docs/data.md says that they are read."""
    ask, say = "<image>What?", "A car."
    chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
    parts = [{"type": "image", "image": "c.bmp"}, {"type": "text", "text": "What?"}]
    share = [{"from": "user", "value": ask}, {"from": "assistant", "value": say}]
    return [
        {"id": "messages", "messages": [{"role": "system", "content": "Be short."}, *chat], "images": ["a.jpg"]},
        {"id": "parts", "messages": [{"role": "user", "content": parts}, chat[1]]},
        {"id": "names", "conversations": share, "image": ["b.gif"], "system": "Be short."},
        {"id": "text", "conversations": json.dumps(share), "images": "d.tiff"},
        {"id": "rounds", "query": ask, "response": say, "images": ["e.webp"], "history": [["Hi", "Hello"]]},
        {"id": "caption", "image": "f.avif", "caption": "A car."},
        {"id": "none", "image": [""], "conversations": [{"from": "human", "value": "Why?"}, share[1]]},
        {"id": "two", "image": ["a.jpg", "b.gif"], "conversations": [{"from": "human", "value": "Compare."}, share[1]]},
    ]


def write_parquet(path: Path, pictures: dict[str, bytes]) -> None:
    """Embedded pictures with conversations, and rows without a picture."""
    import pyarrow
    import pyarrow.parquet

    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A car."}]
    rows = [
        {"id": name, "image": {"bytes": data, "path": name} if number % 3 else None, "conversations": turns}
        for number, (name, data) in enumerate(pictures.items())
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def editions(pictures: dict[str, bytes]) -> list[list[tuple[str, bytes]]]:
    """Members of tars: role and content, names in the JSON, captions, several pictures, other suffixes."""
    chat = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A car."}]
    named = {"texts": chat, "media": "image", "name": ["0_a.jpg"]}
    two = [{"from": "human", "value": "Compare."}, {"from": "gpt", "value": "So."}]
    facts = {"caption": "a car", "status": "success", "width": 20, "url": "http://x/y.jpg"}
    members = [
        [("000.jpg", pictures["a.jpg"]), ("000.json", json.dumps(chat).encode())],
        [("image_0.0_a.jpg", pictures["a.jpg"]), ("image_0.json", json.dumps(named).encode())],
        [("001.jpg", pictures["a.jpg"]), ("001.txt", b"a car"), ("001.json", json.dumps(facts).encode())],
        [("x.gif", pictures["b.gif"]), ("x.json", json.dumps({"messages": chat}).encode())],
        [
            *(("y.0.bmp", pictures["c.bmp"]), ("y.1.tiff", pictures["d.tiff"])),
            ("y.json", json.dumps({"conversations": two}).encode()),
        ],
    ]
    return [[*first, *second] for first, second in zip(members, members[1:])]


def picture_of(form: str, number: int) -> bytes:
    """A small picture of many colours."""
    levels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, form)
    return stream.getvalue()


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
