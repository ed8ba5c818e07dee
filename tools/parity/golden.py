"""A folder of recorded values of the reference. Its contents are discovered: no names of models, shapes or seeds here.

```
components/<tower or VAE>/                      Hugging Face and diffusers folders
diffusion_schedule.safetensors  diffusion_toy.safetensors
denoiser_*.safetensors  vae_target_*.safetensors
model_*/                                        hf_checkpoint/, oracle.{json,safetensors}, train20.safetensors, ...
data/                                           conversations, tokenizers, images, sampler, schedule, optimizer groups
```
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parity.rows import Row, not_recorded
from ross_mcore import checked
from ross_mcore.data.image import decode_image
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES
from ross_mcore.errors import ArchitectureError, ConversationError, ImageError, UserError

Tensors = dict[str, Tensor]
REMEDY = "record it again, or copy the folder again"


MOST_NAMED = 6


class GoldenError(UserError, ValueError):
    """A folder without usable recorded values; the message names the file."""


class NotRecorded(Exception):
    """A value that the folder lacks; the message names file and key. `where_recorded` turns it into a row."""


def where_recorded(family: str, name: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; rows after a missing value are replaced by one `not recorded` row."""
    try:
        yield from rows
    except NotRecorded as missing:
        yield not_recorded(family, name, str(missing))


def usable(golden: Golden, family: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows. Errors caused by values of an unexpected type or shape become a GoldenError."""
    golden.read = {}
    try:
        yield from rows
    except Exception as error:  # the folder is not validated first, so its values can cause any error
        may_name_no_file = isinstance(error, (ArchitectureError, ConversationError, ImageError))
        names_no_file = may_name_no_file and str(golden.folder) not in str(error)
        if isinstance(error, UserError) and not names_no_file:
            raise
        files = ", ".join(str(golden.folder / name) for name in list(golden.read)[-MOST_NAMED:])
        why = checked.reason(error) if isinstance(error, (ValueError, RuntimeError)) else "it is damaged"
        raise GoldenError(
            f"the recorded values of {family} cannot be compared: {why}; record them again, or copy them again: {files}"
        ) from error


class _Recorded(dict[str, Any]):
    """Contents of a file. A missing key raises NotRecorded."""

    def __init__(self, values: Any, file: str) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise NotRecorded(f"{self.file} records no {key}")


class Golden:
    """Reads files of the folder. Raises GoldenError naming a damaged file, NotRecorded for a missing one."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.read: dict[str, None] = {}
        """Names of the files read so far, in order."""
        if not any(self.folder.glob("*.safetensors")) and not self.models:
            raise GoldenError(
                f"{self.folder} holds no recorded values: no model_*/ and no *.safetensors; give another folder"
            )

    def tensors(self, name: str) -> tuple[Tensors, dict[str, str]]:
        """(tensors, metadata); tensors stored in float16 without loss are returned as float32."""
        self.read[name] = None
        try:
            checked.require_regular(self.folder / name)
            with safe_open(self.folder / name, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except FileNotFoundError:
            raise NotRecorded(f"there is no {name}") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise GoldenError(f"{self.folder / name} cannot be read: {checked.reason(error)}; {REMEDY}") from None
        tensors = {key: value.float() if value.dtype == torch.float16 else value for key, value in found.items()}
        return _Recorded(tensors, name), _Recorded(metadata, name)

    def json(self, name: str, kind: type = dict) -> Any:
        """The contents. Raises GoldenError unless they are of that kind."""
        self.read[name] = None
        try:
            contents = checked.read_json(self.folder / name, as_mapping=partial(_Recorded, file=name))
        except FileNotFoundError:
            raise NotRecorded(f"there is no {name}") from None
        except ValueError as error:
            raise GoldenError(f"{self.folder / name} cannot be read: {checked.reason(error)}; {REMEDY}") from None
        if not isinstance(contents, kind):
            raise GoldenError(
                f"{self.folder / name} holds {checked.shown(contents)}, expected a "
                f"{'mapping' if kind is dict else kind.__name__}"
            )
        return contents

    def picture(self, name: str) -> Image.Image:
        """The picture, with any suffix. Raises GoldenError, NotRecorded."""
        names = self.names(f"data/images/{name}.*")
        if not names:
            raise NotRecorded(f"data/images has no picture {name}")
        path = self.folder / names[0]
        try:
            checked.require_regular(path, MAX_IMAGE_BYTES)
            return decode_image(path.read_bytes()).picture
        except (OSError, ValueError) as error:
            raise GoldenError(f"{path} cannot be read: {checked.reason(error)}; {REMEDY}") from None

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def names(self, pattern: str) -> list[str]:
        """Matching paths in the folder, relative to it."""
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))

    @property
    def models(self) -> list[str]:
        return [name for name in self.names("model_*") if self.has(f"{name}/hf_checkpoint/config.json")]

    @cached_property
    def autoencoder(self) -> str:
        """The folder of the VAE."""
        for name in self.names("components/*"):
            config = self.json(f"{name}/config.json") if self.has(f"{name}/config.json") else {}
            if config.get("_class_name") == "AutoencoderKL":
                return name
        raise NotRecorded("components/ holds no AutoencoderKL")

    def tokenizer_folder(self, name: str) -> Path:
        """The tokenizer that a recorded case calls `name`: data/tok_<name>, or the only one with this prefix."""
        folders = [self.folder / path for path in self.names("data/tok_*")]
        exact = [folder for folder in folders if folder.name == f"tok_{name}"]
        found = exact or [folder for folder in folders if folder.name.startswith(f"tok_{name}")]
        if len(found) != 1:
            raise NotRecorded(f"data/ has no single folder tok_{name}*, for the tokenizer {name!r}")
        return found[0]

    def processors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, preprocessor_config.json) of every recorded image processor."""
        for path in self.names("data/proc_*"):
            yield path.rpartition("proc_")[2], self.json(f"{path}/preprocessor_config.json")
