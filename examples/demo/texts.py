"""Text about scenes, without pictures, to train the demo's tokenizer and language model.

The two layouts are those of training: a caption that ends its line (template ``plain``) and a chat (template
``qwen_2``). In place of an image, this text has a list of the contents of each patch, or the caption.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scenes import NOTHING, Scene, sample_chat, sample_scene, write_caption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
PATCHES_PER_SIDE = 4


def list_patches(scene: Scene) -> str:
    """Spell a picture's patches row by row, one word each, as a stand-in for its image tokens.

    A patch of an occupied quadrant gives the colour or the shape, in turn; a patch of an empty one ``nothing``.
    """
    words = []
    for row in range(PATCHES_PER_SIDE):
        for column in range(PATCHES_PER_SIDE):
            quadrant = row // 2 * 2 + column // 2
            seen = (scene.colour, scene.shape)[column % 2]
            words.append(seen if quadrant in scene.quadrants else NOTHING)
    return " " + " ".join(words)


def format_caption(caption: str, picture: str = "") -> tuple[str, ...]:
    """Lay out a caption as template ``plain`` does, after ``picture`` in the place of the image."""
    return picture, f"{caption}\n"


def format_chat(rounds: Sequence[tuple[str, str]], picture: str) -> tuple[str, ...]:
    """Lay out a chat as template ``qwen_2`` does, with ``picture`` in the place of the image."""
    turns = [f"{question} ASSISTANT: {answer}{END_OF_TURN}" for question, answer in rounds]
    return f"{SYSTEM} USER: ", picture, "\n" + "USER: ".join(turns)


def sample_text(rng: random.Random) -> tuple[str, ...]:
    """Draw a caption or a chat about a scene that has one of the training pairs.

    The text comes in pieces that are tokenised one by one, because training cuts its text at the image.
    """
    scene = sample_scene(rng)
    if rng.random() < 0.5:
        return format_caption(write_caption(scene), rng.choice(("", list_patches(scene))))
    return format_chat(sample_chat(scene, rng), rng.choice((list_patches(scene), write_caption(scene))))


def tokenize_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[int]:
    """Tokenise the pieces of a text one by one and join their tokens."""
    return [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
