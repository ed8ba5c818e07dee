"""A trained model in one process, and questions about pictures as its prompts.

Legend: T tokens, D hidden size, H W pixels of the tower's input.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from PIL import Image
from torch import Tensor

from ross_mcore import platform
from ross_mcore.architecture import ModelConfig
from ross_mcore.batch import Batch, Sample, collate, segments
from ross_mcore.checked import shown
from ross_mcore.checkpoint.fit import architecture_of
from ross_mcore.checkpoint.folder import TRAIN_STATE, Checkpoint, require_checkpoint
from ross_mcore.checkpoint.sharded import load_model_weights
from ross_mcore.checkpoint.torch_dist import sharding_metadata
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, check_turns, expand_images, require_pictures
from ross_mcore.data.image import ImageAspectRatio, ImagePreprocessing, decode_image, rgb_picture
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import require_trainable, tokenize_prompt
from ross_mcore.data.tokenizer import load_tokenizer, require_ids, require_vocabulary
from ross_mcore.errors import CheckpointError, ConfigError, ConversationError, ImageError
from ross_mcore.models.cache import KeyValueCache
from ross_mcore.models.inventory import inventory
from ross_mcore.models.language import Execution
from ross_mcore.models.ross import RossModel, RossOptions
from ross_mcore.parallel import groups
from ross_mcore.parallel.layout import Placement, make_layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Picture: TypeAlias = Tensor | Image.Image | Path | str
"""A file, a PIL picture, or what `read_picture` returns: [3, H, W] in the tower's normalisation."""


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode on this process's device, with its tokenizer and image processor."""

    checkpoint: Checkpoint
    config: ModelConfig
    model: RossModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: dict[str, Any] | None
    spec: SampleSpec
    """Of the checkpoint's training, see `training_spec`. It is read once, because a live run may delete the files."""

    @property
    def template(self) -> str:
        """The conversation template of the checkpoint's training; `plain` for a converted model."""
        return self.spec.template

    def preprocessing(self, aspect_ratio: str | None = None) -> ImagePreprocessing:
        """Preprocessing of pictures, by default as in the checkpoint's training."""
        chosen = aspect_ratio or self.spec.image_aspect_ratio
        return ImagePreprocessing.for_tower(self.config.vision, chosen, self.image_processor)


