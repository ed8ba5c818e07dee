"""Templates: conversations -> text -> token ids and labels, as in the reference.

Reference: conversation.py:264-520 and train.py:620-893; tests compare every token with recorded values. The reference
has no system turns; here one replaces the template's own system text.
Legend: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import (
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_INDEX,
    as_dialogue,
    cut_row,
    encode_text,
    expand_images,
)
from ross_mcore.data.labels import Prompt, mask_byte_pairs, mask_caption, mask_headers, mask_sentencepiece
from ross_mcore.data.spec import UNCUT, SampleSpec
from ross_mcore.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_PLACEHOLDER_IN_TEXT = "<im_start><image><im_end>"
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWER_START = " ASSISTANT: "
END_OF_TURN = "<|eot_id|>"
HEADERS = {
    "system": f"<|start_header_id|>system<|end_header_id|>\n\n{{text}}{END_OF_TURN}",
    "human": "<|start_header_id|>user<|end_header_id|>\n\n",
    "gpt": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}

Turn = tuple[str, str | None]
"""(role, text) of a turn; the text is None for an answer to be generated."""


@dataclass(frozen=True)
class Tokenized:
    """input_ids [L] with one IMAGE_TOKEN_INDEX per image, labels [L], not shifted.

    `mismatch`: the answers could not be located among the tokens, so every label is IGNORE_INDEX; `text_tokens`: number
    of ids without images, before any cut.
    """

    input_ids: list[int]
    labels: list[int]
    mismatch: bool
    text_tokens: int

    @property
    def image_spans(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)

    @property
    def label_tokens(self) -> int:
        """Number of labels in a loss: not of the first token, which nothing predicts, nor of images."""
        return sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in self.labels[1:])


@dataclass(frozen=True)
class Template:
    """How turns become text and labels.

    `system` opens the prompt; `system_form` is how a conversation's own system text is written in its place, "" if it
    is left out. `answer_start` precedes and `round_end` follows every answer. `write` returns the text of the turns,
    `mask` the labels and whether they are a mismatch. If not `tokenized`, `round_end` is removed from the text before
    it is tokenized.
    """

    system: str
    system_form: str
    answer_start: str
    round_end: str
    write: Callable[[list[Turn], Template], str]
    mask: Callable[[Prompt], tuple[list[int], bool]]
    tokenized: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """What separates turns, so that a turn that contains it cannot be told from several."""
        return tuple(word for word in (self.answer_start, self.round_end) if word.strip())

    def opening(self, system: str | None) -> str:
        """The text before the first turn; a blank `system` leaves out the template's own."""
        if system is None:
            return self.system
        return self.system_form.replace("{text}", system) if system.strip() else ""


def _write_caption(turns: list[Turn], style: Template) -> str:
    """The instruction's pictures without its text, then the caption, which may show pictures too.

    A prompt for generation always shows at least one picture.
    """
    pictures = IMAGE_PLACEHOLDER * (turns[0][1] or "").count(IMAGE_PLACEHOLDER)
    if turns[-1][1] is None:
        return pictures or IMAGE_PLACEHOLDER
    if [role for role, _ in turns] != ["human", "gpt"]:
        raise ConversationError("plain takes two turns, an instruction and a caption")
    return f"{pictures}{turns[1][1]}{style.round_end}"


def _write_dialogue(turns: list[Turn], style: Template) -> str:
    """`USER: q ASSISTANT: a<round_end>USER: ...`; a turn without text is its role and a colon."""
    ends = {"human": " ", "gpt": style.round_end}
    return "".join(
        f"{ROLES[role]}: {text}{ends[role]}" if text else f"{ROLES[role]}:" for role, text in _alternating(turns)
    )


def _write_headers(turns: list[Turn], style: Template) -> str:
    """A header, the text and `<|eot_id|>` for every turn; an answer to be generated is its header alone."""
    ends = {"human": END_OF_TURN, "gpt": END_OF_TURN + style.round_end}
    return "".join(
        HEADERS[role] if text is None else f"{HEADERS[role]}{text}{ends[role]}" for role, text in _alternating(turns)
    )


def _alternating(turns: list[Turn]) -> list[Turn]:
    """The turns. Raises ConversationError unless human and gpt alternate."""
    if any(role != ("human", "gpt")[place % 2] for place, (role, _) in enumerate(turns)):
        raise ConversationError("the turns do not alternate between human and gpt")
    return turns


def _system(human: str) -> str:
    return (
        f"A chat between a curious {human} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
    )


TEMPLATES = {
    "plain": Template("", "", "", "\n", _write_caption, mask_caption),
    "qwen_2": Template(_system("human"), "{text} ", ANSWER_START, "<|im_end|>", _write_dialogue, mask_byte_pairs),
    "v1": Template(_system("user"), "{text} ", ANSWER_START, "</s>", _write_dialogue, mask_sentencepiece),
    "llama3": Template(
        "", HEADERS["system"], HEADERS["gpt"], "<|eot_conversation|>", _write_headers, mask_headers, tokenized=False
    ),
    "v1_qwen2": Template(_system("human"), "{text} ", ANSWER_START, "<|im_end|>", _write_dialogue, mask_sentencepiece),
}
"""Reference conversation.py:264-520 and the dispatch of train.py:881-893."""

