"""Real pictures with captions: the photographs and drawings of Tux Paint, as training data in the LLaVA layout.

Debian's package tuxpaint-stamps-default holds some 800 small pictures, most with a sentence about them in a text file.
`fetch_stamps` downloads and unpacks it (161 MB, no root needed), `select_stamps` takes pictures with a short caption
that no other picture has, and `write_dataset` draws them on white ground and writes one JSON of captions
(--training-stage pretrain) and one of chats (finetune).

The pictures are under the GPL, version 2: this repository holds none of them and nothing made from them.

    python examples/stamps/stamps.py --out runs/stamps/data --cache runs/stamps/cache
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ross_mcore.errors import UserError

PACKAGE = "tuxpaint-stamps-default"
INSIDE_PACKAGE = Path("usr/share/tuxpaint/stamps")
PICTURE_PIXELS = 64
CAPTION_CHARACTERS = (5, 45)
"""Shortest and longest caption: the package has sentences of one word and paragraphs of two hundred characters."""
LEFT_OUT_FOLDERS = ("symbols",)
QUESTION = "What is in the picture?"


class StampsError(UserError, RuntimeError):
    """The pictures cannot be fetched or used; the message gives the remedy."""


@dataclass(frozen=True)
class Stamp:
    """One picture: `path` below the stamps' folder, with forward slashes, and its caption."""

    path: str
    caption: str

    @property
    def image(self) -> str:
        """Name of the drawn picture."""
        return self.path.removesuffix(".png").replace("/", "-") + ".png"


def fetch_stamps(cache: Path) -> Path:
    """Folder of the pictures, downloaded and unpacked below `cache` unless it exists.

    Raises StampsError with the remedy if apt or dpkg-deb is missing or fails.
    """
    unpacked = cache / "unpacked"
    if unpacked.is_dir():
        return unpacked / INSIDE_PACKAGE
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{PACKAGE}_*.deb")):
        print(f"downloading Debian's {PACKAGE}, 161 MB; the pictures are under the GPL, version 2", flush=True)
        _run(["apt-get", "download", PACKAGE], cache)
    partial = cache / "unpacked.partial"
    shutil.rmtree(partial, ignore_errors=True)
    print("unpacking", flush=True)
    _run(["dpkg-deb", "-x", str(max(cache.glob(f"{PACKAGE}_*.deb")).resolve()), str(partial.resolve())], cache)
    partial.rename(unpacked)
    return unpacked / INSIDE_PACKAGE


def _run(command: Sequence[str], folder: Path) -> None:
    """Runs a command in `folder` and shows its output; its errors become part of a StampsError."""
    remedy = (
        f"On Debian or Ubuntu run `apt-get update` and try again. Elsewhere take the package from "
        f"https://packages.debian.org/{PACKAGE} or from tuxpaint.org, unpack it, and give its stamps folder, "
        f"{INSIDE_PACKAGE}, with --stamps-dir DIR"
    )
    try:
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        raise StampsError(f"this machine has no {command[0]}, which fetches the pictures. {remedy}") from None
    if done.returncode:
        reason = done.stderr.strip() or f"status {done.returncode}"
        raise StampsError(f"`{' '.join(command)}` failed: {reason}. {remedy}")


def find_stamps(folder: Path) -> list[Stamp]:
    """Every picture with a caption, the first line of its text file, in the order of their paths.

    Leaves out symbols and the mirrored and flipped copies. Raises StampsError when there is none.
    """
    found = []
    for picture in sorted(folder.rglob("*.png")):
        path, text = picture.relative_to(folder), picture.with_suffix(".txt")
        if path.parts[0] in LEFT_OUT_FOLDERS or "_mirror" in picture.name or "_flip" in picture.name:
            continue
        if text.is_file():
            lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
            found.append(Stamp(path.as_posix(), lines[0].strip() if lines else ""))
    if not found:
        raise StampsError(
            f"{folder} holds no pictures with captions (*.png with a *.txt of that name); give with --stamps-dir "
            f"the folder that is {INSIDE_PACKAGE} in the package"
        )
    return found


def select_stamps(stamps: Sequence[Stamp], count: int) -> list[Stamp]:
    """`count` stamps with a unique caption of suitable length, in the order of their paths.

    The selection depends only on digests of the paths, so that one more picture in the package changes only one of
    them. Raises StampsError if there are not enough.
    """
    times = Counter(stamp.caption for stamp in stamps)
    shortest, longest = CAPTION_CHARACTERS
    fit = [s for s in stamps if times[s.caption] == 1 and shortest <= len(s.caption) <= longest]
    if len(fit) < count:
        raise StampsError(
            f"{len(fit)} of {len(stamps)} pictures have a caption of their own of {shortest} to {longest} characters; "
            f"{count} are needed"
        )
    chosen = sorted(fit, key=lambda stamp: hashlib.sha256(stamp.path.encode("utf-8")).digest())[:count]
    return sorted(chosen, key=lambda stamp: stamp.path)


def draw_stamp(path: Path) -> Image.Image:
    """The picture, shrunk to fit and centred on a white square of PICTURE_PIXELS."""
    with Image.open(path) as source:
        picture = source.convert("RGBA")
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)
    ground = Image.new("RGBA", (PICTURE_PIXELS, PICTURE_PIXELS), "white")
    ground.alpha_composite(picture, ((PICTURE_PIXELS - picture.width) // 2, (PICTURE_PIXELS - picture.height) // 2))
    return ground.convert("RGB")


def make_records(stamps: Sequence[Stamp]) -> dict[str, list[dict[str, Any]]]:
    """Training stage -> LLaVA records: the caption alone for `pretrain`, as the answer to a question for `finetune`."""
    prompts = {"pretrain": "<image>", "finetune": f"<image>\n{QUESTION}"}
    return {
        stage: [
            {
                "id": stamp.image.removesuffix(".png"),
                "image": stamp.image,
                "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": stamp.caption}],
            }
            for stamp in stamps
        ]
        for stage, prompt in prompts.items()
    }


def write_dataset(stamps_folder: Path, out: Path, count: int) -> list[Stamp]:
    """Writes images/*.png, pretrain.json and finetune.json below `out`, and returns their stamps."""
    from rich.progress import track

    chosen = select_stamps(find_stamps(stamps_folder), count)
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for stamp in track(chosen, description="pictures"):
        draw_stamp(stamps_folder / stamp.path).save(images / stamp.image)
    for stage, records in make_records(chosen).items():
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        (out / f"{stage}.json").write_text(text, encoding="utf-8")
    return chosen


def read_captions(data: Path) -> dict[str, str]:
    """Picture's name -> its caption, in a folder written by `write_dataset`."""
    records = json.loads((data / "finetune.json").read_text(encoding="utf-8"))
    return {record["image"]: record["conversations"][1]["value"] for record in records}


def main() -> int:
    """Write the data set from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and JSON")
    parser.add_argument("--cache", type=Path, default=Path("runs/stamps/cache"), help="the package [%(default)s]")
    parser.add_argument("--stamps-dir", type=Path, metavar="DIR", help="the unpacked stamps, instead of fetching them")
    parser.add_argument("--count", type=int, default=150, metavar="N", help="pictures [%(default)s]")
    options = parser.parse_args()
    try:
        folder = options.stamps_dir or fetch_stamps(options.cache)
        chosen = write_dataset(folder, options.out, options.count)
    except UserError as error:
        parser.exit(1, f"stamps: {error}\n")
    print(f"{options.out}: {len(chosen)} pictures with captions of their own")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
