"""A loaded model as the server uses it: pictures from bytes, answers as they come, reconstructions as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ross_mcore.data.image import decode_image
from ross_mcore.errors import ConversationError, ImageError
from ross_mcore.generation import Generated, Sampling, prompt_spec, stream
from ross_mcore.inference import as_picture, reconstruct_steps
from ross_mcore.serving.protocol import ApiError, Chat, Reconstruct
from ross_mcore.trained import Question, TrainedModel

DIFFERENCE_SCALE = 3
"""The picture of differences is brightened by this, because small ones are black to the eye."""


class ServedModel:
    """A trained model under the name that requests give."""

    def __init__(self, name: str, trained: TrainedModel, template: str | None = None) -> None:
        """Raises TokenizerError for a template that is unknown or does not fit."""
        self.name, self.trained = name, replace(trained, spec=prompt_spec(trained, template))
        self._preprocessing, self._truncated = self.trained.preprocessing(), self.trained.spec.truncated_images
        self.description: dict[str, Any] = {
            "name": name,
            "iteration": trained.checkpoint.iteration,
            "template": self.trained.template,
            "reconstructs": trained.config.denoiser is not None,
            "created": int(trained.checkpoint.path.stat().st_mtime),
        }
        """What the page shows of the model."""

    def pixels(self, data: bytes, param: str) -> Tensor:
        """The bytes of a picture file -> the tower's input [3, H, W], on the CPU. Raises ApiError."""
        try:
            return torch.from_numpy(self._preprocessing(decode_image(data, self._truncated).picture))
        except ImageError as error:
            raise ApiError(f"{param}: {error}; send a whole PNG, JPEG or WebP", param=param) from None

    def answer(self, chat: Chat, pixels: Sequence[Tensor]) -> Generator[str, None, Generated]:
        """Yields pieces of the answer. Raises UserError at once for a conversation that the model cannot take."""
        if not pixels and self.trained.template == "plain":
            raise ConversationError("the template plain has a picture in every prompt; send one with the question")
        sampling = Sampling(chat.max_new_tokens, chat.temperature, chat.top_p, chat.seed, chat.stop)
        return stream(self.trained, Question(chat.turns, pixels), sampling)

    def reconstruct(self, asked: Reconstruct, pixels: Tensor) -> Generator[Any, None, dict[str, Any]]:
        """Yields in every step; returns the pictures as data: URLs, and the peak signal-to-noise ratio in dB.

        Raises UserError.
        """
        originals, found = yield from reconstruct_steps(
            self.trained, [pixels], steps=asked.steps, seed=asked.seed, start_timestep=asked.start_timestep
        )
        original, image = originals[0].clamp(0, 1), found[0]
        difference = (original - image).abs()
        error = float(difference.square().mean())
        return {
            "model": self.name,
            "original": _data_url(original),
            "reconstruction": _data_url(image),
            "difference": _data_url(difference * DIFFERENCE_SCALE),
            "difference_scale": DIFFERENCE_SCALE,
            "psnr": -10 * math.log10(error) if error else None,
        }


def _data_url(image: Tensor) -> str:
    """[3, H, W] in [0, 1] -> a PNG in a data: URL."""
    file = io.BytesIO()
    as_picture(image).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