TRAINING_TEMPLATES = tuple(name for name in TEMPLATES if name != "v1_qwen2")
"""Templates for training. v1_qwen2 has no labels for more than one round, and the prompts of qwen_2."""


def tokenize_conversation(
    conversations: Any,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    spec: SampleSpec,
) -> Tokenized:
    """Ids and labels of a LLaVA conversation, a list of {"from": "human" | "gpt", "value": text}.

    A first turn may be from "system"; `plain` leaves it out, because it writes no more than pictures and caption.

    `<image>` is a picture if `num_images` is positive. As in the reference, only rows without a picture are cut to
    `spec.seq_length` here.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[spec.template]
    text = write_prompt(conversations, num_images, spec)
    shows_image = _shows_image(text, num_images, spec.template)
    ids = encode_text(text if style.tokenized else text.replace(style.round_end, ""), shows_image, tokenizer)
    text_tokens = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
    if not shows_image:
        ids = ids[: spec.seq_length]
    prompt = Prompt(text, ids, num_images, tokenizer, style.answer_start, style.round_end, spec)
    labels, mismatch = style.mask(prompt)
    return Tokenized(ids, labels, mismatch, text_tokens)


def why_without_labels(
    conversations: Any,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    spec: SampleSpec,
    image_tokens: int = 0,
) -> str | None:
    """Why a conversation has no label, as a short reason for counting; None if it has labels.

    To be asked only about a row whose `label_tokens` is 0, because it tokenizes the conversation again. A cut to
    `spec.seq_length` is a reason too, if `image_tokens` is the number of tokens of a picture. The reason of a
    conversation that cannot be a row is that of its ConversationError.
    """
    try:
        row = tokenize_conversation(conversations, num_images, tokenizer, replace(spec, seq_length=UNCUT))
        tokens, labels, starts = expand_images(row.input_ids, row.labels, image_tokens)
        if row.label_tokens and np.any(
            cut_row(tokens, labels, starts, image_tokens, spec.seq_length)[1][1:] != IGNORE_INDEX
        ):
            return None
    except ConversationError as error:
        return str(error)
    if row.label_tokens:
        return "its answers are beyond --seq-length"
    style, (system, turns) = TEMPLATES[spec.template], as_dialogue(conversations, num_images)
    answers = [text for role, text in turns if role == "gpt"]
    if not answers:
        return "it has no answer"
    if not any(text.strip() for text in answers):
        return "every answer is empty"
    if "" in answers:
        return "an answer is empty"
    if turns[-1][0] == "human":
        return "the last turn is the human's"
    texts = [system or "", *(text for _, text in turns)]
    if word := next((word for word in style.words for text in texts if word.strip() in text), None):
        return f"a turn contains the template's own {word.strip()}"
    if tokenizer.pad_token_id in row.input_ids:
        return f"a turn contains the padding token {tokenizer.pad_token}"
    return "the answers are not found among the tokens: tokenizer and template do not fit"


def tokenize_prompt(
    conversations: Any, num_images: int, tokenizer: PreTrainedTokenizerBase, spec: SampleSpec
) -> list[int]:
    """Ids to generate from: a conversation whose last turn is the human's, with the answer's role written after it.

    `plain` returns the images alone. Like the reference, later rounds of `llama3` keep `<|eot_conversation|>` as text
    here, unlike in training. Raises as `write_prompt`.
    """
    text = write_prompt(conversations, num_images, spec, generation=True)
    return encode_text(text, _shows_image(text, num_images, spec.template), tokenizer)


def write_prompt(conversations: Any, num_images: int, spec: SampleSpec, generation: bool = False) -> str:
    """The text of a conversation, with one `<image>` per picture; with `generation`, up to the start of the answer.

    `spec.mm_use_im_start_end` puts the plain text `<im_start>` and `<im_end>` around every `<image>`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[spec.template]
    system, shown = as_dialogue(conversations, num_images)
    if num_images and spec.mm_use_im_start_end:
        shown = [(role, text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_IN_TEXT)) for role, text in shown]
    turns: list[Turn] = [*shown]
    if generation:
        if turns[-1][0] != "human":
            raise ConversationError("nothing to answer: the last turn is not the human's")
        turns.append(("gpt", None))
    return style.opening(system) + style.write(turns, style)


def _shows_image(text: str, num_images: int, template: str) -> bool:
    """Whether `<image>` in the text is a picture; in a caption it always is."""
    return num_images > 0 or (template == "plain" and IMAGE_PLACEHOLDER in text)