def training_spec(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> SampleSpec:
    """The sample spec of a checkpoint's training; with several data sets, that of the first.

    A converted model has template `plain` and aspect ratio `square`. Raises CheckpointError for a damaged file.
    """
    file = checkpoint.path / TRAIN_STATE
    try:
        saved = SampleSpec.from_state({"template": "plain", **checkpoint.train_state()})
        template = saved.template.partition(",")[0]
        require_trainable(replace(saved, template=template), tokenizer)
        aspect_ratio = _first_of(saved.image_aspect_ratio, get_args(ImageAspectRatio))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: {error.args[0]}; copy the checkpoint again") from None
    return replace(saved, template=template, image_aspect_ratio=aspect_ratio)


def _first_of(values: str, known: Collection[str]) -> str:
    """The first of comma-separated values. Raises ValueError when it is not in `known`."""
    first = values.partition(",")[0]
    if first not in known:
        raise ValueError(f"{shown(values)} is not one of {', '.join(known)}")
    return first


def load_model(run: Path | str, dtype: torch.dtype | str = torch.float32, seed: int = 0) -> TrainedModel:
    """Loads the newest checkpoint of `run`, saved at any layout, to compute in `dtype`: float32 or bfloat16.

    `run` is the folder of a run, of a converted model, or of one checkpoint; `seed` is for `reconstruct`'s noise. Every
    process that torchrun started calls this, and has the whole model.
    Raises CheckpointError, ArchitectureError or TokenizerError naming the file, ConfigError for another dtype.
    """
    computed_in = DTYPES.get(str(dtype).removeprefix("torch."))
    if computed_in is None:
        raise ConfigError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    checkpoint = require_checkpoint(Path(run))
    config = architecture_of(checkpoint, inventory)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    require_vocabulary(tokenizer, config.language.vocab_size, str(checkpoint.tokenizer))
    spec, image_processor = training_spec(checkpoint, tokenizer), checkpoint.image_processor()
    platform.initialize_process_group(timeout_minutes=10)
    layout = make_layout(config, Placement(), world_size=torch.distributed.get_world_size())
    here = groups.initialize(layout, seed, timeout_minutes=10)
    model = RossModel(config, here, Execution(dtype=computed_in), here.stage.chunks[0], RossOptions(seed=seed))
    model.load_state_dict(load_model_weights(checkpoint, model.sharded_state_dict(metadata=sharding_metadata())))
    model.requires_grad_(False).eval()
    return TrainedModel(checkpoint, config, model, tokenizer, image_processor, spec)


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a turn of the human, and its pictures, in their order in the text.

    The conversation is a list of {"from": "human" | "gpt", "value": text}, the first of which may be from "system", or
    the text of a single turn. `<image>` in a text is the place of a picture; pictures without one come first.
    """

    conversations: list[dict[str, str]] | str
    pictures: Sequence[Picture] = ()


def read_picture(path: Path | str, preprocessing: ImagePreprocessing, truncated_images: str = "refuse") -> Tensor:
    """A picture file -> [3, H, W] in the tower's normalisation; `truncated_images` as in data/image.py:decode_image.

    Raises ImageError with the file's name, and OSError.
    """
    try:
        if Path(path).stat().st_size > MAX_IMAGE_BYTES:
            raise ImageError(f"larger than {MAX_IMAGE_BYTES >> 20} MiB")
        picture = decode_image(Path(path).read_bytes(), truncated_images).picture
    except ImageError as error:
        raise ImageError(f"{path}: {error}; give a whole picture of a format that docs/data.md lists") from None
    return torch.from_numpy(preprocessing(picture))


def require_model(trained: TrainedModel) -> None:
    if not isinstance(trained, TrainedModel):
        raise TypeError(f"the model is a {type(trained).__name__}, expected what load_model returns")


def turns_of(question: Question, name: str) -> list[dict[str, str]]:
    """The turns of a question. Raises ConversationError with the question's name."""
    if not isinstance(question, Question):
        raise TypeError(f"{name} is a {type(question).__name__}, expected a Question")
    if isinstance(question.pictures, (str, Path, Image.Image)):
        raise TypeError(f"{name}: pictures is one picture, expected a list of them")
    given = question.conversations
    turns = [{"from": "human", "value": given}] if isinstance(given, str) else given
    try:
        checked = check_turns(turns)
    except ConversationError as error:
        raise ConversationError(f"{name}: {error}") from None
    placed, pictures = sum(text.count(IMAGE_PLACEHOLDER) for _, text in checked), len(question.pictures)
    if placed > pictures:
        raise ConversationError(f"{name}: {placed} {IMAGE_PLACEHOLDER} in the text, {pictures} pictures")
    return turns


def prompt_of(trained: TrainedModel, question: Question, spec: SampleSpec, name: str = "question") -> Sample:
    turns, pixels = turns_of(question, name), pixels_of(question.pictures, trained, f"{name}.pictures")
    try:
        return row_of(turns, pixels, trained, spec, position=0)
    except ConversationError as error:
        raise ConversationError(f"{name}: {error}") from None


def pixels_of(pictures: Sequence[Picture], trained: TrainedModel, name: str, first: int = 0) -> list[Tensor]:
    """Pixels of pictures, numbered from `first` in errors. Raises ImageError, OSError, TypeError."""
    preprocessing, size = trained.preprocessing(), trained.config.vision.image_size
    truncated_images = trained.spec.truncated_images
    pixels = []
    for number, picture in enumerate(pictures, first):
        try:
            if isinstance(picture, Tensor):
                if picture.shape != (3, size, size) or not picture.is_floating_point():
                    raise ImageError(
                        f"{picture.dtype} of shape {tuple(picture.shape)}, expected floats of (3, {size}, {size}) as "
                        "read_picture returns; give a file or a PIL picture of any size instead"
                    )
                pixels.append(picture)
            elif isinstance(picture, Image.Image):
                pixels.append(torch.from_numpy(preprocessing(rgb_picture(picture))))
            elif isinstance(picture, (str, Path)):
                pixels.append(read_picture(picture, preprocessing, truncated_images))
            else:
                kind = type(picture).__name__
                raise TypeError(f"{name}[{number}] is a {kind}, expected a path, a PIL picture or a tensor")
        except ImageError as error:
            raise ImageError(f"{name}[{number}]: {error}") from None
    return pixels


def row_of(
    conversations: list[dict[str, str]],
    pictures: Sequence[Tensor],
    trained: TrainedModel,
    spec: SampleSpec,
    position: int,
) -> Sample:
    ids = tokenize_prompt(conversations, len(pictures), trained.tokenizer, spec)
    require_ids(ids, trained.config.language.vocab_size, trained.tokenizer)
    tokens, labels, starts = expand_images(ids, [-100] * len(ids), trained.config.vision.image_tokens)
    require_pictures(len(starts), len(pictures))
    pixels: list[Tensor | None] = list(pictures[: len(starts)])
    return Sample("", position, torch.from_numpy(tokens), torch.from_numpy(labels), starts, pixels)


def run(trained: TrainedModel, samples: list[Sample], cache: KeyValueCache | None = None) -> tuple[Batch, Tensor]:
    """Runs samples as one long row: the batch, and hidden states after the final norm [T, 1, D].

    Their keys and values go into `cache`, a row for each sample.
    """
    for sample in samples:
        sample.labels = torch.full_like(sample.tokens, -100)
    slots = [sample.tokens.numel() for sample in samples]
    batch = collate([samples], sum(slots), trained.config.vision.image_size).to(platform.device())
    return batch, trained.model(batch, segments([slots], sum(slots)), output="hidden", cache=cache)
